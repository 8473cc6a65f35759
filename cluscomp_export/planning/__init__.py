"""Decide, before the long job, how each tensor is stored: which (cluster_dim, num_clusters), which codebook, or dense.

`candidates` has the size and expected error of a codebook. `allocation` finds the best choice for a size or a loss, `targets`
turns the options into such a choice. `plan` is the result, `plan_file` its file.
"""

from cluscomp_export.planning.candidates import CLUSTER_DIMS, CODEBOOK_DTYPES, Sensitivity, expected_error
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
    "embedding_tensors",
    "expected_error",
    "plan_bits",
    "plan_budget",
    "plan_fixed",
    "plan_loss",
]
