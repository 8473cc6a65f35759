"""Checks of the operands of the compressed linear operator, made before any kernel reads their memory."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["check_codebook", "check_codes", "check_epilogue", "check_input"]

CODEBOOK_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int8)
MAX_CLUSTERS = 65536


def check_codebook(codebook: Tensor) -> None:
    """Check that the codebook is float32, float16, bfloat16 or int8 `[num_clusters, cluster_dim]` with 1 to 65536 clusters.

    Raises TypeError if the dtype is wrong, ValueError if the shape is wrong.
    """
    if codebook.dtype not in (*CODEBOOK_DTYPES, torch.float64):
        raise TypeError(f"codebook is {codebook.dtype}, expected float32, float16, bfloat16 or int8")
    if codebook.dim() != 2 or not 1 <= codebook.shape[0] <= MAX_CLUSTERS or codebook.shape[1] < 1:
        shape = tuple(codebook.shape)
        raise ValueError(f"codebook has shape {shape}, expected [num_clusters, cluster_dim], 1 to {MAX_CLUSTERS} clusters")


def check_codes(codes: Tensor, cluster_dim: int, out_features: int) -> None:
    """Check that the codes are uint16 `[in_features, ceil(out_features / cluster_dim)]`.

    Raises TypeError if the dtype is wrong, ValueError if the shape is wrong.
    """
    if codes.dtype != torch.uint16:
        raise TypeError(f"codes are {codes.dtype}, expected torch.uint16")
    groups = -(-out_features // cluster_dim)
    if out_features < 1 or codes.dim() != 2 or codes.shape[1] != groups:
        raise ValueError(
            f"codes have shape {tuple(codes.shape)}, expected [in_features, {groups}] "
            f"for {out_features} out_features in vectors of {cluster_dim}"
        )


def check_epilogue(out_features: int, row_scale: Tensor | None, bias: Tensor | None) -> None:
    """Check that `row_scale` and `bias` are floating-point `[out_features]` or None.

    Raises TypeError if a dtype is wrong, ValueError if a shape is wrong.
    """
    for name, tensor in (("row_scale", row_scale), ("bias", bias)):
        if tensor is None:
            continue
        if not tensor.is_floating_point():
            raise TypeError(f"{name} is {tensor.dtype}, expected a floating-point tensor")
        if tensor.shape != (out_features,):
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected ({out_features},)")


def check_input(x: Tensor, in_features: int) -> None:
    """Check that `x` is floating-point `[..., in_features]`.

    Raises TypeError if the dtype is wrong, ValueError if the shape is wrong.
    """
    if not x.is_floating_point():
        raise TypeError(f"x is {x.dtype}, expected a floating-point tensor")
    if x.dim() == 0 or x.shape[-1] != in_features:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected [..., {in_features}]")
