"""Can the runtime or transformers run the result of a conversion?"""

from __future__ import annotations

from importlib.util import find_spec

from cluscomp_export.calibration.runnable import prediction_fault
from cluscomp_formats.ir import Model

__all__ = ["nowhere_to_run"]


def nowhere_to_run(model: Model) -> str | None:
    """Why neither the runtime nor transformers can run a clustered model; None if one can, or if that is unknown.

    For an architecture that the runtime does not know, this builds a transformers model without weights, which takes seconds.
    """
    ours = prediction_fault(model)
    if ours is None or find_spec("transformers") is None:
        return None
    # Imports transformers, which takes seconds.
    from cluscomp_export.evaluation.transformers_model import opening_fault

    theirs = opening_fault(model)
    if theirs is None:
        return None
    return f"nothing will run the result: in the runtime, {ours.problems[0].message}; in transformers, {theirs}"
