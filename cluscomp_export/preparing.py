"""From options to a plan: what contradicts itself, what has to be measured, what the artefact will take."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from cluscomp_export.clustering import cluster_model
from cluscomp_export.planning import Plan, Sensitivity, embedding_tensors, plan_bits, plan_budget, plan_fixed, plan_loss
from cluscomp_export.planning.plan_file import plan_value, read_plan
from cluscomp_export.progress import Progress
from cluscomp_export.sensitivity import measure_sensitivities, sensitive_tensors, sensitivity_windows
from cluscomp_export.work_folder import WorkFolder
from cluscomp_export.writers import Writer
from cluscomp_formats.errors import InvalidRequestError, Problem, UnsupportedError
from cluscomp_formats.ir import AnyArray, Model, canonical_json
from cluscomp_formats.version import __version__
from cluscomp_runtime.selftest import longest_record

if TYPE_CHECKING:
    from cluscomp_export.convert import ConversionOptions

__all__ = ["check_targets", "make_plan", "provenance_of", "sensitivities_of"]

DEFAULT_BITS = 4.0


def check_targets(options: ConversionOptions, writer: Writer) -> None:
    """Refuse targets of a plan that contradict each other. Raises InvalidRequestError."""
    problem = None
    targets = [option for option, value in options.targets().items() if value is not None]
    if len(targets) > 1:
        found = " ".join(targets)
        problem = Problem("bad_option", "these options exclude each other", found=found, remedy="give one of them")
    elif targets and options.cluster_dim is not None:
        found = f"{targets[0]} --dim {options.cluster_dim}"
        remedy = f"give either {targets[0]} or --dim and --clusters"
        problem = Problem("bad_option", f"{targets[0]} and --dim/--clusters exclude each other", found=found, remedy=remedy)
    elif targets and targets[0] != "--bits" and options.embedding_bits is not None:
        remedy = "drop --embedding-bits, or give --bits"
        message = f"{targets[0]} says what becomes of the embedding, too"
        problem = Problem("bad_option", message, found=f"{targets[0]} --embedding-bits", remedy=remedy)
    elif options.plan is not None and options.share is not None:
        problem = Problem("bad_option", "--plan says which codebooks are shared", found="--share", remedy="drop --share")
    elif options.sensitivity is not None and not options.allocates:
        remedy = "drop --sensitivity, or give --bits, --budget or --match-loss"
        problem = Problem("bad_option", "there is nothing to allocate", found="--sensitivity", remedy=remedy)
    elif options.calibration == "none" and (options.sensitivity == "measured" or options.match_loss is not None):
        remedy = "give a text"
        problem = Problem("bad_option", "a loss is predicted on a calibration text", found="--calibration none", remedy=remedy)
    elif options.match_loss is not None and (options.sensitivity == "equal" or not 0 < options.match_loss < math.inf):
        found, expected = f"{options.match_loss:g}", "a positive number, and measured sensitivities"
        problem = Problem("bad_option", "--match-loss cannot be predicted", found=found, expected=expected)
    elif options.budget is not None and (writer.size is None or options.gguf_type is not None):
        remedy = "convert with --bits, or to packed, hf, gguf or onnx"
        message = "the size in this format does not follow from codebooks, or cannot be predicted"
        problem = Problem("bad_option", message, found=f"--budget --to {options.to}", remedy=remedy)
    if problem:
        raise InvalidRequestError(problem)


def provenance_of(source: Model, options: ConversionOptions, text: str | None, digest: str) -> dict[str, Any]:
    """What a conversion records: the source, of that digest, and all options that determine the result."""
    recorded = options.recorded()
    if text is not None:
        recorded["calibration"] = f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"
    if options.plan is not None:
        plan = canonical_json(plan_value(read_plan(options.plan, source)))
        recorded["plan"] = f"sha256:{hashlib.sha256(plan.encode()).hexdigest()}"
    recorded["effort"] = options.effort or ("fast" if text is None else "balanced")
    return {
        "tool": "cluscomp-export",
        "version": __version__,
        "source": {**source.provenance, "digest": digest},
        "options": recorded,
    }


def sensitivities_of(
    source: Model,
    options: ConversionOptions,
    text: str | None,
    work: WorkFolder | None,
    warnings: list[str],
    on_progress: Progress,
) -> Mapping[str, Sensitivity] | None:
    """How much each tensor matters, unless no plan is to be made from it; computed unless an earlier attempt has done so."""
    if not options.allocates or options.sensitivity == "equal" or text is None:
        return None
    names = sensitive_tensors(source)
    forms = {key: ("float64", (len(names),)) for key in ("relative", "flat")}
    forms |= {f"rows {name}": ("float32", (source.tensors[name].shape[0],)) for name in names}
    found = None if work is None else work.load("sensitivities", forms)
    if found is not None:
        pairs = zip(names, found["relative"].tolist(), found["flat"].tolist(), strict=True)
        return {name: Sensitivity(found[f"rows {name}"], relative, flat) for name, relative, flat in pairs}
    try:
        sensitivities = measure_sensitivities(
            source, sensitivity_windows(source, text), seed=options.seed, on_progress=on_progress
        )
    except (InvalidRequestError, UnsupportedError) as error:
        if options.sensitivity == "measured" or options.match_loss is not None:
            raise
        warnings.append(f"planned as if every weight mattered alike: {error.problems[0].message}")
        return None
    if work is not None:
        arrays: dict[str, AnyArray] = {f"rows {name}": sensitivities[name].rows for name in names}
        arrays["relative"] = np.array([sensitivities[name].relative for name in names])
        arrays["flat"] = np.array([sensitivities[name].flat for name in names])
        work.save("sensitivities", arrays)
    return sensitivities


def make_plan(
    source: Model,
    options: ConversionOptions,
    writer: Writer,
    provenance: Mapping[str, Any],
    sensitivities: Mapping[str, Sensitivity] | None,
) -> Plan:
    if options.plan is not None:
        return read_plan(options.plan, source)
    if options.budget is not None and writer.size is not None:
        size, record = writer.size, longest_record(source)

        def size_of(plan: Plan) -> int:
            return size(replace(cluster_model(source, plan, provenance=provenance), self_test=record))

        return plan_budget(source, budget=options.budget, size_of=size_of, share=options.share, sensitivities=sensitivities)
    if options.match_loss is not None and sensitivities is not None:
        return plan_loss(source, loss=options.match_loss, share=options.share, sensitivities=sensitivities)
    stored = source.provenance.get("stored_bits", {})
    embedding_bits = options.embedding_bits
    if embedding_bits is None:
        embedding_bits = max((stored.get(name, 16.0) for name in embedding_tensors(source)), default=16.0)
    if options.cluster_dim is not None and options.num_clusters is not None:
        return plan_fixed(
            source,
            cluster_dim=options.cluster_dim,
            num_clusters=options.num_clusters,
            share=options.share or "none",
            embedding_bits=embedding_bits,
        )
    return plan_bits(
        source,
        bits=options.bits or DEFAULT_BITS,
        share=options.share,
        embedding_bits=embedding_bits,
        sensitivities=sensitivities,
    )
