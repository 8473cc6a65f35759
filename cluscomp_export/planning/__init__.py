"""Decide, before the long job, how each tensor is stored: which (cluster_dim, num_clusters), which codebook, or dense.

`candidates` has the size, expected error and time of a codebook; times are those of a machine's profile (`machines`, `speed`).
`allocation` finds the best choice for a size or a loss, `targets` turns the options into such a choice. `plan` is the result,
`plan_file` its file.
"""

from cluscomp_export.planning.candidates import (
    CLUSTER_DIMS,
    CODEBOOK_DTYPES,
    Sensitivity,
    Terms,
    expected_error,
)
from cluscomp_export.planning.plan import CodebookPlan, Plan, Share, TensorScheme
from cluscomp_export.planning.targets import embedding_tensors, plan_bits, plan_budget, plan_fixed, plan_loss

__all__ = [
    "CLUSTER_DIMS",
    "CODEBOOK_DTYPES",
    "CodebookPlan",
    "Plan",
    "Sensitivity",
    "Share",
    "TensorScheme",
    "Terms",
    "embedding_tensors",
    "expected_error",
    "plan_bits",
    "plan_budget",
    "plan_fixed",
    "plan_loss",
]
