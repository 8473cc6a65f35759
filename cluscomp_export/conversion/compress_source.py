"""The compression of a prepared source: check it, measure it on the calibration text, compress it, recover it.

Finished work is kept in a work folder, from which an interrupted conversion resumes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from cluscomp_export.calibration.activations import (
    MOMENT_WINDOWS,
    calibration_context,
    calibration_tokens,
    calibration_windows,
    channel_second_moments,
)
from cluscomp_export.calibration.fisher import WINDOWS, block_matrices
from cluscomp_export.calibration.row_importance import row_importance
from cluscomp_export.calibration.runnable import decoder_description
from cluscomp_export.compression.fit_encode import Computing
from cluscomp_export.compression.pipeline import BlockByBlock, compress
from cluscomp_export.compression.workers.base import Workers, parse_workers
from cluscomp_export.compression.workers.opening import open_workers
from cluscomp_export.conversion.finite_values import scan_source
from cluscomp_export.conversion.options import ConversionOptions
from cluscomp_export.conversion.prepare import Prepared, make_plan, provenance_of, sensitivities_of
from cluscomp_export.store import ArraySpecs, Store
from cluscomp_export.training import RecoveryOptions, TrainableModel, recover
from cluscomp_export.training.loop import Curve, curve_array, curve_entries, curve_specs
from cluscomp_export.work_folder import WorkFolder, fingerprint
from cluscomp_formats.format import Format
from cluscomp_formats.ir import AnyArray, Model
from cluscomp_formats.progress import Progress
from cluscomp_runtime.devices import check_device

__all__ = ["CompressedSource", "compress_source"]


@dataclass(frozen=True)
class CompressedSource:
    """A lazy model over the work folder, with its provenance; the loss curves of trainings by name; and warnings."""

    model: Model
    curves: Mapping[str, Curve]
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class _Measured:
    """What was measured on the calibration text."""

    token_ids: Sequence[int]
    moments: Mapping[str, AnyArray] | None
    blocks: BlockByBlock | None


def compress_source(
    prepared: Prepared,
    source_path: Path,
    options: ConversionOptions,
    fmt: Format,
    work: WorkFolder,
    on_progress: Progress,
) -> CompressedSource:
    """Compress the source as `prepared` says. Raises what `prepare`, `compress` and `recover` do."""
    source, text, phases = prepared.source, prepared.text, prepared.phases
    provenance = provenance_of(source, options, text, phases, scan_source(source, source_path, on_progress))
    warnings = _resume(work, fingerprint(provenance), on_progress)
    sensitivities = sensitivities_of(source, options, text, work, on_progress)
    plan = prepared.plan
    if sensitivities is not None or plan is None:
        plan = make_plan(source, options, phases, fmt, provenance, sensitivities)
    with _opened_workers(options, on_progress) as workers:
        measured = _measure(prepared, options, work, on_progress)
        compressed = compress(
            source,
            plan,
            computing=_computing(options),
            moments=measured.moments,
            blocks=measured.blocks,
            provenance=provenance,
            store=work,
            workers=workers,
            on_progress=on_progress,
        )
    curves = {f"block {index}": curve for index, curve in compressed.curves.items()}
    if phases.recovery is None:
        return CompressedSource(compressed.model, curves, tuple(warnings))
    trainable = TrainableModel(compressed.model, device=check_device(options.device))
    model, curve, stopped = _recover(trainable, source, measured.token_ids, phases.recovery, work, on_progress)
    warnings += [] if stopped is None else [f"recovery: {stopped}"]
    return CompressedSource(model, {**curves, "recovery": curve}, tuple(warnings))


def _resume(work: WorkFolder, conversion: str, on_progress: Progress) -> list[str]:
    """Keep the finished units of this conversion and discard those of another; returns a warning for the latter."""
    kept, deleted = work.begin(conversion)
    if kept:
        on_progress(f"resuming with {kept} finished units", kept, kept)
    return ["the unfinished work of a conversion of another source or with other options was discarded"] if deleted else []


def _computing(options: ConversionOptions) -> Computing:
    return Computing(options.method, options.seed, options.threads, options.device)


def _opened_workers(options: ConversionOptions, on_progress: Progress) -> contextlib.AbstractContextManager[Workers | None]:
    """The workers of the options, if any."""
    if options.workers is None:
        return contextlib.nullcontext()
    return open_workers(parse_workers(options.workers), _computing(options), on_progress)


def _measure(prepared: Prepared, options: ConversionOptions, work: Store, on_progress: Progress) -> _Measured:
    """Run the source on the calibration text, if there is one."""
    source, text, phases = prepared.source, prepared.text, prepared.phases
    if text is None:
        return _Measured((), None, None)
    token_ids = calibration_tokens(source, text)
    seen = phases.seen(token_ids)
    context = calibration_context(source, options.calibration_context)
    moments = _second_moments(source, calibration_windows(seen, MOMENT_WINDOWS, context), work, on_progress)
    if not phases.block_by_block:
        return _Measured(token_ids, moments, None)
    importance: Mapping[str, AnyArray] = {}
    # A model without a head makes no predictions that rows could matter to: all count alike.
    if phases.feedback and decoder_description(source) is not None:
        few = calibration_windows(seen, WINDOWS, context)
        importance = _importance(source, few, work, options.seed, on_progress)
    windows = calibration_windows(seen, phases.windows, context)
    return _Measured(token_ids, moments, BlockByBlock(windows, phases.feedback, importance, phases.blockwise))


def _second_moments(source: Model, windows: torch.Tensor, work: Store, on_progress: Progress) -> Mapping[str, AnyArray]:
    """`channel_second_moments`, measured unless an earlier attempt has done so."""
    specs = {name: ("float32", (tensor.shape[1],)) for name, tensor in source.tensors.items() if len(tensor.shape) == 2}
    return _kept(work, "energies", specs, lambda: channel_second_moments(source, windows, on_progress))


def _importance(source: Model, windows: torch.Tensor, work: Store, seed: int, on_progress: Progress) -> Mapping[str, AnyArray]:
    """`row_importance`, measured unless an earlier attempt has done so."""
    specs = {name: ("float32", source.tensors[name].shape[:1]) for name in block_matrices(source)}
    return _kept(work, "row importance", specs, lambda: row_importance(source, windows, seed=seed, on_progress=on_progress))


def _kept(work: Store, unit: str, specs: ArraySpecs, compute: Callable[[], Mapping[str, AnyArray]]) -> Mapping[str, AnyArray]:
    """The arrays of a unit of work, computed unless they are in the store."""
    arrays: Mapping[str, AnyArray] | None = work.load(unit, specs)
    if arrays is None:
        arrays = compute()
        work.save(unit, arrays)
    return arrays


def _recover(
    trainable: TrainableModel,
    source: Model,
    token_ids: Sequence[int],
    options: RecoveryOptions,
    work: Store,
    on_progress: Progress,
) -> tuple[Model, Curve, str | None]:
    """The model after recovery, trained unless an earlier attempt has done so; its loss curve; why training stopped early."""
    arrays = work.load("recovery", trainable.specs() | {"curve": curve_specs(options.most_checks)})
    stopped = None
    if arrays is None:
        result = recover(trainable, source, token_ids, options, on_progress, work=work)
        stopped = result.stopped
        arrays = {**result.values, "curve": curve_array(result.curve, options.most_checks)}
        work.save("recovery", arrays)
    values = {name: array for name, array in arrays.items() if name != "curve"}
    return trainable.with_values(values), curve_entries(arrays["curve"]), stopped
