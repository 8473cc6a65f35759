"""Turn a language model into a ClusComp codebook model: convert, plan, inspect, verify, evaluate, bench, tune and merge.

    from cluscomp_export import convert

    report = convert("model/", "model.clus", bits=3)

The functions are those of `cluscomp_export.api`. Reports and errors are imported when they are first asked for, so that
importing this package is cheap.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

import cluscomp_kernels  # noqa: F401 - first: it sets how torch's threads wait, before torch is loaded
from cluscomp_export.api import (
    ConversionKeywords,
    TuneKeywords,
    bench,
    convert,
    evaluate,
    evaluate_tasks,
    inspect,
    inspect_delta,
    merge,
    open_source,
    plan,
    plan_tuning,
    tune,
    verify,
)
from cluscomp_formats.errors import (
    ClusCompError,
    InvalidFileError,
    InvalidRequestError,
    OutputExistsError,
    Problem,
    SelfTestError,
    StorageError,
    UnsupportedError,
    WorkersLostError,
)
from cluscomp_formats.progress import Progress
from cluscomp_formats.version import __version__

if TYPE_CHECKING:
    from cluscomp_export.benchmarking.bench import Speed
    from cluscomp_export.conversion.convert import ConversionReport
    from cluscomp_export.conversion.merge import MergeReport
    from cluscomp_export.conversion.plan_report import PlanReport
    from cluscomp_export.evaluation.evaluate import Evaluation, TaskEvaluation
    from cluscomp_export.inspection.inspect import DeltaInspection, Inspection
    from cluscomp_export.inspection.verify import Verification
    from cluscomp_export.training.finetuning import TunePlan, TuneReport

__all__ = [
    "ClusCompError",
    "ConversionKeywords",
    "ConversionReport",
    "DeltaInspection",
    "Evaluation",
    "Inspection",
    "InvalidFileError",
    "InvalidRequestError",
    "MergeReport",
    "OutputExistsError",
    "PlanReport",
    "Problem",
    "Progress",
    "SelfTestError",
    "Speed",
    "StorageError",
    "TaskEvaluation",
    "TuneKeywords",
    "TunePlan",
    "TuneReport",
    "UnsupportedError",
    "Verification",
    "WorkersLostError",
    "__version__",
    "bench",
    "convert",
    "evaluate",
    "evaluate_tasks",
    "inspect",
    "inspect_delta",
    "merge",
    "open_source",
    "plan",
    "plan_tuning",
    "tune",
    "verify",
]

_REPORTS = {
    "ConversionReport": "conversion.convert",
    "DeltaInspection": "inspection.inspect",
    "Evaluation": "evaluation.evaluate",
    "Inspection": "inspection.inspect",
    "MergeReport": "conversion.merge",
    "PlanReport": "conversion.plan_report",
    "Speed": "benchmarking.bench",
    "TaskEvaluation": "evaluation.evaluate",
    "TunePlan": "training.finetuning",
    "TuneReport": "training.finetuning",
    "Verification": "inspection.verify",
}
"""Where each report is defined. These modules import torch, which takes seconds."""


def __getattr__(name: str) -> Any:
    if name not in _REPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_REPORTS[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
