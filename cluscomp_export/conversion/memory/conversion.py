"""The phases of a conversion in order, with the memory that each needs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from cluscomp_export.calibration.runnable import decoder_description
from cluscomp_export.conversion.effort import Phases
from cluscomp_export.conversion.memory.blocks import (
    calibration,
    embedding,
    error_feedback,
    recovery,
    row_importance,
    self_test,
    sensitivities,
    tuning,
)
from cluscomp_export.conversion.memory.matrices import checking, encoding, fitting, writing
from cluscomp_export.planning import Plan
from cluscomp_export.sources.linears import block_index
from cluscomp_formats.ir import Model
from cluscomp_runtime.devices import device_bytes
from cluscomp_runtime.memory import physical_bytes

__all__ = ["LIBRARY_BYTES", "PROCESS_BYTES", "Peak", "conversion_memory", "memory_warnings", "process_bytes"]

LIBRARY_BYTES = 210_000_000
"""Pages of torch's and other libraries that a process maps. How many depends on how the system's cache holds their files: 107
to 198 MB were seen of the same conversion. The system takes them back when memory is short."""

PROCESS_BYTES = 230_000_000 + LIBRARY_BYTES
"""The process itself: the interpreter with torch, a tokenizer and the calibration text. Conversions of a model of 1 MB were
seen to take 326 to 403 MB, 191 to 219 of them their own. On a GPU the driver's context comes on top of both columns."""

GRADIENT_BYTES = 50_000_000
"""What torch loads on top when first asked for gradients: sensitivities, row importance."""

OPTIMIZER_BYTES = 190_000_000
"""What torch loads on top for its first optimizer, its compiler and 133 MB of further library pages included: block-wise
tuning, recovery."""

CONTEXT_BYTES = 500_000_000
"""Approximate size of the driver's context of a process, on the GPU and on the host."""

HEAP_BYTES = 48 << 20
"""What the allocator may keep of arrays that are gone (`return_freed_arrays` bounds it), and what libraries need for their
products: several times 8 MB. The same conversion took 270 to 300 MB in a dozen runs."""


@dataclass(frozen=True)
class Peak:
    """The most bytes a phase needs at a time on each place; `host` and `device` without the process itself.

    `disk` is what the conversion occupies by the end of the phase: the kept work and the output.
    """

    phase: str
    device: int
    host: int
    disk: int


def conversion_memory(
    source: Model,
    model: Model,
    plan: Plan | None,
    *,
    output_bytes: int,
    calibrated: bool,
    measures: bool = False,
    phases: Phases,
    windows: int,
    context: int,
    cuda: bool = False,
) -> tuple[Peak, ...]:
    """The phases of a conversion in their order.

    `model` is the `planned_model(source, plan)`, or the source itself where it is only repacked (`plan=None`);
    `output_bytes` the size of what is written. `calibrated` says whether there is a calibration text, of which blocks see as
    many `windows` of `context` tokens, `measures` whether sensitivities are measured on it, `cuda` whether the device is one.
    """
    if plan is None:
        return tuple(_with_heap([("writing", 0, writing(source, model), output_bytes), *_self_test(model, output_bytes)]))
    description, predicts = decoder_description(source, head=False), decoder_description(source) is not None
    rows: list[tuple[str, int, int, int]] = [("checking the source", 0, checking(source), 0)]
    disk = 0
    if measures and description is not None and predicts:
        rows.append(("sensitivities", 0, sensitivities(source, description, context), disk))
    if calibrated and description is not None:
        disk = sum(4 * tensor.shape[1] for tensor in source.tensors.values() if len(tensor.shape) == 2)
        rows.append(("calibration", 0, calibration(source, description, windows, context), disk))
        if phases.feedback:
            disk += sum(4 * tensor.shape[0] for name, tensor in source.tensors.items() if block_index(name) is not None)
            if predicts:
                rows.append(("row importance", 0, row_importance(source, description, context), disk))
    sizes = _unit_bytes(model)
    disk += sizes["codebooks"]
    rows.append(("fitting codebooks", *fitting(source, plan, calibrated=calibrated, cuda=cuda), disk))
    disk += sizes["tensors"]
    if description is None or not phases.block_by_block:
        rows.append(("choosing codes", *encoding(source, plan, cuda=cuda), disk + output_bytes))
    else:
        rows.append(("error feedback", *error_feedback(source, model, plan, description, windows, context, cuda=cuda), disk))
        if phases.blockwise is not None:
            # The values of a tuned block are kept beside those it started with.
            disk += sizes["codebooks"] + sizes["scales"]
            shared = [book.name for book in plan.codebooks if len({block_index(name) for name in book.members}) > 1]
            block, streams = tuning(model, description, phases.blockwise, windows, context, shared)
            device, host = (block, streams) if cuda else (0, block + streams)
            rows.append(("block-wise tuning", device, max(host, embedding(source, description, windows, context)), disk))
    if phases.recovery is not None and description is not None and predicts:
        rows.append(("recovery", *recovery(source, model, description, phases.recovery, cuda=cuda), disk))
    rows.append(("writing", 0, writing(source, model), disk + output_bytes))
    rows += _self_test(model, disk + output_bytes)
    return tuple(_with_heap(rows))


def process_bytes(*, measures: bool, phases: Phases | None) -> int:
    """The fixed part of a conversion on the host, which comes on top of every phase; `phases` is None where nothing is
    clustered. A small model takes little else."""
    trains = phases is not None and (phases.blockwise is not None or phases.recovery is not None)
    gradients = measures or trains or (phases is not None and phases.feedback)
    return PROCESS_BYTES + GRADIENT_BYTES * gradients + OPTIMIZER_BYTES * trains


def _with_heap(rows: list[tuple[str, int, int, int]]) -> Iterator[Peak]:
    """Small phases cannot leave more behind than they had."""
    for phase, device, host, disk in rows:
        yield Peak(phase, device, host + min(HEAP_BYTES, host), disk)


def memory_warnings(peaks: Sequence[Peak], device: str, process: int = PROCESS_BYTES) -> list[str]:
    """Warnings if this machine or its `device` has less memory than a phase may need in addition to the `process` itself."""
    on_host, on_device = max(peaks, key=lambda peak: peak.host), max(peaks, key=lambda peak: peak.device)
    places = [
        (on_host.phase, on_host.host + process, "this machine", physical_bytes()),
        (on_device.phase, on_device.device + CONTEXT_BYTES, device, device_bytes(device)),
    ]
    return [
        f"{phase} may need {needed / 1e9:.1f} GB of memory; {place} has {available / 1e9:.1f} GB"
        for phase, needed, place, available in places
        if available is not None and needed > available
    ]


def _self_test(model: Model, disk: int) -> list[tuple[str, int, int, int]]:
    description = decoder_description(model)
    return [] if description is None else [("self-test", 0, self_test(model, description), disk)]


def _unit_bytes(model: Model) -> dict[str, int]:
    """Bytes of the units of work on the disk, headers not counted: `codebooks`, `tensors`, and of these the `scales`."""
    weights = model.clustered.values()
    codes = sum(stage.codes.nbytes for weight in weights for stage in weight.stages)
    extras = sum(array.nbytes for weight in weights for _, array in weight.extra_arrays)
    return {
        "codebooks": sum(book.values.nbytes for book in model.codebooks.values()),
        "tensors": codes + extras,
        "scales": extras,
    }
