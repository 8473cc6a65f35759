"""From a source to an artefact: plan, compress, write, self-test, rename.

`convert` reads from top to bottom; `compress_source.py` has the compression. Its finished work is kept next to the output until
the artefact is complete, see `work_folder`.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluscomp_export.conversion.compress_source import CompressedSource, compress_source
from cluscomp_export.conversion.finite_values import scan_dense
from cluscomp_export.conversion.options import ConversionOptions
from cluscomp_export.conversion.output_format import output_format
from cluscomp_export.conversion.prepare import Prepared, prepare
from cluscomp_export.conversion.self_test import SelfTestRecorder, run_own_self_test
from cluscomp_export.conversion.source_faults import faults_of
from cluscomp_export.outputs import check_apart
from cluscomp_export.planning.sizes import model_sizes
from cluscomp_export.sources import open_source
from cluscomp_export.threads import torch_threads
from cluscomp_export.training.loop import Curve, finite_curve
from cluscomp_export.work_folder import WorkFolder, fingerprint, remove_work, work_folder, work_path
from cluscomp_formats.errors import ClusCompError, OutputExistsError, Problem, StorageError
from cluscomp_formats.progress import Progress, silent
from cluscomp_runtime.memory import memory_faults

__all__ = ["ConversionOptions", "ConversionReport", "Prepared", "convert", "prepare"]

_MEMORY_REMEDY = "free memory, or use `device='cpu'` if a GPU was full, and run it again: finished work has been kept"


@dataclass(frozen=True)
class ConversionReport:
    """What `convert` did.

    `curves` are the losses of trainings: `recovery`, and `block 0` and so on for each block that was tuned. `reused` counts the
    units of work (codebooks, tensors) that an interrupted attempt had finished. `speed` is predicted: the fields of
    `planning.speed.PredictedSpeed`.
    """

    output: str
    file_bytes: int
    source_file_bytes: int
    digest: str | None
    bits_per_weight: Mapping[str, float]
    speed: Mapping[str, Any]
    self_test: bool
    curves: Mapping[str, Curve]
    reused: int
    seconds: float
    warnings: tuple[str, ...]


def convert(
    source_path: Path,
    output: Path,
    options: ConversionOptions,
    *,
    force: bool = False,
    on_progress: Progress = silent,
    on_warning: Callable[[str], None] = lambda text: None,
) -> ConversionReport:
    """Convert `source_path` and write `output`. The output is complete or absent; the source is never changed.

    `on_warning` gets each warning as soon as it is known; the report has all of them.

    A compression that fails or is interrupted keeps its finished work in a folder next to the output (`work_path`); the same
    call resumes it and produces the same bytes. Raises what `prepare` and `compress_source` do, OutputExistsError,
    StorageError, SelfTestError, WorkersLostError, and UnsupportedError if memory runs out.
    """
    started = time.perf_counter()
    fmt = output_format(options.to, options.gguf_type)
    check_apart([output], [source_path, *options.files()])
    try:
        fmt.check_output(output, force=force)
    except OutputExistsError:
        _remove_finished_work(output)
        raise
    # Finds early what cannot be done. Sensitivities are measured later, after the source has been checked.
    prepared = prepare(source_path, options, measure=False)
    fmt.check_model(prepared.model)
    warnings: list[str] = []

    def warn(texts: Sequence[str]) -> None:
        warnings.extend(texts)
        for text in texts:
            on_warning(text)

    warn(prepared.warnings)
    with contextlib.ExitStack() as unfinished:
        unfinished.enter_context(memory_faults(_MEMORY_REMEDY))
        unfinished.enter_context(torch_threads(options.torch_threads))
        work = unfinished.enter_context(work_folder(output)) if prepared.plan is not None else None
        _check_space(output, prepared, work)
        if work is None:
            # Clustered already: written as it is.
            scan_dense(prepared.source, source_path, on_progress)
            told = run_own_self_test(prepared.source, source_path, on_progress)
            result = CompressedSource(prepared.source, {}, tuple(told))
        else:
            with faults_of(source_path):
                result = compress_source(prepared, source_path, options, fmt, work, on_progress)
        warn(result.warnings)
        self_test = SelfTestRecorder(result.model.self_test, on_progress)
        with faults_of(source_path):
            written = fmt.write(
                result.model,
                output,
                force=force,
                self_test=self_test,
                on_progress=on_progress,
            )
    warn(self_test.warnings)
    return ConversionReport(
        output=str(output),
        file_bytes=written.file_bytes,
        source_file_bytes=prepared.source_file_bytes,
        digest=written.digest,
        bits_per_weight=model_sizes(result.model).bits_per_weight(written.file_bytes),
        speed=vars(prepared.speed),
        self_test=self_test.record is not None,
        curves={name: finite_curve(curve) for name, curve in result.curves.items() if curve},
        reused=work.reused if work is not None else 0,
        seconds=time.perf_counter() - started,
        warnings=tuple(warnings),
    )


def _remove_finished_work(output: Path) -> None:
    """Remove the work folder of the conversion that made `output`, if that was killed just before it could."""
    if os.path.isdir(work_path(output)):  # noqa: PTH112 - Path.is_dir raises
        with contextlib.suppress(ClusCompError):
            remove_work(output, fingerprint(open_source(output).provenance))


def _check_space(output: Path, prepared: Prepared, work: WorkFolder | None) -> None:
    """Refuse early if there is not enough space for the artefact and, until it is complete, the unfinished work."""
    needed = max(peak.disk for peak in prepared.memory)
    if work is not None:
        needed = max(prepared.sizes.payload_bytes, needed - work.stored_bytes())
    free = shutil.disk_usage(output.parent).free
    if free < needed:
        found, expected = f"{free / 1e6:.1f} MB free", f"{needed / 1e6:.1f} MB for the artefact and unfinished work"
        raise StorageError(
            Problem("no_space", "not enough space", str(output), None, found, expected, "free space, or use another disk")
        )
