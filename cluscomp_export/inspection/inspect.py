"""Describe a model of any format. `docs/inspect.md` describes every member of the report."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from cluscomp_export.inspection.derivation import compare_tensors
from cluscomp_export.inspection.health import CodebookHealth, Health, check_health, codebook_users
from cluscomp_export.planning.sizes import model_sizes, tensor_rows
from cluscomp_export.sources import open_source, source_bytes
from cluscomp_formats.delta import open_delta
from cluscomp_formats.errors import InvalidFileError, InvalidRequestError, Problem
from cluscomp_formats.ir import Array, Model
from cluscomp_formats.parameters import KINDS, kind_of, parameters
from cluscomp_formats.progress import Progress, silent
from cluscomp_formats.registry import detect
from cluscomp_kernels.clus_linear import choose_path, paths
from cluscomp_runtime.memory import memory_faults

__all__ = ["DeltaInspection", "Inspection", "inspect_delta", "inspect_model"]

WORST = 5
"""Tensors listed as the worst."""


@dataclass(frozen=True)
class Inspection:
    """What a model contains; `docs/inspect.md` describes every member. `exit_code` is 3 if there are problems, otherwise 0."""

    file: str
    format: str
    architecture: str
    weights: int
    file_bytes: int
    bits_per_weight: Mapping[str, float]
    quick: bool
    digest: str | None
    provenance: Mapping[str, Any]
    self_test: bool
    files: Mapping[str, int]
    codebooks: Sequence[Mapping[str, Any]]
    tensors: Sequence[Mapping[str, Any]]
    worst_tensors: Mapping[str, Any]
    reference: Mapping[str, Any] | None
    kernel: str
    problems: Sequence[Mapping[str, str]]
    exit_code: int


@dataclass(frozen=True)
class DeltaInspection:
    """What a delta contains: the digests of its model and of the result, the parameters it changes by kind, its record."""

    file: str
    format: str
    file_bytes: int
    base: str
    result: str
    parameters: Sequence[Mapping[str, Any]]
    record: Mapping[str, Any]
    exit_code: int


@memory_faults("run it again with more memory free")
def inspect_model(
    path: Path, *, reference: Path | None = None, quick: bool = False, on_progress: Progress = silent
) -> Inspection:
    """Describe a model: its origin, the settings of each tensor, sizes, the use of its codebooks, the worst tensors.

    Reads every payload once. Problems with their contents are listed under `problems`; `exit_code` is then that of an invalid
    file. `quick` reads no payload and leaves None what would need it. With `reference`, each tensor also gets its error
    compared with the same tensor of that model, and the worst tensors are the worst by that.

    Raises InvalidFileError if the model, or the reference, cannot be opened at all; UnsupportedError, StorageError;
    InvalidRequestError if both `quick` and `reference` are given.
    """
    if quick and reference is not None:
        message = "`quick` reads no weights to compare with a reference"
        raise InvalidRequestError(Problem("bad_option", message, remedy="leave out `quick` or `reference`"))
    model = open_source(path)
    original = open_source(reference) if reference is not None else None
    health = Health({}) if quick else check_health(model, path, on_progress)
    rows = tensor_rows(model)
    for row in rows:
        unused = health.unused_bits.get(row["name"])
        row["unused_bits_per_weight"] = None if unused is None else unused / model.tensors[row["name"]].num_weights
    differences = [] if original is None else _compare(original, model, health.invalid, rows, on_progress)
    measure = "unused_bits_per_weight" if original is None else "relative_error"
    sizes = model_sizes(model)
    fmt = detect(path)
    architectures = model.config.get("architectures")
    architecture = architectures[0] if isinstance(architectures, list) and architectures else model.config.get("model_type")
    return Inspection(
        file=str(path),
        format=fmt.name if fmt else model.provenance.get("format", "unknown"),
        architecture=str(architecture or "unknown"),
        weights=sizes.all_weights,
        file_bytes=source_bytes(path),
        bits_per_weight=sizes.bits_per_weight(source_bytes(path)),
        quick=quick,
        digest=health.digest,
        provenance=dict(model.provenance),
        self_test=model.self_test is not None,
        files={name: array.nbytes for name, array in sorted(model.files.items())},
        codebooks=_codebook_rows(model, health),
        tensors=rows,
        worst_tensors={"by": measure, "names": _worst(rows, measure)},
        reference=None if reference is None else {"file": str(reference), "differences": differences},
        kernel=_kernel(),
        problems=[problem.as_dict() for problem in health.problems],
        exit_code=InvalidFileError.exit_code if health.problems else 0,
    )


def inspect_delta(path: Path, *, reference: Path | None = None) -> DeltaInspection:
    """Describe a delta: its model, what it changes, its record.

    With `reference`, the model it belongs to, the report has how far the new values are from the old ones: per kind of
    parameter, the root mean square of the differences over that of the old values. Raises InvalidFileError, also for a delta of
    another model.
    """
    delta = open_delta(path)
    old = None
    if reference is not None:
        model = open_source(reference)
        delta.apply(model)
        old = parameters(model)
    kinds = []
    for kind in KINDS:
        arrays = {name: array for name, array in delta.arrays.items() if kind_of(name) == kind}
        row = {
            "kind": kind,
            "count": len(arrays),
            "values": sum(array.size for array in arrays.values()),
            "bytes": sum(array.nbytes for array in arrays.values()),
            "dtypes": sorted({array.dtype for array in arrays.values()}),
            "relative_change": None if old is None else _relative_change(arrays, old),
        }
        kinds.append(row)
    return DeltaInspection(
        file=str(path),
        format="delta",
        file_bytes=path.stat().st_size,
        base=delta.base,
        result=delta.result,
        parameters=kinds,
        record=dict(delta.record),
        exit_code=0,
    )


def _relative_change(new: Mapping[str, Array], old: Mapping[str, Array]) -> float | None:
    before = changed = 0.0
    for name, array in new.items():
        values = old[name].to_float32()
        before += float(np.square(values, dtype=np.float64).sum())
        changed += float(np.square(array.to_float32() - values, dtype=np.float64).sum())
    return math.sqrt(changed / before) if before else None


def _codebook_rows(model: Model, health: Health) -> list[dict[str, Any]]:
    users = codebook_users(model)
    unknown = dict.fromkeys(asdict(CodebookHealth()))
    return [
        {
            "name": book.name,
            "dim": book.cluster_dim,
            "clusters": book.num_clusters,
            "dtype": book.values.dtype,
            "code_bits": book.code_bits,
            "codes": sum(stage.codes.size for weight in users[book.name] for stage in weight.stages if stage.codebook is book),
            "tensors": len(users[book.name]),
            **(asdict(health.codebooks[book.name]) if book.name in health.codebooks else unknown),
        }
        for book in model.codebooks.values()
    ]


def _compare(original: Model, model: Model, invalid: set[str], rows: list[dict[str, Any]], on_progress: Progress) -> list[str]:
    """Add the errors relative to the original to the rows, None for invalid tensors; return what else differs, in words."""
    valid = [
        replace(one, tensors={name: tensor for name, tensor in one.tensors.items() if name not in invalid})
        for one in (original, model)
    ]
    errors, differences = compare_tensors(valid[0], valid[1], on_progress)
    by_name = {error.name: error for error in errors}
    for row in rows:
        error = by_name.get(row["name"])
        # There is no error relative to a tensor of zeros, and JSON has no infinity.
        row["relative_error"] = error.relative if error and math.isfinite(error.relative) else None
        row["largest_difference"] = error.max_absolute if error and math.isfinite(error.max_absolute) else None
    return differences


def _worst(rows: list[dict[str, Any]], measure: str) -> list[str]:
    measured = [row for row in rows if row.get(measure)]
    return [row["name"] for row in sorted(measured, key=lambda row: (-row[measure], row["name"]))[:WORST]]


def _kernel() -> str:
    """The kernel the CPU of this machine would use, and why not a faster one."""
    chosen = choose_path("cpu")
    missing = [f"{name} unavailable: {reason}" for name, available, reason in paths("cpu") if not available]
    return "; ".join([f"{chosen} (cpu)", *missing])
