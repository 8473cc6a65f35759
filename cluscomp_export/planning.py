"""Decide, before any work, how each tensor is stored: which (cluster_dim, num_clusters), which codebook, or dense.

The planner minimises the expected quantisation error of the linear layers under a budget of bits per weight in which codes,
codebooks and scales all count. The error of a codebook comes from the asymptotic theory of vector quantisation
(`expected_error`); the choice per kind of matrix under one budget is a Lagrangian relaxation (Shoham & Gersho 1988): every
kind takes the candidate with the least `error + price * bits`, and the price rises until the total fits.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from cluscomp_export.sources.linears import embedding_tensor, head_tensor, kind, linear_tensors
from cluscomp_formats.errors import InvalidRequestError, Problem, UnsupportedError
from cluscomp_formats.ir import MAX_CLUSTERS, ClusteredWeight, Model, code_bits

__all__ = ["CodebookPlan", "Plan", "Share", "Treatment", "embedding_tensors", "expected_error", "plan_bits", "plan_fixed"]

Share = Literal["none", "kind", "model"]
Size = tuple[int, int, int]
"""Cluster_dim, num_clusters, bits per value."""

CLUSTER_DIMS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 16)
CLUSTER_COUNTS = tuple(sorted({count for bits in range(2, 17) for count in (2**bits, 3 * 2 ** (bits - 2))}))
ROW_SCALE_BITS = 16

CODEBOOK_DTYPES = {8: "int8", 16: "float16"}
"""How codebooks are stored, by the bits of a value; int8 needs row scales, which take in what a step is worth."""
ROUNDING_ERROR = {8: 1e-4, 16: 0.0}
"""What rounding the centroids adds to `expected_error`: a twelfth of the squared step of int8, nothing for float16."""

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


def expected_error(cluster_dim: int, num_clusters: int, num_vectors: int) -> float:
    """Mean squared error per weight of a codebook for Gaussian weights of variance 1.

    Zador's asymptotic formula `G_d * ||f||_{d/(d+2)} * n^(-2/d)` with the Gaussian's norm `2 pi ((d+2)/d)^((d+2)/2)`, times
    the share of vectors that are not centroids themselves: as many clusters as vectors lose nothing.
    """
    d = cluster_dim
    gaussian = 2 * math.pi * math.pow((d + 2) / d, (d + 2) / 2)
    asymptotic = LATTICE_SECOND_MOMENT[d] * gaussian * math.pow(num_clusters, -2 / d)
    return min(1.0, asymptotic) * max(0.0, 1 - num_clusters / num_vectors)


@dataclass(frozen=True)
class CodebookPlan:
    """A codebook to be made: `num_clusters` centroids of `cluster_dim` for the tensors named in `members`.

    `value_bits` is a key of `CODEBOOK_DTYPES`.
    """

    name: str
    cluster_dim: int
    num_clusters: int
    members: tuple[str, ...]
    value_bits: int

    @property
    def dtype(self) -> str:
        return CODEBOOK_DTYPES[self.value_bits]

    @property
    def shared(self) -> bool:
        """Whether several tensors use it; their rows are then scaled to unit variance."""
        return len(self.members) > 1


@dataclass(frozen=True)
class Treatment:
    """How one clustered tensor is stored. `shape` is `(out_features, in_features)`."""

    shape: tuple[int, int]
    codebook: CodebookPlan
    row_scale: bool


@dataclass(frozen=True)
class Plan:
    """Treatments of the tensors to be clustered; every other tensor stays dense."""

    treatments: Mapping[str, Treatment]

    @property
    def codebooks(self) -> tuple[CodebookPlan, ...]:
        """Every codebook once, in order of first use."""
        return tuple({treatment.codebook.name: treatment.codebook for treatment in self.treatments.values()}.values())


def plan_fixed(
    model: Model,
    *,
    cluster_dim: int,
    num_clusters: int,
    share: Share,
    embedding_bits: float,
    codebook_bits: int | None = None,
) -> Plan:
    """The same (cluster_dim, num_clusters) for every linear layer; `share="none"` is the paper's setting.

    `codebook_bits` is 8, the default, or 16, see `plan_bits`.
    Raises InvalidRequestError, UnsupportedError.
    """
    if not (1 <= num_clusters <= MAX_CLUSTERS and cluster_dim >= 1):
        found = f"--dim {cluster_dim} --clusters {num_clusters}"
        expected = f"--dim of at least 1, --clusters from 1 to {MAX_CLUSTERS}"
        raise InvalidRequestError(Problem("bad_option", "impossible codebook size", found=found, expected=expected))
    groups = _groups(model, share)
    value_bits = min(_value_bits(codebook_bits, row_scale=share != "none"))
    choices = dict.fromkeys(groups, (cluster_dim, num_clusters, value_bits))
    return Plan({**_treatments(model, groups, choices, share), **_plan_embeddings(model, embedding_bits, codebook_bits)})


def plan_bits(
    model: Model, *, bits: float, share: Share | None, embedding_bits: float, codebook_bits: int | None = None
) -> Plan:
    """The choice with the least expected error at no more than `bits` per weight of the linear layers, all they need counted.

    `share=None` tries a codebook per matrix, per kind of matrix and one for the whole model, and takes the best.
    `codebook_bits`, 8 or 16 per value of a codebook, both if None; without row scales it is always 16. Raises
    InvalidRequestError if nothing fits the budget, UnsupportedError if there is nothing to cluster.
    """
    candidates: list[tuple[float, dict[str, Treatment]]] = []
    for mode in (share,) if share else ("none", "kind", "model"):
        groups = _groups(model, mode)
        for value_bits in _value_bits(codebook_bits, row_scale=mode != "none"):
            solved = _allocate(model, groups, bits, mode, value_bits)
            if solved is not None:
                error, choices = solved
                candidates.append((error, _treatments(model, groups, choices, mode)))
    if not candidates:
        remedy = "allow more bits, or share codebooks: --share kind, --share model"
        found = f"--bits {bits:g}" + (f" --share {share}" if share else "")
        raise InvalidRequestError(Problem("budget_too_small", "no codebook fits this budget", found=found, remedy=remedy))
    treatments = min(candidates, key=lambda candidate: candidate[0])[1]
    return Plan({**treatments, **_plan_embeddings(model, embedding_bits, codebook_bits)})


def _value_bits(codebook_bits: int | None, *, row_scale: bool) -> tuple[int, ...]:
    """The widths of a codebook's values to choose from."""
    if not row_scale:
        return (16,)
    return tuple(CODEBOOK_DTYPES) if codebook_bits is None else (codebook_bits,)


