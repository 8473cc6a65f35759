"""Size of a model, counted from its shapes; used by plans, `inspect` and `convert`."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from cluscomp_export.sources.linears import linear_tensors
from cluscomp_formats.errors import InvalidRequestError, Problem
from cluscomp_formats.ir import ClusteredWeight, Codebook, Model, Tensor

__all__ = ["Sizes", "model_sizes", "parse_bytes", "tensor_rows"]

_UNITS = {"": 1, "b": 1}
_UNITS |= {f"{prefix}b": 1000**power for power, prefix in enumerate("kmgt", 1)}
_UNITS |= {f"{prefix}ib": 1024**power for power, prefix in enumerate("kmgt", 1)}
_SIZE = re.compile(r"(\d{1,18}(?:\.\d{1,18})?) ?([a-zA-Z]*)", re.ASCII)


def parse_bytes(text: str) -> int:
    """Bytes from a text such as `16MB` (16,000,000), `16 MiB` (16,777,216), `1.5GB` or `300000`, rounded down.

    Raises InvalidRequestError.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None or match[2].lower() not in _UNITS:
        expected = "a size such as 16MB, 1.5GiB or 300000 (bytes)"
        raise InvalidRequestError(Problem("bad_option", "`budget` is not a size", found=text[:100], expected=expected))
    return int(Fraction(match[1]) * _UNITS[match[2].lower()])


@dataclass(frozen=True)
class Sizes:
    """Weights and bits of a model. A shared codebook counts once.

    `linear_bits` are the codes, scales, outliers, codebooks (or dense values) of the linear layers of the decoder blocks;
    `all_bits` those of every tensor; `payload_bytes` adds the side files.
    """

    linear_weights: int
    linear_bits: int
    all_weights: int
    all_bits: int
    payload_bytes: int

    def bits_per_weight(self, file_bytes: int | None = None) -> dict[str, float]:
        """`{"all": ..., "linears": ...}`, and "file" if its size is given; 0 without weights."""
        pairs = {"all": (self.all_bits, self.all_weights), "linears": (self.linear_bits, self.linear_weights)}
        if file_bytes is not None:
            pairs["file"] = (8 * file_bytes, self.all_weights)
        return {name: bits / weights if weights else 0.0 for name, (bits, weights) in pairs.items()}


def _bits(tensors: Iterable[Tensor]) -> int:
    codebooks: dict[str, Codebook] = {}
    bits = 0
    for tensor in tensors:
        bits += tensor.own_bits
        if isinstance(tensor, ClusteredWeight):
            codebooks.update({stage.codebook.name: stage.codebook for stage in tensor.stages})
    return bits + sum(8 * codebook.values.nbytes for codebook in codebooks.values())


def model_sizes(model: Model) -> Sizes:
    """The sizes of a model; reads no payload."""
    linears = [model.tensors[name] for name in linear_tensors(model)]
    everything = list(model.tensors.values())
    all_bits = _bits(everything)
    return Sizes(
        linear_weights=sum(tensor.num_weights for tensor in linears),
        linear_bits=_bits(linears),
        all_weights=sum(tensor.num_weights for tensor in everything),
        all_bits=all_bits,
        payload_bytes=-(-all_bits // 8) + sum(array.nbytes for array in model.files.values()),
    )


def tensor_rows(model: Model) -> list[dict[str, Any]]:
    """One row per tensor for `inspect` and plans: name, shape, dtype or dim, clusters, codebook, stages, bits per weight.

    A shared codebook is not counted in `bits_per_weight` of a row.
    """
    rows: list[dict[str, Any]] = []
    for name in sorted(model.tensors):
        tensor = model.tensors[name]
        row: dict[str, Any] = {"name": name, "shape": list(tensor.shape)}
        if isinstance(tensor, ClusteredWeight):
            first = tensor.stages[0].codebook
            row |= {
                "kind": "clustered",
                "dim": first.cluster_dim,
                "clusters": first.num_clusters,
                "codebook": first.name,
                "stages": len(tensor.stages),
                "extras": [part for part, _ in tensor.extra_arrays],
            }
        else:
            row |= {"kind": "dense", "dtype": tensor.values.dtype, "dim": None, "clusters": None}
        row["bits_per_weight"] = tensor.own_bits / tensor.num_weights if tensor.num_weights else 0.0
        rows.append(row)
    return rows
