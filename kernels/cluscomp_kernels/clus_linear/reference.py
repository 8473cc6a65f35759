"""Reference of the compressed linear operator in a few lines of torch; every other implementation is tested against it.

`codebook` is `[num_clusters, cluster_dim]`, `codes` is `[in_features, ceil(out_features / cluster_dim)]`. Code `(i, g)` selects
the vector `W[g * cluster_dim : (g + 1) * cluster_dim, i]` of `W [out_features, in_features]`; values after out_features are cut
off (ClusComp, arXiv 2503.13089).
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["decode", "linear"]


def decode(codebook: Tensor, codes: Tensor, out_features: int) -> Tensor:
    """Return `W^T [in_features, out_features]` in the dtype of the codebook. Raises IndexError if a code >= num_clusters."""
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
    """Return `(x @ W^T) * row_scale + bias` for `x [..., in_features]`, computed in the dtype of `x`."""
    y = x @ decode(codebook, codes, out_features).to(x.dtype)
    if row_scale is not None:
        y = y * row_scale.to(x.dtype)
    return y if bias is None else y + bias.to(x.dtype)