def _groups(model: Model, share: Share) -> dict[str, list[str]]:
    """The linear layers by the codebook they would use."""
    names = linear_tensors(model)
    if not names:
        remedy = "check that the source is a language model with 2-D weights"
        raise UnsupportedError(Problem("no_linears", "no linear layer was found to cluster", remedy=remedy))
    clustered = [name for name in names if isinstance(model.tensors[name], ClusteredWeight)]
    if clustered:
        remedy = "convert the original model; an artefact that is already clustered is only repacked, without --bits or --dim"
        problem = Problem("already_clustered", "the source is already clustered", tensor=clustered[0], remedy=remedy)
        raise InvalidRequestError(problem)
    groups: dict[str, list[str]] = defaultdict(list)
    for name in names:
        module = {"none": name, "kind": kind(name), "model": "linears"}[share]
        groups[module.removesuffix(".weight")].append(name)
    return dict(groups)


def _shape(model: Model, name: str) -> tuple[int, int]:
    out_features, in_features = model.tensors[name].shape
    return out_features, in_features


def _num_vectors(shape: tuple[int, int], cluster_dim: int) -> int:
    return shape[1] * -(-shape[0] // cluster_dim)


def _treatments(
    model: Model, groups: Mapping[str, Sequence[str]], choices: Mapping[str, Size], share: Share
) -> dict[str, Treatment]:
    treatments = {}
    for codebook_name, members in groups.items():
        cluster_dim, num_clusters, value_bits = choices[codebook_name]
        vectors = sum(_num_vectors(_shape(model, name), cluster_dim) for name in members)
        codebook = CodebookPlan(codebook_name, cluster_dim, min(num_clusters, vectors), tuple(members), value_bits)
        for name in members:
            treatments[name] = Treatment(_shape(model, name), codebook, row_scale=share != "none")
    return treatments


@dataclass(frozen=True)
class _Options:
    """All candidates of one group of equal matrices: `bits` and `error` float `[candidates]`, summed over the group."""

    sizes: tuple[Size, ...]
    bits: np.ndarray[tuple[int], np.dtype[np.float64]]
    error: np.ndarray[tuple[int], np.dtype[np.float64]]


def _options(shapes: Sequence[tuple[int, int]], *, row_scale: bool, codebook_bits: int | None) -> _Options:
    """Candidates for matrices of these shapes that use one codebook together."""
    weights = sum(out_features * in_features for out_features, in_features in shapes)
    scales = sum(out_features for out_features, _ in shapes) * ROW_SCALE_BITS if row_scale else 0
    sizes, bits, errors = [], [], []
    for cluster_dim in CLUSTER_DIMS:
        vectors = sum(_num_vectors(shape, cluster_dim) for shape in shapes)
        for num_clusters in CLUSTER_COUNTS:
            if num_clusters > vectors:
                break
            error = expected_error(cluster_dim, num_clusters, vectors)
            for value_bits in _value_bits(codebook_bits, row_scale=row_scale):
                codebook = num_clusters * cluster_dim * value_bits
                sizes.append((cluster_dim, num_clusters, value_bits))
                bits.append(vectors * code_bits(num_clusters) + codebook + scales)
                errors.append(weights * (error + ROUNDING_ERROR[value_bits]))
    return _Options(tuple(sizes), np.array(bits, dtype=np.float64), np.array(errors))


def _allocate(
    model: Model, groups: Mapping[str, Sequence[str]], bits: float, share: Share, codebook_bits: int | None
) -> tuple[float, dict[str, Size]] | None:
    """Error and choice per group within `bits` per weight over all groups, or None if nothing fits."""
    shapes = {name: tuple(_shape(model, member) for member in members) for name, members in groups.items()}
    distinct = {key: _options(key, row_scale=share != "none", codebook_bits=codebook_bits) for key in set(shapes.values())}
    counts = {key: sum(value == key for value in shapes.values()) for key in distinct}
    weights = sum(out_features * in_features for key in shapes.values() for out_features, in_features in key)
    budget = bits * weights

    def choose(price: float) -> tuple[float, dict[tuple[tuple[int, int], ...], int]]:
        picks = {key: int(np.argmin(option.error + price * option.bits)) for key, option in distinct.items()}
        return sum(counts[key] * float(distinct[key].bits[pick]) for key, pick in picks.items()), picks

    if any(len(option.sizes) == 0 for option in distinct.values()) or choose(1e12)[0] > budget:
        return None
    low, high = 1e-12, 1e12  # prices: the cheaper one may break the budget, the dearer one holds it
    for _ in range(100):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if choose(middle)[0] > budget else (low, middle)
    spent, picks = choose(high)
    # The relaxation only knows the candidates on the convex hull; what it leaves of the budget buys others in between.
    while True:
        upgrades = [
            (counts[key] * float(option.error[picks[key]] - option.error[pick]), cost, key, pick)
            for key, option in distinct.items()
            for pick in range(len(option.sizes))
            if (cost := counts[key] * float(option.bits[pick] - option.bits[picks[key]])) <= budget - spent
        ]
        gain, cost, key, pick = max(upgrades, key=lambda upgrade: upgrade[0])
        if gain <= 0:
            break
        picks[key] = pick
        spent += cost
    error = sum(counts[key] * float(distinct[key].error[pick]) for key, pick in picks.items())
    return error, {name: distinct[key].sizes[picks[key]] for name, key in shapes.items()}


def embedding_tensors(model: Model) -> list[str]:
    """Names of the embedding and of the head, where it is not tied to the embedding."""
    return [name for name in (embedding_tensor(model), head_tensor(model)) if name is not None]


def _plan_embeddings(model: Model, bits: float, codebook_bits: int | None) -> dict[str, Treatment]:
    """Embedding and untied head, a codebook and row scales each, at no more than `bits` per weight; 16 keeps them dense."""
    treatments: dict[str, Treatment] = {}
    if bits >= 16:
        return treatments
    for name in embedding_tensors(model):
        if isinstance(model.tensors[name], ClusteredWeight):
            continue
        shape = _shape(model, name)
        options = _options([shape], row_scale=True, codebook_bits=codebook_bits)
        fitting = np.where(options.bits <= bits * shape[0] * shape[1], options.error, np.inf)
        if not np.isfinite(fitting).any():
            problem = Problem(
                "budget_too_small", "no codebook fits this budget", tensor=name, found=f"--embedding-bits {bits:g}"
            )
            raise InvalidRequestError(problem)
        cluster_dim, num_clusters, value_bits = options.sizes[int(np.argmin(fitting))]
        codebook = CodebookPlan(name.removesuffix(".weight"), cluster_dim, num_clusters, (name,), value_bits)
        treatments[name] = Treatment(shape, codebook, row_scale=True)
    return treatments
