"""From a source to an artefact: plan, check the source, cluster while writing, self-test, rename.

What a clustering has finished is kept beside the output until that is there: see `work_folder`.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from cluscomp_export.calibration.activations import (
    ENERGY_WINDOWS,
    calibration_context,
    calibration_tokens,
    calibration_windows,
    channel_energies,
)
from cluscomp_export.calibration.fisher import WINDOWS
from cluscomp_export.calibration.row_importance import block_matrices, row_importance
from cluscomp_export.calibration.runnable import decoder_description
from cluscomp_export.compression.error_feedback import ErrorFeedback
from cluscomp_export.compression.fit_encode import Computing
from cluscomp_export.compression.pipeline import cluster_model
from cluscomp_export.compression.workers.local import Workers, open_workers, parse_workers
from cluscomp_export.conversion.effort import levels_of
from cluscomp_export.conversion.finite_values import scan_dense, scan_source
from cluscomp_export.conversion.options import ConversionOptions
from cluscomp_export.conversion.output_format import output_format
from cluscomp_export.conversion.prepare import Prepared, make_plan, prepare, provenance_of, sensitivities_of
from cluscomp_export.outputs import check_apart
from cluscomp_export.planning.sizes import model_sizes
from cluscomp_export.progress import Progress, silent
from cluscomp_export.sources import open_source
from cluscomp_export.threads import torch_threads
from cluscomp_export.training import RecoveryOptions, TrainableModel, recover
from cluscomp_export.training.loop import Curve, curve_array, curve_entries, curve_form, finite_curve
from cluscomp_export.work_folder import Forms, WorkFolder, fingerprint, remove_work, work_folder, work_path
from cluscomp_formats.errors import (
    ClusCompError,
    InvalidFileError,
    OutputExistsError,
    Problem,
    SelfTestError,
    StorageError,
    UnsupportedError,
)
from cluscomp_formats.format import Format
from cluscomp_formats.ir import AnyArray, Model
from cluscomp_runtime.language_model import check_device
from cluscomp_runtime.memory import memory_faults
from cluscomp_runtime.selftest import check_against_weights, make_self_test

__all__ = [
    "ConversionOptions",
    "ConversionReport",
    "Prepared",
    "convert",
    "faults_of",
    "prepare",
    "record_self_test",
    "run_own_self_test",
]

_MEMORY_REMEDY = "run it again with more memory free, or with --device cpu if a GPU was full: what is finished has been kept"


@dataclass(frozen=True)
class ConversionReport:
    """What `convert` did.

    `curves` are the losses of trainings: `recovery`, and `block 0` and so on for each block that was tuned. `reused` counts the
    units of work (codebooks, tensors) that an interrupted attempt had finished.
    """

    output: str
    file_bytes: int
    source_file_bytes: int
    digest: str | None
    bits_per_weight: Mapping[str, float]
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
    """Convert and write. The output is complete or not there, and the source is never touched.

    `on_warning` is told before the work what is known by then; the report has all warnings.

    A clustering that fails or is interrupted, by whatever, leaves what it has finished in a folder beside the output
    (`work_path`); the same call goes on from there, and ends with the same bytes. Raises what `prepare` does,
    OutputExistsError, StorageError, SelfTestError, WorkersLostError, and UnsupportedError if memory runs out.
    """
    started = time.perf_counter()
    fmt = output_format(options.to, options.gguf_type)
    check_apart([output], [source_path, *options.files()])
    try:
        fmt.check_output(output, force=force)
    except OutputExistsError:
        _remove_finished_work(output)
        raise
    # Tells early what cannot be done; what sensitivities decide waits until the source has been checked and they are measured.
    prepared = prepare(source_path, options, measure=False)
    fmt.check_model(prepared.model)
    warnings = list(prepared.warnings)
    for warning in warnings:
        on_warning(warning)
    model = prepared.model
    record: Mapping[str, Any] | None = None
    curves: dict[str, Curve] = {}

    def self_test(written: Model) -> Mapping[str, Any] | None:
        nonlocal record
        record = model.self_test or record_self_test(written, warnings, on_progress)
        return record

    with contextlib.ExitStack() as unfinished:
        unfinished.enter_context(memory_faults(_MEMORY_REMEDY))
        unfinished.enter_context(torch_threads(options.torch_threads))
        work = unfinished.enter_context(work_folder(output)) if prepared.plan is not None else None
        _check_space(output, prepared, work)
        if prepared.plan is None:
            scan_dense(model, source_path, on_progress)
            run_own_self_test(model, source_path, warnings, on_progress)
        elif work is not None:
            with _opened(options, on_progress) as workers:
                model = _clustered(prepared, source_path, options, fmt, work, workers, curves, warnings, on_progress)
        unfinished.enter_context(faults_of(source_path))
        written = fmt.write(
            model,
            output,
            force=force,
            self_test=self_test,
            on_progress=on_progress,
        )
    return ConversionReport(
        output=str(output),
        file_bytes=written.file_bytes,
        source_file_bytes=prepared.source_file_bytes,
        digest=written.digest,
        bits_per_weight=model_sizes(model).bits_per_weight(),
        self_test=record is not None,
        curves={name: finite_curve(curve) for name, curve in curves.items() if curve},
        reused=work.reused if work is not None else 0,
        seconds=time.perf_counter() - started,
        warnings=tuple(warnings),
    )


def _opened(options: ConversionOptions, on_progress: Progress) -> contextlib.AbstractContextManager[Workers | None]:
    """The workers that are asked for, if any."""
    if options.workers is None:
        return contextlib.nullcontext()
    computing = Computing(options.method, options.seed, options.threads, options.device)
    return open_workers(parse_workers(options.workers), computing, on_progress)


def _clustered(
    prepared: Prepared,
    source_path: Path,
    options: ConversionOptions,
    fmt: Format,
    work: WorkFolder,
    workers: Workers | None,
    curves: dict[str, Curve],
    warnings: list[str],
    on_progress: Progress,
) -> Model:
    """The model to write, with its provenance: what it was made from, and how. Fills `curves` and `warnings`, if need be not
    before it is read."""
    source, text, plan = prepared.source, prepared.text, prepared.plan
    levels = levels_of("fast") if text is None else options.levels()
    provenance = provenance_of(source, options, text, scan_source(source, source_path, on_progress))
    kept, deleted = work.begin(fingerprint(provenance))
    if kept:
        on_progress(f"resuming with {kept} finished parts", kept, kept)
    if deleted:
        warnings.append("the unfinished work of a conversion of another source or with other options was discarded")
    sensitivities = sensitivities_of(source, options, text, work, on_progress)
    if sensitivities is not None or plan is None:
        plan = make_plan(source, options, fmt, provenance, sensitivities)
    energies = feedback = None
    token_ids: Sequence[int] = ()
    if text is not None:
        token_ids = calibration_tokens(source, text)
        seen = levels.seen(token_ids)
        context = calibration_context(source, options.calibration_context)
        energies = _energies(source, calibration_windows(seen, ENERGY_WINDOWS, context), work, on_progress)
        if levels.block_by_block:
            importance = None
            # What has no head makes no predictions that rows could matter to: all count alike.
            if levels.feedback and decoder_description(source) is not None:
                few = calibration_windows(seen, WINDOWS, context)
                importance = _importance(source, few, work, options.seed, on_progress)
            feedback = ErrorFeedback(
                source,
                calibration_windows(seen, levels.windows, context),
                levels.blockwise,
                feedback=levels.feedback,
                importance=importance,
                curves=curves,
                device=options.device,
                on_progress=on_progress,
            )
    model = cluster_model(
        source,
        plan,
        method=options.method,
        seed=options.seed,
        threads=options.threads,
        device=options.device,
        energies=energies,
        feedback=feedback,
        provenance=provenance,
        work=work,
        workers=workers,
        on_progress=on_progress,
    )
    if levels.recovery is not None:
        trainable = TrainableModel(model, device=check_device(options.device))
        return _recovered(trainable, source, token_ids, levels.recovery, work, curves, warnings, on_progress)
    return model


def _recovered(
    trainable: TrainableModel,
    source: Model,
    token_ids: Sequence[int],
    options: RecoveryOptions,
    work: WorkFolder,
    curves: dict[str, Curve],
    warnings: list[str],
    on_progress: Progress,
) -> Model:
    """The model after recovery training, unless an earlier attempt has done it."""
    arrays = work.load("recovery", trainable.forms() | {"curve": curve_form(options.most_checks)})
    if arrays is None:
        result = recover(trainable, source, token_ids, options, on_progress, work=work)
        if result.stopped is not None:
            warnings.append(f"recovery: {result.stopped}")
        arrays = {**result.values, "curve": curve_array(result.curve, options.most_checks)}
        work.save("recovery", arrays)
    curves["recovery"] = curve_entries(arrays["curve"])
    return trainable.with_values({name: values for name, values in arrays.items() if name != "curve"})


def _energies(source: Model, windows: torch.Tensor, work: WorkFolder, on_progress: Progress) -> Mapping[str, AnyArray]:
    """`channel_energies`, computed unless an earlier attempt has done so."""
    forms = {name: ("float32", (tensor.shape[1],)) for name, tensor in source.tensors.items() if len(tensor.shape) == 2}

    def measure() -> Mapping[str, AnyArray]:
        return channel_energies(source, windows, on_progress)

    return _kept(work, "energies", forms, measure)


def _importance(
    source: Model, windows: torch.Tensor, work: WorkFolder, seed: int, on_progress: Progress
) -> Mapping[str, AnyArray]:
    """`row_importance`, computed unless an earlier attempt has done so."""
    forms = {name: ("float32", (rows,)) for name, rows in block_matrices(source).items()}

    def measure() -> Mapping[str, AnyArray]:
        return row_importance(source, windows, seed=seed, on_progress=on_progress)

    return _kept(work, "row importance", forms, measure)


def _kept(work: WorkFolder, unit: str, forms: Forms, compute: Callable[[], Mapping[str, AnyArray]]) -> Mapping[str, AnyArray]:
    """The arrays of a unit of work, computed unless they were before."""
    arrays: Mapping[str, AnyArray] | None = work.load(unit, forms)
    if arrays is None:
        arrays = compute()
        work.save(unit, arrays)
    return arrays


def _remove_finished_work(output: Path) -> None:
    """Remove the work folder of the conversion that made `output`, if it was killed after that and before it could."""
    if os.path.isdir(work_path(output)):  # noqa: PTH112 - Path.is_dir raises
        with contextlib.suppress(ClusCompError):
            remove_work(output, fingerprint(open_source(output).provenance))


def _check_space(output: Path, prepared: Prepared, work: WorkFolder | None) -> None:
    """Refuse early what would run out of space at the end: the artefact and, until it is there, the unfinished work."""
    needed = max(peak.disk for peak in prepared.memory)
    if work is not None:
        needed = max(prepared.sizes.payload_bytes, needed - work.stored_bytes())
    free = shutil.disk_usage(output.parent).free
    if free < needed:
        found, expected = f"{free / 1e6:.1f} MB free", f"{needed / 1e6:.1f} MB for the artefact and the work on it"
        raise StorageError(
            Problem("no_space", "not enough space", str(output), None, found, expected, "free some, or write elsewhere")
        )


def record_self_test(written: Model, warnings: list[str], on_progress: Progress) -> Mapping[str, Any] | None:
    """The self-test record of the model just written, or None where the runtime cannot run its architecture."""
    on_progress("recording the self-test", 0, 1)
    try:
        record = make_self_test(written)
    except UnsupportedError as error:
        warnings.append(f"no self-test record: {error.problems[0].message}")
        return None
    on_progress("recording the self-test", 1, 1)
    return record


def run_own_self_test(source: Model, path: Path, warnings: list[str], on_progress: Progress) -> None:
    """Hold a clustered source against its own self-test record, which goes with it: what it does not compute is not passed on.

    Warns where the runtime cannot run its architecture. Raises SelfTestError, InvalidFileError for a malformed record.
    """
    if source.self_test is None:
        return
    on_progress("running the source's self-test", 0, 1)
    try:
        with faults_of(path):
            report = check_against_weights(source, source.self_test)
    except UnsupportedError as error:
        warnings.append(f"the source's self-test was not run: {error.problems[0].message}")
        return
    on_progress("running the source's self-test", 1, 1)
    if not report.ok:
        message = "the source does not compute what its self-test record says"
        found = f"logits off by {report.max_difference:.3g}, float32 tolerance {source.self_test['tolerance']['float32']:.3g}"
        expected = f"rounding explains {report.tolerance:.3g}"
        remedy = "get a sound copy, or convert the original model anew"
        raise SelfTestError(Problem("self_test_failed", message, str(path), None, found, expected, remedy))


@contextlib.contextmanager
def faults_of(source: Path) -> Iterator[None]:
    """Have errors about a model's content, which writers and the runtime find, say where the model was read."""
    try:
        yield
    except (InvalidFileError, SelfTestError) as error:
        raise type(error)([replace(problem, file=problem.file or str(source)) for problem in error.problems]) from error
