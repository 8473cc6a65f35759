"""`cluscomp::linear`: the operator on canonical codes, on any device, differentiable in everything but the codes.

Numeric contract: codebook rows are cast to the dtype of `x`; torch multiplies in that dtype, and `row_scale` and `bias` are
applied in it. The backward pass decodes the weight again instead of keeping it. It works on blocks of input channels, so it
needs a few times BLOCK_BYTES rather than a dense gradient. Gradients of the codebook and of `row_scale` are accumulated in
float32 (float64 for a float64 `x`). They are deterministic on a CPU; on CUDA, `index_add_` is deterministic only under
torch.use_deterministic_algorithms.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from cluscomp_kernels.clus_linear.library import define_operator, set_backward
from cluscomp_kernels.clus_linear.operands import check_codebook, check_codes, check_epilogue, check_input

__all__ = ["linear"]

BLOCK_BYTES = 64 << 20
"""Bytes of a block of decoded weight, and of its gradient, in the backward pass, at most."""


def linear(
    x: Tensor,
    codebook: Tensor,
    codes: Tensor,
    out_features: int,
    row_scale: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Return `(x @ W^T) * row_scale + bias` in the dtype of `x`, or in that of torch.autocast if enabled; differentiable.

    Shapes: `x [..., in_features]`, `codebook [num_clusters, cluster_dim]`, `codes` uint16
    `[in_features, ceil(out_features / cluster_dim)]`, `row_scale` and `bias` `[out_features]`.

    Raises TypeError if a dtype is wrong; ValueError if a shape is wrong; IndexError if a code is not below num_clusters (a
    device-side assertion on CUDA).
    """
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    result: Tensor = torch.ops.cluscomp.linear.default(x, codebook, codes, out_features, row_scale, bias)
    return result


def _check(
    x: Tensor, codebook: Tensor, codes: Tensor, out_features: int, row_scale: Tensor | None, bias: Tensor | None
) -> None:
    check_codebook(codebook)
    check_codes(codes, codebook.shape[1], out_features)
    check_input(x, codes.shape[0])
    check_epilogue(out_features, row_scale, bias)


def _decode(codebook: Tensor, codes: Tensor, out_features: int, dtype: torch.dtype) -> Tensor:
    """Return `W^T [in_features, out_features]`: a view of longer rows if out_features is not a multiple of cluster_dim."""
    vectors = codebook.to(dtype).index_select(0, codes.reshape(-1).to(torch.int32))
    return vectors.reshape(codes.shape[0], codes.shape[1] * codebook.shape[1])[:, :out_features]


def _forward(
    x: Tensor, codebook: Tensor, codes: Tensor, out_features: int, row_scale: Tensor | None, bias: Tensor | None
) -> Tensor:
    _check(x, codebook, codes, out_features, row_scale, bias)
    y = x @ _decode(codebook, codes, out_features, x.dtype)
    if row_scale is not None:
        y *= row_scale.to(x.dtype)
    if bias is not None:
        y += bias.to(x.dtype)
    return y


def _meta(
    x: Tensor, codebook: Tensor, codes: Tensor, out_features: int, row_scale: Tensor | None, bias: Tensor | None
) -> Tensor:
    _check(x, codebook, codes, out_features, row_scale, bias)
    return x.new_empty((*x.shape[:-1], out_features))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, codebook, codes, out_features, row_scale, bias = inputs
    ctx.save_for_backward(x, codebook, codes, row_scale)
    ctx.out_features = out_features
    ctx.bias_dtype = None if bias is None else bias.dtype


def _blocks(in_features: int, out_features: int, itemsize: int) -> Iterator[slice]:
    step = max(1, BLOCK_BYTES // (out_features * itemsize))
    return (slice(begin, min(begin + step, in_features)) for begin in range(0, in_features, step))


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, codebook, codes, row_scale = ctx.saved_tensors
    need_x, need_codebook, _, _, need_scale, need_bias = ctx.needs_input_grad
    out_features = ctx.out_features
    in_features, groups = codes.shape
    exact = torch.promote_types(x.dtype, torch.float32)
    flat_x, flat_grad = x.reshape(-1, in_features), grad.reshape(-1, out_features)
    scaled = flat_grad if row_scale is None or not need_x else flat_grad * row_scale.to(grad.dtype)

    grad_x = flat_x.new_empty(flat_x.shape) if need_x else None
    grad_codebook = codebook.new_zeros(codebook.shape, dtype=exact) if need_codebook else None
    grad_scale = grad.new_zeros(out_features, dtype=exact) if need_scale else None
    for block in _blocks(in_features, out_features, exact.itemsize):
        if grad_x is not None or grad_scale is not None:
            weight = _decode(codebook, codes[block], out_features, x.dtype)
        if grad_x is not None:
            grad_x[:, block] = scaled @ weight.t()
        if grad_codebook is not None or grad_scale is not None:
            dense = (flat_x[:, block].t() @ flat_grad).to(exact)
        if grad_scale is not None:
            grad_scale += (dense * weight).sum(0)
        if grad_codebook is not None:
            if row_scale is not None:
                dense *= row_scale.to(exact)
            past_end = groups * codebook.shape[1] - out_features
            vectors = torch.nn.functional.pad(dense, (0, past_end)).reshape(-1, codebook.shape[1])
            grad_codebook.index_add_(0, codes[block].reshape(-1).to(torch.int64), vectors)
    return (
        None if grad_x is None else grad_x.reshape(x.shape),
        None if grad_codebook is None else grad_codebook.to(codebook.dtype),
        None,
        None,
        None if row_scale is None or grad_scale is None else grad_scale.to(row_scale.dtype),
        flat_grad.sum(0, dtype=exact).to(ctx.bias_dtype) if need_bias else None,
    )


define_operator(
    "linear(Tensor x, Tensor codebook, Tensor codes, int out_features, Tensor? row_scale, Tensor? bias) -> Tensor",
    "CompositeExplicitAutograd",
    _forward,
    _meta,
)
set_backward("linear", _backward, _setup_context)
