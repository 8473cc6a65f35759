"""Size in bits and expected error of every codebook that a plan can choose.

The error comes from the asymptotic theory of vector quantisation (`expected_error`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt

from cluscomp_export.planning.machines import Machine
from cluscomp_export.planning.speed import dense_ns, weight_ns
from cluscomp_export.sources.linears import kind
from cluscomp_formats.ir import code_bits, tiled_size

__all__ = [
    "CLUSTER_DIMS",
    "CODEBOOK_DTYPES",
    "DENSE",
    "ROUNDING_ERROR",
    "ROW_SCALE_BITS",
    "SIZES",
    "Group",
    "Member",
    "Sensitivity",
    "Size",
    "Table",
    "adaptation",
    "expected_error",
    "mixing",
    "num_vectors",
    "value_widths",
]

Floats = npt.NDArray[np.float64]

CLUSTER_DIMS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 16)
CLUSTER_COUNTS = tuple(sorted({count for bits in range(2, 17) for count in (2**bits, 3 * 2 ** (bits - 2))}))
ROW_SCALE_BITS = 16

CODEBOOK_DTYPES = {8: "int8", 16: "float16"}
"""How codebooks are stored, by bits per value. int8 needs row scales, which absorb the size of a step."""
ROUNDING_ERROR = {8: 1e-4, 16: 0.0}
"""Added to `expected_error` for rounding of centroids: a twelfth of the squared step for int8, nothing for float16."""

Size = tuple[int, int, int]
"""Cluster_dim, num_clusters, bits per value of the codebook."""

DENSE: Size = (0, 0, 0)
"""The size that stands for a tensor that is not clustered."""

SIZES: tuple[Size, ...] = (*itertools.product(CLUSTER_DIMS, CLUSTER_COUNTS, CODEBOOK_DTYPES), DENSE)
"""All candidates."""

MIXED_KINDS = 1.3
"""The error of one codebook for matrices of different kinds, relative to one codebook per kind. Distributions differ, although
every row is scaled to unit variance: 1.05 (dim 2) to 1.15 (dim 4) on SmolLM2 without activations. With activations, the
clusters are distributed among seven kinds, each of which would adapt to its own (`adaptation`): 2.8 doublings fewer, another
1.17."""

OWN_CODEBOOK = 0.97
"""The error of a codebook for one matrix, relative to one that matrices of its kind share: 2 to 5 % less is measured."""

FEEDBACK_ADAPTATION = 0.73
"""What `adaptation` is after error feedback, whatever the number of clusters: that of 32768. See `expected_error`."""

# Normalised second moments of the best known lattice quantisers: Conway & Sloane, Sphere Packings, Lattices and Groups,
# table 2.3; dimensions 9 and 10 from Agrell & Allen 2023.
LATTICE_SECOND_MOMENT = {
    1: 0.083333,
    2: 0.080188,
    3: 0.078543,
    4: 0.076603,
    5: 0.075625,
    6: 0.074244,
    7: 0.073116,
    8: 0.071682,
    9: 0.071622,
    10: 0.070814,
    12: 0.070100,
    16: 0.068299,
}


def expected_error(cluster_dim: int, num_clusters: int, num_vectors: int, *, feedback: bool = False) -> float:
    """Mean squared error per weight of a codebook for the weights of a language model, scaled to variance 1.

    Zador's asymptotic formula `G_d * ||f||_{d/(d+2)} * n^(-2/d)` with the Gaussian's norm `2 pi ((d+2)/d)^((d+2)/2)`, times
    the factor of real matrices (`adaptation`), times the share of vectors that are not centroids themselves: with as many
    clusters as vectors there is no error. Dimensions that are not in `CLUSTER_DIMS` use the constant of the next lower one.

    With `feedback`, the error stands for the divergence after error feedback. That shifts errors to where they matter least,
    which large codebooks do by themselves: what is left is the Gaussian's formula times a constant, by the divergences of
    SmolLM2 with 256 to 65536 clusters (docs/lab-notes.md). The constant matters to no plan; it keeps large codebooks as they
    were.
    """
    d = cluster_dim
    constant = LATTICE_SECOND_MOMENT[max(known for known in LATTICE_SECOND_MOMENT if known <= d)]
    gaussian = 2 * math.pi * math.pow((d + 2) / d, (d + 2) / 2)
    factor = FEEDBACK_ADAPTATION if feedback else adaptation(num_clusters)
    asymptotic = constant * gaussian * math.pow(num_clusters, -2 / d) * factor
    return min(1.0, asymptotic) * max(0.0, 1 - num_clusters / num_vectors)


def adaptation(num_clusters: int) -> float:
    """The error of a codebook for a real matrix, relative to one for Gaussian weights.

    Channels differ in scale and in importance, and more clusters adapt to that better. The formula is a line fitted to the
    errors of the o, up and down matrices of SmolLM2, clustered with activations as weights, at cluster_dims from 1 to 8
    (docs/lab-notes.md); it hardly depends on the cluster_dim.
    """
    return 1.31 - 0.053 * (math.log2(num_clusters) - 4)


def mixing(names: Iterable[str]) -> float:
    """The error of a codebook for the matrices of these names, relative to one for many matrices of one kind."""
    members = list(names)
    if len(members) == 1:
        return OWN_CODEBOOK
    return MIXED_KINDS if len({kind(name) for name in members}) > 1 else 1.0


def num_vectors(shape: tuple[int, int], cluster_dim: int) -> int:
    """Vectors of a matrix `(out_features, in_features)` in the paper's layout, where they run along the out axis."""
    return shape[1] * -(-shape[0] // cluster_dim)


def stored_codes(shape: tuple[int, int], cluster_dim: int) -> int:
    """Codes of a matrix `(out_features, in_features)` in a file, with the padding of tiled codes."""
    return tiled_size(shape[1], -(-shape[0] // cluster_dim))


def value_widths(codebook_bits: int | None, *, row_scale: bool) -> tuple[int, ...]:
    """The bits per value that a codebook may have: `codebook_bits`, or any if None."""
    if not row_scale:
        return (16,)
    return tuple(CODEBOOK_DTYPES) if codebook_bits is None else (codebook_bits,)


_COUNTS = np.array([float(count) for _, count, _ in SIZES[:-1]])
_VALUE_BITS = np.array([width for _, _, width in SIZES[:-1]])
_CODE_BITS = np.array([code_bits(count) for _, count, _ in SIZES[:-1]])
_CODEBOOK_BITS = np.array([count * dim * width for dim, count, width in SIZES[:-1]])
_ASYMPTOTIC_ERROR = np.array([expected_error(dim, count, 1 << 62) for dim, count, _ in SIZES[:-1]])
_AFTER_FEEDBACK = np.array([expected_error(dim, count, 1 << 62, feedback=True) for dim, count, _ in SIZES[:-1]])
_ROUNDING_ERROR = np.array([ROUNDING_ERROR[width] for _, _, width in SIZES[:-1]])


@dataclass(frozen=True)
class Sensitivity:
    """The loss from errors of one matrix `[out_features, in_features]`.

    `relative`: nats per token for a relative squared error of 1, distributed as with a codebook for scaled rows.
    `flat`: the same for a codebook without row scales.
    """

    relative: float
    flat: float

    def cost(self, *, row_scale: bool) -> float:
        """Nats per token for a relative squared error of 1 of a tensor with or without row scales."""
        return self.relative if row_scale else self.flat


@dataclass(frozen=True)
class Terms:
    """On what terms candidates are compared: the machine whose time counts, if any, and whether error feedback follows."""

    machine: Machine | None = None
    feedback: bool = False


PLAIN = Terms()
"""Bits and the theory's error only."""


@dataclass(frozen=True)
class Member:
    """A matrix to store: its name and shape, and the loss from a relative squared error of 1, with and without row scales.

    `share` is that of its weights which a token reads: less than 1 for an expert, 0 for an embedding that is not the head.
    """

    name: str
    shape: tuple[int, int]
    loss: float
    flat_loss: float
    share: float = 1.0

    @property
    def num_weights(self) -> int:
        return self.shape[0] * self.shape[1]


@dataclass(frozen=True)
class Group:
    """Matrices that use one codebook, named `name`, with `codebook_bits` per value, or the best if None.

    `dense_bits` is their size if not clustered; None if they must be clustered.
    """

    name: str
    members: tuple[Member, ...]
    row_scale: bool
    dense_bits: int | None = None
    codebook_bits: int | None = None

    @property
    def value_widths(self) -> tuple[int, ...]:
        return value_widths(self.codebook_bits, row_scale=self.row_scale)


def _of_candidates(groups: Sequence[Group], count: Callable[[tuple[int, int], int], int]) -> Floats:
    """The sum of `count(shape, cluster_dim)` over the members of every group, for every candidate that is not dense."""
    by_dim = np.array([[float(sum(count(m.shape, dim) for m in group.members)) for dim in CLUSTER_DIMS] for group in groups])
    return by_dim.reshape(len(groups), -1).repeat(len(CLUSTER_COUNTS) * len(CODEBOOK_DTYPES), axis=1)


class Table:
    """Bits, expected loss and nanoseconds for a token of every candidate for every group, float64 `[groups, len(SIZES)]`.

    Infinitely many bits stand for impossible choices: more clusters than vectors, a width that is not allowed, dense where the
    matrices must be clustered. Without a machine, no time passes.
    """

    def __init__(self, groups: Sequence[Group], terms: Terms = PLAIN) -> None:
        self.groups = tuple(groups)
        vectors, codes = (_of_candidates(groups, count) for count in (num_vectors, stored_codes))
        loss = np.array([sum(m.loss if group.row_scale else m.flat_loss for m in group.members) for group in groups])
        mixed = np.array([mixing(member.name for member in group.members) for group in groups])
        scales = np.array([ROW_SCALE_BITS * sum(m.shape[0] for m in group.members) * group.row_scale for group in groups])
        needed = codes * _CODE_BITS + _CODEBOOK_BITS + scales[:, None]
        allowed = np.array([np.isin(_VALUE_BITS, group.value_widths) for group in groups])
        dense = [np.inf if group.dense_bits is None else group.dense_bits for group in groups]
        self.bits: Floats = np.column_stack([np.where((vectors >= _COUNTS) & allowed, needed, np.inf), dense])
        clustering = _AFTER_FEEDBACK if terms.feedback else _ASYMPTOTIC_ERROR
        errors = mixed[:, None] * clustering * np.maximum(0.0, 1 - _COUNTS / vectors) + _ROUNDING_ERROR
        self.loss: Floats = np.column_stack([loss[:, None] * errors, np.zeros(len(groups))])
        read = np.array([sum(member.num_weights * member.share for member in group.members) for group in groups])
        self.ns: Floats = read[:, None] * _times(terms.machine)

    def costs(self, price: float, rate: float) -> Floats:
        """`loss + price * (bits + rate * ns)`."""
        costs: Floats = self.loss + price * (self.bits + rate * self.ns)
        return costs


@cache
def _times(machine: Machine | None) -> Floats:
    """Nanoseconds per weight of every candidate, on all cores."""
    if machine is None:
        return np.zeros(len(SIZES))
    return np.array([*(weight_ns(machine, *size) for size in SIZES[:-1]), dense_ns(machine, 16)])
