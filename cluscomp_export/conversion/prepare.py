"""From options to a plan: check the options, measure what the plan needs, predict sizes and memory."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from cluscomp_export.calibration.activations import (
    calibration_context,
    calibration_tokens,
    calibration_windows,
    most_windows,
    read_text,
    shipped_text,
)
from cluscomp_export.calibration.fisher import WINDOWS
from cluscomp_export.calibration.runnable import calibration_fault, prediction_fault
from cluscomp_export.calibration.sensitivity import measure_sensitivities, sensitive_tensors
from cluscomp_export.conversion.effort import FAST, Phases, phases_of
from cluscomp_export.conversion.finite_values import scan_source
from cluscomp_export.conversion.memory import Peak, conversion_memory, memory_warnings, process_bytes
from cluscomp_export.conversion.option_checks import check_options
from cluscomp_export.conversion.options import ConversionOptions
from cluscomp_export.conversion.output_format import output_format
from cluscomp_export.conversion.tokenizer_warnings import tokenizer_warnings
from cluscomp_export.conversion.where_to_run import nowhere_to_run
from cluscomp_export.planning import (
    Plan,
    Sensitivity,
    Terms,
    embedding_tensors,
    plan_bits,
    plan_budget,
    plan_fixed,
    plan_loss,
)
from cluscomp_export.planning.machines import DEFAULT_MACHINE, Machine, shipped_machine
from cluscomp_export.planning.plan_file import plan_value, read_plan
from cluscomp_export.planning.planned_model import planned_model
from cluscomp_export.planning.sizes import Sizes, model_sizes
from cluscomp_export.planning.speed import PredictedSpeed, predicted_speed
from cluscomp_export.planning.this_machine import THIS_MACHINE, this_machine
from cluscomp_export.sources import CONFIG_ONLY, files_left_behind, open_source, source_bytes
from cluscomp_export.store import Store
from cluscomp_export.threads import torch_threads
from cluscomp_formats.errors import ClusCompError, InvalidRequestError, Problem
from cluscomp_formats.format import Format
from cluscomp_formats.ir import AnyArray, Model
from cluscomp_formats.progress import Progress, silent
from cluscomp_formats.sections.digest import NO_DIGEST
from cluscomp_formats.strict_json import canonical_json
from cluscomp_formats.version import __version__
from cluscomp_runtime.devices import check_device
from cluscomp_runtime.memory import memory_faults
from cluscomp_runtime.selftest import longest_record

__all__ = ["Prepared", "make_plan", "prepare", "provenance_of", "sensitivities_of"]

DEFAULT_BITS = 4.0
HALVING = {"size": 0.0, None: 0.1, "speed": 0.5}
"""Bits per weight that half the time for a token is worth, by `optimize`."""
EMBEDDING_MARGIN = 2.1
"""With so many bits more than the linear layers, embedding and head add a few percent to the divergence (docs/results.md). The
last tenth has room for scales and codebook, beside codes of two bits more."""
LEAST_EMBEDDING_BITS = 4.0
"""Below, the divergence rises steeply, whatever the linear layers have."""
LARGE_SHARE = 0.1
"""Share of the weights from which a warning says that they are not clustered."""
MAX_NAMED = 8
"""Most files that a warning names."""


@dataclass(frozen=True)
class Prepared:
    """A conversion that has been planned.

    `text` is the calibration text, if any; `phases` are those of the compression. `plan` is None if a clustered source is only
    repacked. `model` is the planned model, with shapes only, or that source. `file_bytes` is the size of the artefact, at most;
    None if the format cannot tell. `speed` is predicted for the machine of the options. `sensitivities` are those of the plan,
    None if all weights counted alike. `memory` is what each phase needs, at most, in addition to the `process_bytes` of the
    process itself.
    """

    source: Model
    text: str | None
    phases: Phases
    plan: Plan | None
    model: Model
    sizes: Sizes
    file_bytes: int | None
    source_file_bytes: int
    speed: PredictedSpeed
    sensitivities: Mapping[str, Sensitivity] | None
    memory: tuple[Peak, ...]
    process_bytes: int
    warnings: tuple[str, ...]


@memory_faults("run it again with more memory free")
def prepare(
    source_path: Path,
    options: ConversionOptions,
    on_progress: Progress = silent,
    *,
    to_plan: bool = False,
    measure: bool = True,
) -> Prepared:
    """Open, measure what the plan needs, and plan.

    With `to_plan`, only a plan is wanted: the source may be a folder with a `config.json` and no weights, and the device may be
    that of another machine. Only shapes are read, unless the plan needs sensitivities. Without `measure`, the plan is made as
    if all weights counted alike.

    Raises InvalidRequestError for options that contradict each other or a budget that cannot be met, InvalidFileError,
    UnsupportedError.
    """
    fmt = output_format(options.to, options.gguf_type)
    check_options(options, fmt)
    if not to_plan:
        check_device(options.device)
    source = open_source(source_path, to_plan=to_plan)
    if source.clustered and options.asks_clustering:
        remedy = "convert the original model, or leave out the clustering options to repack this one"
        raise InvalidRequestError(
            Problem("already_clustered", "the source is clustered already", str(source_path), remedy=remedy)
        )
    text, without_text = (None, None) if source.clustered else _calibration_text(source, options)
    phases = FAST if text is None else phases_of(options)
    context = calibration_context(source, options.calibration_context)
    plan = sensitivities = None
    model = source
    if not source.clustered:
        provenance = provenance_of(source, options, text, phases, NO_DIGEST)
        if measure and options.measures:
            scan_source(source, source_path, on_progress)
        if measure:
            with torch_threads(options.torch_threads):
                sensitivities = sensitivities_of(source, options, text, None, on_progress)
        plan = make_plan(source, options, phases, fmt, provenance, sensitivities)
        model = planned_model(source, plan, provenance)
    sizes = model_sizes(model)
    record = model.self_test or longest_record(source)
    artefact = None if fmt.size is None else fmt.size(replace(model, self_test=record))
    speed = predicted_speed(model, _machine(options))
    only_config = source.provenance.get("format") == CONFIG_ONLY
    source_size = model_sizes(source).payload_bytes if only_config else source_bytes(source_path)
    process = process_bytes(measures=options.measures, phases=None if plan is None else phases)
    memory = conversion_memory(
        source,
        model,
        plan,
        output_bytes=sizes.payload_bytes if artefact is None else artefact,
        calibrated=text is not None,
        measures=options.measures,
        phases=phases,
        windows=most_windows(text or "", phases.windows, context),
        context=context,
        cuda=options.device.startswith("cuda"),
    )
    warnings = [] if without_text is None else [without_text]
    warnings += [] if only_config else tokenizer_warnings(source)
    warnings += [*fmt.notes(model), *_warnings(sizes, source_size), *_file_warnings(source, source_path)]
    warnings += memory_warnings(memory, options.device, process)
    warnings += _plan_warnings(source, options, model) if plan is not None else []
    return Prepared(
        source, text, phases, plan, model, sizes, artefact, source_size, speed, sensitivities, memory, process, tuple(warnings)
    )


def _calibration_text(source: Model, options: ConversionOptions) -> tuple[str | None, str | None]:
    """The calibration text, or None; with a warning if the source cannot be run on the text and no option requires it.

    If an option requires it, raises the error that says why the source cannot be run, with a remedy that names the option.
    """
    phases = phases_of(options)
    if options.calibration == "none":
        return None, None
    if options.calibration is None and options.dim is not None and not phases.needs_text:
        # The paper's setting needs no text.
        return None, None
    text = shipped_text() if options.text_file is None else read_text(options.text_file)
    required_by = {
        "`match_loss`": options.match_loss is not None,
        "`sensitivity`": options.sensitivity == "measured",
        "`calibration`": options.calibration is not None,
        "`effort` and its options": phases.needs_text and options.asks_phases,
    }
    fault = calibration_fault(source, text)
    if fault is not None:
        _refuse(fault, required_by, "matrices are then clustered without a calibration text, as with `effort='fast'`")
        return None, f"clustered without a calibration text: {fault.problems[0].message}"
    without = prediction_fault(source)
    if without is not None:
        required_by["`calibration`"] = required_by["`effort` and its options"] = False
        required_by["recovery, as in `effort='best'`"] = phases.recovery is not None
        _refuse(without, required_by, "`effort='balanced'` and `bits` need no predictions")
    return text, None


def _refuse(fault: ClusCompError, required_by: Mapping[str, bool], instead: str) -> None:
    named = [option for option, given in required_by.items() if given]
    if named:
        remedy = f"leave out {' and '.join(named)}: {instead}"
        raise type(fault)([replace(problem, remedy=remedy) for problem in fault.problems])


def provenance_of(source: Model, options: ConversionOptions, text: str | None, phases: Phases, digest: str) -> dict[str, Any]:
    """The provenance of a conversion: the source with its digest, and all options that determine the result."""
    recorded = options.recorded()
    if text is not None:
        recorded["calibration"] = f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"
    if options.machine == THIS_MACHINE:
        recorded["machine"] = this_machine().value()
    if options.plan_file is not None:
        plan = canonical_json(plan_value(read_plan(options.plan_file, source)))
        recorded["plan"] = f"sha256:{hashlib.sha256(plan.encode()).hexdigest()}"
    return {
        "tool": "cluscomp-export",
        "version": __version__,
        "source": {**source.provenance, "digest": digest},
        "options": {**recorded, **phases.recorded()},
    }


def sensitivities_of(
    source: Model, options: ConversionOptions, text: str | None, store: Store | None, on_progress: Progress
) -> Mapping[str, Sensitivity] | None:
    """The sensitivity of each tensor, if the plan needs it; measured unless an earlier attempt has done so.

    Raises what `measure_sensitivities` and `calibration_tokens` do.
    """
    if not options.measures or text is None:
        return None
    names = sensitive_tensors(source)
    specs = {key: ("float64", (len(names),)) for key in ("relative", "flat")}
    found = None if store is None else store.load("sensitivities", specs)
    if found is not None:
        pairs = zip(names, found["relative"].tolist(), found["flat"].tolist(), strict=True)
        return {name: Sensitivity(relative, flat) for name, relative, flat in pairs}
    context = calibration_context(source, options.calibration_context)
    windows = calibration_windows(phases_of(options).seen(calibration_tokens(source, text)), WINDOWS, context)
    sensitivities = measure_sensitivities(source, windows, seed=options.seed, on_progress=on_progress)
    if store is not None:
        arrays: dict[str, AnyArray] = {
            "relative": np.array([sensitivities[name].relative for name in names]),
            "flat": np.array([sensitivities[name].flat for name in names]),
        }
        store.save("sensitivities", arrays)
    return sensitivities


def make_plan(
    source: Model,
    options: ConversionOptions,
    phases: Phases,
    fmt: Format,
    provenance: Mapping[str, Any],
    sensitivities: Mapping[str, Sensitivity] | None,
) -> Plan:
    """The plan for the target of the options; `provenance` is part of the artefact, whose size may be limited.

    Raises InvalidRequestError for a target that cannot be met, InvalidFileError for an invalid plan file, UnsupportedError if
    there is nothing to cluster.
    """
    if options.plan_file is not None:
        return read_plan(options.plan_file, source)
    share, codebook_bits = options.share, options.codebook_bits
    if codebook_bits is None and phases.recovery is not None:
        # Recovery moves most values by less than a step of int8.
        codebook_bits = 16
    terms = Terms(_machine(options), phases.feedback)
    # Recovery is asked for the least divergence, and small codebooks have more codes for it to hold.
    halving = 0.0 if options.optimize is None and phases.recovery is not None else HALVING[options.optimize]
    if options.budget_bytes is not None and fmt.size is not None:
        size, record = fmt.size, longest_record(source)

        def size_of(plan: Plan) -> int:
            return size(replace(planned_model(source, plan, provenance), self_test=record))

        return plan_budget(
            source,
            budget=options.budget_bytes,
            size_of=size_of,
            share=share,
            codebook_bits=codebook_bits,
            sensitivities=sensitivities,
            terms=terms,
            halving=halving,
        )
    if options.match_loss is not None and sensitivities is not None:
        return plan_loss(
            source,
            loss=options.match_loss,
            share=share,
            codebook_bits=codebook_bits,
            sensitivities=sensitivities,
            terms=terms,
            halving=halving,
        )
    embedding_bits = _embedding_bits(source, options)
    if options.dim is not None and options.clusters is not None:
        return plan_fixed(
            source,
            cluster_dim=options.dim,
            num_clusters=options.clusters,
            share=share or "none",
            embedding_bits=embedding_bits,
            codebook_bits=codebook_bits,
            terms=terms,
            halving=halving,
        )
    return plan_bits(
        source,
        bits=options.bits or DEFAULT_BITS,
        share=share,
        embedding_bits=embedding_bits,
        codebook_bits=codebook_bits,
        sensitivities=sensitivities,
        terms=terms,
        halving=halving,
    )


def _machine(options: ConversionOptions) -> Machine:
    return this_machine() if options.machine == THIS_MACHINE else shipped_machine(options.machine or DEFAULT_MACHINE)


def _embedding_bits(source: Model, options: ConversionOptions) -> float:
    """The most bits per weight of embedding and head.

    By default their width in the source; with `bits`, at most `EMBEDDING_MARGIN` more than the linear layers have.
    """
    if options.embedding_bits is not None:
        return options.embedding_bits
    stored = source.provenance.get("stored_bits", {})
    width: float = max((stored.get(name, 16.0) for name in embedding_tensors(source)), default=16.0)
    if options.dim is not None:
        return width
    return min(width, max(LEAST_EMBEDDING_BITS, (options.bits or DEFAULT_BITS) + EMBEDDING_MARGIN))


def _plan_warnings(source: Model, options: ConversionOptions, model: Model) -> list[str]:
    """Warnings about weights that the plan does not cluster, and about a result that nothing can run."""
    warnings = []
    if options.embedding_bits is not None and not embedding_tensors(source):
        warnings.append("`embedding_bits` has no effect: no tensor has the name of an embedding or a head")
    left = {name: tensor.num_weights for name, tensor in model.tensors.items() if len(tensor.shape) > 2}
    share = sum(left.values()) / max(1, sum(tensor.num_weights for tensor in model.tensors.values()))
    if share > LARGE_SHARE:
        first = next(iter(left))
        warnings.append(
            f"{share:.0%} of the weights are in tensors of more than two dimensions, which stay dense: {first}, ..."
        )
    nowhere = nowhere_to_run(model)
    return warnings if nowhere is None else [*warnings, nowhere]


def _file_warnings(source: Model, path: Path) -> list[str]:
    warnings = []
    left = files_left_behind(source, path)
    if left:
        more = f" and {len(left) - MAX_NAMED} more" if len(left) > MAX_NAMED else ""
        warnings.append(f"left out, because they are not known files of a model: {', '.join(left[:MAX_NAMED])}{more}")
    code = [name for name in source.files if name.endswith(".py")]
    if code:
        named = ", ".join(code[:MAX_NAMED])
        warnings.append(
            f"the artefact contains the model's own code ({named}): it is not run here; transformers runs it only if trusted"
        )
    return warnings


def _warnings(sizes: Sizes, source_file_bytes: int) -> list[str]:
    warnings = []
    if sizes.payload_bytes > source_file_bytes:
        dense = (
            "; `embedding_bits=8` or 4 clusters the embedding and the head" if sizes.all_bits > 2 * sizes.linear_bits else ""
        )
        warnings.append(
            f"the artefact ({sizes.payload_bytes / 1e6:.1f} MB) will be larger than the source "
            f"({source_file_bytes / 1e6:.1f} MB): use fewer `bits`{dense}"
        )
    return warnings
