"""The header of a packed file as data: a description of each tensor, and the section of each of its arrays."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from cluscomp_formats.ir import Array, ClusteredWeight, Model
from cluscomp_formats.sections.payloads import Payload

__all__ = [
    "ALIGNMENT",
    "MAX_HEADER_LENGTH",
    "ArrayEntry",
    "ClusteredEntry",
    "DenseEntry",
    "OutliersEntry",
    "PackedHeader",
    "Section",
    "StageEntry",
    "align",
    "header_of",
    "header_value",
]


ALIGNMENT = 64
"""Sections begin at multiples of this many bytes: a cache line, which is enough for any vector load."""

MAX_HEADER_LENGTH = 1 << 26


def align(offset: int) -> int:
    """Return `offset` rounded up to the next multiple of `ALIGNMENT`."""
    return -(-offset // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True)
class Section:
    """A range of bytes of a file: offset and length in bytes, and CRC-32."""

    offset: int
    length: int
    crc32: int


@dataclass(frozen=True)
class ArrayEntry:
    """An array: storage type (a key of `DTYPES`), shape, and number of its section."""

    dtype: str
    shape: tuple[int, ...]
    section: int


@dataclass(frozen=True)
class StageEntry:
    """A stage: the name of its codebook and the section of its codes."""

    codebook: str
    codes: int


@dataclass(frozen=True)
class OutliersEntry:
    """Positions and values of the outliers."""

    positions: ArrayEntry
    values: ArrayEntry


@dataclass(frozen=True)
class ClusteredEntry:
    """A clustered weight of `shape [out_features, in_features]`."""

    shape: tuple[int, int]
    group_axis: Literal["out", "in"]
    stages: tuple[StageEntry, ...]
    row_scale: ArrayEntry | None = None
    column_scale: ArrayEntry | None = None
    outliers: OutliersEntry | None = None


@dataclass(frozen=True)
class DenseEntry:
    """A tensor that is not clustered."""

    values: ArrayEntry


@dataclass(frozen=True)
class PackedHeader:
    """The content of a header. `digest` is the recorded digest, which `Model.digest()` recomputes."""

    config: Mapping[str, Any]
    provenance: Mapping[str, Any]
    self_test: Mapping[str, Any] | None
    digest: str
    codebooks: Mapping[str, ArrayEntry]
    tensors: Mapping[str, ClusteredEntry | DenseEntry]
    files: Mapping[str, int]
    sections: tuple[Section, ...]


def header_of(
    model: Model, payloads: Sequence[Payload], sections: Sequence[Section], digest: str, self_test: Mapping[str, Any] | None
) -> PackedHeader:
    """Return the header of `model`; its `payloads`, in file order, are stored in `sections`."""
    numbers: defaultdict[tuple[str, str], list[int]] = defaultdict(list)
    for number, payload in enumerate(payloads):
        numbers[payload.owner, payload.part].append(number)

    def entry(owner: str, part: str, array: Array) -> ArrayEntry:
        return ArrayEntry(array.dtype, array.shape, numbers[owner, part][0])

    tensors: dict[str, ClusteredEntry | DenseEntry] = {}
    for name, tensor in model.tensors.items():
        if not isinstance(tensor, ClusteredWeight):
            tensors[name] = DenseEntry(entry(name, "values", tensor.values))
            continue
        extras = {part: entry(name, part, array) for part, array in tensor.extra_arrays}
        stages = zip(tensor.stages, numbers[name, "codes"], strict=True)
        tensors[name] = ClusteredEntry(
            shape=tensor.shape,
            group_axis=tensor.group_axis,
            stages=tuple(StageEntry(stage.codebook.name, number) for stage, number in stages),
            row_scale=extras.get("row_scale"),
            column_scale=extras.get("column_scale"),
            outliers=OutliersEntry(extras["outlier_positions"], extras["outlier_values"]) if tensor.outliers else None,
        )
    codebooks = {name: entry(name, "centroids", codebook.values) for name, codebook in model.codebooks.items()}
    files = {name: numbers[name, "bytes"][0] for name in model.files}
    return PackedHeader(model.config, model.provenance, self_test, digest, codebooks, tensors, files, tuple(sections))


def header_value(header: PackedHeader) -> dict[str, Any]:
    """Return the header as a JSON value, as stored."""
    return {
        "codebooks": {name: vars(entry) for name, entry in header.codebooks.items()},
        "config": header.config,
        "digest": header.digest,
        "files": dict(header.files),
        "provenance": header.provenance,
        "sections": [vars(section) for section in header.sections],
        "self_test": header.self_test,
        "tensors": {name: _tensor_value(entry) for name, entry in header.tensors.items()},
    }


def _tensor_value(entry: ClusteredEntry | DenseEntry) -> dict[str, Any]:
    if isinstance(entry, DenseEntry):
        return {"kind": "dense", "values": vars(entry.values)}
    value: dict[str, Any] = {
        "kind": "clustered",
        "shape": entry.shape,
        "group_axis": entry.group_axis,
        "stages": [vars(stage) for stage in entry.stages],
    }
    if entry.row_scale:
        value["row_scale"] = vars(entry.row_scale)
    if entry.column_scale:
        value["column_scale"] = vars(entry.column_scale)
    if entry.outliers:
        value["outliers"] = {"positions": vars(entry.outliers.positions), "values": vars(entry.outliers.values)}
    return value
