"""What a plan says about itself: per tensor its sensitivity, setting, size and share of the predicted loss, and the totals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cluscomp_export.conversion.prepare import Prepared
from cluscomp_export.planning.sizes import tensor_rows

__all__ = ["PlanReport", "explain"]


@dataclass(frozen=True)
class PlanReport:
    """How a source would be stored.

    `tensors` are the rows of `tensor_rows`; clustered ones also have `codebook_bits` per value, `expected_error` (squared,
    relative) and, where sensitivities were measured, `sensitivity` (nats per token for a relative squared error of 1), `loss`
    (nats per token) and `loss_share`. `predicted_loss` is the sum of the losses, before error feedback and training; None if
    nothing was measured. `file_bytes` is the size of the artefact, at most; None if the format cannot tell. `memory` is what
    each phase of the conversion needs, at most, in addition to the `process_bytes` of the process itself. `speed` is predicted:
    the fields of `planning.speed.PredictedSpeed`.
    """

    bits_per_weight: Mapping[str, float]
    payload_bytes: int
    file_bytes: int | None
    source_file_bytes: int
    memory: Sequence[Mapping[str, Any]]
    process_bytes: int
    speed: Mapping[str, Any]
    predicted_loss: float | None
    warnings: Sequence[str]
    codebooks: Sequence[Mapping[str, Any]]
    tensors: Sequence[Mapping[str, Any]]


def explain(prepared: Prepared) -> PlanReport:
    """The report of a plan."""
    plan, sensitivities = prepared.plan, prepared.sensitivities
    rows = tensor_rows(prepared.model)
    total = 0.0
    for row in rows:
        name = row["name"]
        if sensitivities is not None and name in sensitivities:
            scaled = plan is None or name not in plan.schemes or plan.schemes[name].row_scale
            row["sensitivity"] = sensitivities[name].cost(row_scale=scaled)
        if plan is not None and name in plan.schemes:
            row["codebook_bits"] = plan.schemes[name].codebook.value_bits
            row["expected_error"] = plan.expected_error(name, feedback=prepared.phases.feedback)
            if "sensitivity" in row:
                row["loss"] = row["sensitivity"] * row["expected_error"]
                total += row["loss"]
    for row in rows:
        if "loss" in row:
            row["loss_share"] = row["loss"] / total if total else 0.0
    books = [] if plan is None else [{**vars(book), "members": len(book.members)} for book in plan.codebooks]
    return PlanReport(
        bits_per_weight=prepared.sizes.bits_per_weight(prepared.file_bytes),
        payload_bytes=prepared.sizes.payload_bytes,
        file_bytes=prepared.file_bytes,
        source_file_bytes=prepared.source_file_bytes,
        memory=[vars(peak) for peak in prepared.memory],
        process_bytes=prepared.process_bytes,
        speed=vars(prepared.speed),
        predicted_loss=None if sensitivities is None else total,
        warnings=prepared.warnings,
        codebooks=books,
        tensors=rows,
    )
