"""Decide, before any work, how each tensor is stored: which (cluster_dim, num_clusters), which codebook, or dense.

`candidates` knows what a codebook takes and how much it errs, `allocation` finds the best choice at a size or a loss,
`targets` turns what was asked for into such a choice, `plan` is the result and `plan_file` its file.
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
