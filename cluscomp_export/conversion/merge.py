"""Merge deltas into their model. The result is an ordinary model, in any format."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cluscomp_export.conversion.finite_values import scan_dense
from cluscomp_export.conversion.output_format import output_format
from cluscomp_export.conversion.self_test import SelfTestRecorder, run_own_self_test
from cluscomp_export.conversion.source_faults import faults_of
from cluscomp_export.outputs import check_apart
from cluscomp_export.sources import open_source
from cluscomp_export.training.finetuning import checked_digest
from cluscomp_formats.delta import combine, open_delta
from cluscomp_formats.errors import InvalidFileError, Problem
from cluscomp_formats.files.stored_file import StoredFile
from cluscomp_formats.ir import Model
from cluscomp_formats.progress import Progress, silent
from cluscomp_formats.version import __version__
from cluscomp_runtime.memory import memory_faults

__all__ = ["MergeReport", "merge"]

_PIECE_BYTES = 1 << 24


@dataclass(frozen=True)
class MergeReport:
    """What `merge` did: digests of the model and of the result (None for a dense file), the weight of each delta."""

    output: str
    file_bytes: int
    base: str
    digest: str | None
    weights: tuple[float, ...]
    self_test: bool
    seconds: float
    warnings: tuple[str, ...]


@memory_faults("run it again with more memory free")
def merge(
    model_path: Path,
    delta_paths: Sequence[Path],
    output: Path,
    *,
    to: str = "packed",
    gguf_type: str | None = None,
    weights: Sequence[float] | None = None,
    force: bool = False,
    on_progress: Progress = silent,
) -> MergeReport:
    """Apply deltas to their model and write the result, with its own self-test record.

    One delta is applied exactly, unless its weight is not 1. Of several deltas, the weighted differences are added, with equal
    shares if no `weights` are given. The provenance is that of the model, with the deltas added. Raises InvalidFileError for an
    invalid delta or one of another model, InvalidRequestError, UnsupportedError, OutputExistsError, StorageError.
    """
    started = time.perf_counter()
    fmt = output_format(to, gguf_type)
    check_apart([output], [model_path, *delta_paths])
    fmt.check_output(output, force=force)
    deltas = [open_delta(path) for path in delta_paths]
    model = open_source(model_path)
    base = checked_digest(model, model_path, on_progress)
    shares = tuple(weights) if weights is not None else (1 / len(deltas),) * len(deltas)
    merged = combine(model, deltas, shares, base)
    if shares == (1,):
        _check_result(merged, deltas[0].result, delta_paths[0])
    merged = replace(merged, provenance=_provenance(model, base, delta_paths, [delta.record for delta in deltas], shares))
    fmt.check_model(merged)
    warnings = [*fmt.notes(merged)]
    scan_dense(model, model_path, on_progress)
    warnings += run_own_self_test(model, model_path, on_progress)
    self_test = SelfTestRecorder(None, on_progress)
    with faults_of(model_path):
        written = fmt.write(
            merged,
            output,
            force=force,
            self_test=self_test,
            on_progress=on_progress,
        )
    return MergeReport(
        output=str(output),
        file_bytes=written.file_bytes,
        base=base,
        digest=written.digest,
        weights=shares,
        self_test=self_test.record is not None,
        seconds=time.perf_counter() - started,
        warnings=(*warnings, *self_test.warnings),
    )


def _check_result(merged: Model, expected: str, path: Path) -> None:
    digest = merged.digest()
    if digest != expected:
        message, remedy = (
            "the model with the delta has another digest than the delta says",
            "get the delta again, or tune",
        )
        raise InvalidFileError(Problem("result_mismatch", message, str(path), None, digest, expected, remedy))


def _provenance(
    model: Model, base: str, paths: Sequence[Path], records: Sequence[Mapping[str, Any]], weights: Sequence[float]
) -> dict[str, Any]:
    """The model's own provenance, so that its source is still known, and the merge."""
    deltas = [
        {"sha256": _sha256(path), "weight": weight, "record": record}
        for path, weight, record in zip(paths, weights, records, strict=True)
    ]
    merges = model.provenance.get("merges")
    earlier = merges if isinstance(merges, list) else []
    return {**model.provenance, "merges": [*earlier, {"version": __version__, "base": base, "deltas": deltas}]}


def _sha256(path: Path) -> str:
    file, digest = StoredFile(path), hashlib.sha256()
    for begin in range(0, file.length, _PIECE_BYTES):
        digest.update(file.copy(begin, _PIECE_BYTES))
    return digest.hexdigest()
