"""What a plan says about itself: per tensor its sensitivity, setting, size and share of the predicted loss, and the totals."""

from __future__ import annotations

from typing import Any

from cluscomp_export.conversion.prepare import Prepared
from cluscomp_export.planning.sizes import tensor_rows

__all__ = ["explain"]


def explain(prepared: Prepared) -> dict[str, Any]:
    """The report as a JSON value.

    `tensors` are the rows of `tensor_rows`, for clustered ones also `codebook_bits` per value, `expected_error` (squared,
    relative) and, where sensitivities were measured, `sensitivity` (nats per token for a relative squared error of 1), `loss`
    (nats per token) and `loss_share`. `predicted_loss` is the sum of the losses, before error feedback and training; None where
    nothing was measured.
    `file_bytes` is what the artefact will take at most, None where the format cannot tell; `memory` what each phase of the
    conversion needs at most, beside the `process_bytes` of the process itself.
    """
    plan, sensitivities = prepared.plan, prepared.sensitivities
    rows = tensor_rows(prepared.model)
    total = 0.0
    for row in rows:
        name = row["name"]
        if sensitivities is not None and name in sensitivities:
            scaled = plan is None or name not in plan.treatments or plan.treatments[name].row_scale
            row["sensitivity"] = sensitivities[name].cost(row_scale=scaled)
        if plan is not None and name in plan.treatments:
            row["codebook_bits"] = plan.treatments[name].codebook.value_bits
            row["expected_error"] = plan.expected_error(name)
            if "sensitivity" in row:
                row["loss"] = row["sensitivity"] * row["expected_error"]
                total += row["loss"]
    for row in rows:
        if "loss" in row:
            row["loss_share"] = row["loss"] / total if total else 0.0
    books = [] if plan is None else [{**vars(book), "members": len(book.members)} for book in plan.codebooks]
    return {
        "bits_per_weight": prepared.sizes.bits_per_weight(),
        "payload_bytes": prepared.sizes.payload_bytes,
        "file_bytes": prepared.file_bytes,
        "source_file_bytes": prepared.source_file_bytes,
        "memory": [vars(peak) for peak in prepared.memory],
        "process_bytes": prepared.process_bytes,
        "predicted_loss": None if sensitivities is None else total,
        "warnings": prepared.warnings,
        "codebooks": books,
        "tensors": rows,
    }
