"""The meaning of the compressed linear operator in a few lines of torch; everything else is tested against it.

`codebook [num_clusters, cluster_dim]` and `codes [in_features, ceil(out_features / cluster_dim)]`: vector `(i, g)` holds
`W[g * cluster_dim : (g + 1) * cluster_dim, i]` of `W [out_features, in_features]`; what reaches past out_features is cut off
(ClusComp, arXiv 2503.13089).
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["decode", "linear"]


def decode(codebook: Tensor, codes: Tensor, out_features: int) -> Tensor:
    """`W^T [in_features, out_features]` in the dtype of the codebook. Raises IndexError on a code past the codebook."""
    in_features, groups = codes.shape
    vectors = codebook[codes.to(torch.int64)]
    return vectors.reshape(in_features, groups * codebook.shape[1])[:, :out_features]


def linear(
    x: Tensor,
    codebook: Tensor,
    codes: Tensor,
    out_features: int,
    row_scale: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """`(x @ W^T) * row_scale + bias` for `x [..., in_features]`, computed in the dtype of `x`."""
    y = x @ decode(codebook, codes, out_features).to(x.dtype)
    if row_scale is not None:
        y = y * row_scale.to(x.dtype)
    return y if bias is None else y + bias.to(x.dtype)
