"""The Triton kernels of the compressed linear operator and their torch operator `cluscomp::linear_triton`.

Importing this module imports triton, so only the triton path imports it. Codes stay canonical `[in_features, groups]`:
neighbouring threads read neighbouring groups. Codebook rows are padded to a power of two, so that a row is one aligned vector
load. A large codebook (512 KB and more) stays in the L2 cache, not in shared memory.

Numeric contract: up to FUSED_TOKENS tokens, products of `x` and weights are accumulated in float32 over a fixed partition of
the input channels. A second kernel adds the partial sums in a fixed order (no atomics), applies `row_scale` and `bias` and
rounds once, so every run gives the same result. With more tokens, the weight is decoded to the dtype of `x` and torch
multiplies.

If one of `x` and codebook is float16 and the other bfloat16, each float16 value is split into two bfloat16 values for the
tensor cores. Their sum is exact (`bfloat16_parts`), so the contract holds, at the cost of a second instruction.

Triton launches on the current device, not on that of the operands, so each launch is inside `torch.cuda.device_of`.
"""

# ruff: noqa: N803 (compile-time constants of a kernel are upper case)
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cluscomp_kernels.clus_linear.library import define_operator
from cluscomp_kernels.clus_linear.operands import check_input

__all__ = ["FUSED_TOKENS", "decode_dense", "linear_triton"]

FUSED_TOKENS = 16
"""Rows of the smallest tensor-core tile; with more tokens, the weight is decoded first."""
TILE_VALUES = 64
"""Outputs of one program, including padding."""
CHANNELS = 32
"""Input channels that a program processes at a time."""
TARGET_PROGRAMS = 512
"""Number of programs that keeps a large GPU busy; the input channels are split until there are as many."""

FUSION: dict[str, Any] = {"enable_fp_fusion": True}
"""Use fused multiply-adds. Set explicitly because Triton's default depends on its version."""


@triton.jit  # type: ignore[untyped-decorator]
def gathered_weight(codes, codebook, channel, group, in_features, groups, ROW: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return decoded values `[channels, groups, ROW]` in the dtype of the codebook; 0 outside the weight."""
    inside = (channel[:, None] < in_features) & (group[None, :] < groups)
    offset = channel[:, None].to(tl.int64) * groups + group[None, :]
    code = tl.load(codes + offset, mask=inside, other=0).to(tl.int32)
    lane = tl.arange(0, ROW)
    address = codebook + code[:, :, None] * ROW + lane[None, None, :]
    return tl.load(address, mask=inside[:, :, None], other=0.0)


@triton.jit
def bfloat16_parts(value):  # type: ignore[no-untyped-def]
    """Split a finite float16 value into two bfloat16 values: the first has 8 of its 11 significant bits, the second 3."""
    high = value.to(tl.bfloat16)
    low = (value.to(tl.float32) - high.to(tl.float32)).to(tl.bfloat16)
    return high, low


@triton.jit  # type: ignore[untyped-decorator]
def one_token_kernel(  # type: ignore[no-untyped-def]
    x, codes, codebook, partial, in_features, groups, channels_per_split,
    ROW: tl.constexpr, GROUPS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """partial[split, groups * ROW] = sum over the channels of the split of x[channel] * weight."""
    group = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    split = tl.program_id(1)
    begin = split * channels_per_split
    end = tl.minimum(begin + channels_per_split, in_features)
    total = tl.zeros([CHANNELS, GROUPS, ROW], dtype=tl.float32)
    for first in range(begin, end, CHANNELS):
        channel = first + tl.arange(0, CHANNELS)
        weight = gathered_weight(codes, codebook, channel, group, end, groups, ROW)
        factor = tl.load(x + channel, mask=channel < end, other=0.0).to(tl.float32)
        total += factor[:, None, None] * weight.to(tl.float32)
    lane = tl.arange(0, ROW)
    offset = split.to(tl.int64) * groups * ROW + group[:, None] * ROW + lane[None, :]
    tl.store(partial + offset, tl.sum(total, axis=0), mask=group[:, None] < groups)


@triton.jit  # type: ignore[untyped-decorator]
def few_tokens_kernel(  # type: ignore[no-untyped-def]
    x, codes, codebook, partial, tokens, in_features, groups, channels_per_split,
    ROW: tl.constexpr, GROUPS: tl.constexpr, CHANNELS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """partial[split, tokens, groups * ROW] of several tokens, on tensor cores if `x` and the codebook have 16 bits."""
    group = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    split = tl.program_id(1)
    begin = split * channels_per_split
    end = tl.minimum(begin + channels_per_split, in_features)
    token = tl.arange(0, TOKENS)
    total = tl.zeros([TOKENS, GROUPS * ROW], dtype=tl.float32)
    for first in range(begin, end, CHANNELS):
        channel = first + tl.arange(0, CHANNELS)
        weight = gathered_weight(codes, codebook, channel, group, end, groups, ROW)
        flat = tl.reshape(weight, [CHANNELS, GROUPS * ROW])
        inside = (token[:, None] < tokens) & (channel[None, :] < end)
        factor = tl.load(x + token[:, None] * in_features + channel[None, :], mask=inside, other=0.0)
        if factor.dtype == flat.dtype:
            total = tl.dot(factor, flat, total, input_precision="ieee")
        elif factor.dtype == tl.bfloat16 and flat.dtype == tl.float16:
            high, low = bfloat16_parts(flat)
            total = tl.dot(factor, low, total)
            total = tl.dot(factor, high, total)
        elif factor.dtype == tl.float16 and flat.dtype == tl.bfloat16:
            high, low = bfloat16_parts(factor)
            total = tl.dot(low, flat, total)
            total = tl.dot(high, flat, total)
        else:
            total = tl.dot(factor.to(tl.float32), flat.to(tl.float32), total, input_precision="ieee")
    value = tl.program_id(0) * GROUPS * ROW + tl.arange(0, GROUPS * ROW)
    offset = (split.to(tl.int64) * tokens + token[:, None]) * groups * ROW + value[None, :]
    tl.store(partial + offset, total, mask=(token[:, None] < tokens) & (value[None, :] < groups * ROW))


@triton.jit  # type: ignore[untyped-decorator]
def finish_kernel(  # type: ignore[no-untyped-def]
    partial, row_scale, bias, y, splits, tokens, values, out_features,
    DIM: tl.constexpr, ROW: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y[token, out] = (sum over splits of partial[split, token, value of out]) * row_scale + bias."""
    out = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    token = tl.program_id(1)
    inside = out < out_features
    value = out // DIM * ROW + out % DIM
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for split in range(splits):
        total += tl.load(partial + (split * tokens + token).to(tl.int64) * values + value, mask=inside, other=0.0)
    if HAS_SCALE:
        total *= tl.load(row_scale + out, mask=inside, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias + out, mask=inside, other=0.0)
    tl.store(y + token.to(tl.int64) * out_features + out, total.to(y.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def decode_kernel(  # type: ignore[no-untyped-def]
    codes, codebook, dense, in_features, groups, out_features,
    DIM: tl.constexpr, ROW: tl.constexpr, GROUPS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """dense[in_features, out_features] = W^T."""
    group = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    weight = gathered_weight(codes, codebook, channel, group, in_features, groups, ROW)
    lane = tl.arange(0, ROW)
    out = (group[:, None] * DIM + lane[None, :])[None, :, :]
    inside = (channel[:, None, None] < in_features) & (lane[None, None, :] < DIM) & (out < out_features)
    offset = channel[:, None, None].to(tl.int64) * out_features + out
    tl.store(dense + offset, weight.to(dense.dtype.element_ty), mask=inside)


def _groups_per_program(row: int) -> int:
    return max(1, TILE_VALUES // row)


def decode_dense(codes: Tensor, codebook: Tensor, out_features: int, cluster_dim: int, dtype: torch.dtype) -> Tensor:
    """Return `W^T [in_features, out_features]` in `dtype`, without row scale."""
    in_features, groups = codes.shape
    row = codebook.shape[1]
    dense = torch.empty((in_features, out_features), dtype=dtype, device=codes.device)
    per_program = _groups_per_program(row)
    grid = (triton.cdiv(groups, per_program), triton.cdiv(in_features, CHANNELS))
    if dense.numel():
        with torch.cuda.device_of(codes):  # type: ignore[no-untyped-call]
            decode_kernel[grid](
                codes, codebook, dense, in_features, groups, out_features,
                DIM=cluster_dim, ROW=row, GROUPS=per_program, CHANNELS=CHANNELS, **FUSION,
            )  # fmt: skip
    return dense


def _split(in_features: int, programs: int) -> tuple[int, int]:
    """Return `(splits, channels per split)`; the latter is a multiple of CHANNELS."""
    blocks = max(1, triton.cdiv(in_features, CHANNELS))
    blocks_per_split = triton.cdiv(blocks, min(blocks, max(1, TARGET_PROGRAMS // programs)))
    return triton.cdiv(blocks, blocks_per_split), blocks_per_split * CHANNELS


def linear_triton(
    x: Tensor,
    codes: Tensor,
    codebook: Tensor,
    row_scale: Tensor | None,
    bias: Tensor | None,
    out_features: int,
    cluster_dim: int,
) -> Tensor:
    """Return `(x @ W^T) * row_scale + bias` in the dtype of `x`.

    `codebook` is padded to `[num_clusters, row]`; `row_scale` and `bias` are float32 `[out_features]` or None.
    """
    check_input(x, codes.shape[0])
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    tokens, (in_features, groups) = flat.shape[0], codes.shape
    if tokens > FUSED_TOKENS:
        y = flat @ decode_dense(codes, codebook, out_features, cluster_dim, x.dtype)
        if row_scale is not None:
            y = (y * row_scale).to(x.dtype)
        if bias is not None:
            y = (y + bias).to(x.dtype)
        return y.reshape(*x.shape[:-1], out_features)
    y = torch.empty((*x.shape[:-1], out_features), dtype=x.dtype, device=x.device)
    if tokens == 0:
        return y
    row = codebook.shape[1]
    per_program = _groups_per_program(row)
    programs = triton.cdiv(groups, per_program)
    splits, channels_per_split = _split(in_features, programs)
    partial = torch.empty((splits, tokens, groups * row), dtype=torch.float32, device=x.device)
    sizes: dict[str, Any] = {"ROW": row, "GROUPS": per_program, "CHANNELS": CHANNELS, **FUSION}
    operands = (flat, codes, codebook, partial)
    block = 256
    with torch.cuda.device_of(codes):  # type: ignore[no-untyped-call]
        if tokens == 1:
            one_token_kernel[(programs, splits)](*operands, in_features, groups, channels_per_split, **sizes)
        else:
            few_tokens_kernel[(programs, splits)](
                *operands, tokens, in_features, groups, channels_per_split, TOKENS=FUSED_TOKENS, **sizes
            )
        finish_kernel[(triton.cdiv(out_features, block), tokens)](
            partial,
            partial if row_scale is None else row_scale,
            partial if bias is None else bias,
            y, splits, tokens, groups * row, out_features,
            DIM=cluster_dim, ROW=row, HAS_SCALE=row_scale is not None, HAS_BIAS=bias is not None, BLOCK=block, **FUSION,
        )  # fmt: skip
    return y


def _meta(
    x: Tensor,
    codes: Tensor,
    codebook: Tensor,
    row_scale: Tensor | None,
    bias: Tensor | None,
    out_features: int,
    cluster_dim: int,
) -> Tensor:
    check_input(x, codes.shape[0])
    return x.new_empty((*x.shape[:-1], out_features))


define_operator(
    "linear_triton(Tensor x, Tensor codes, Tensor codebook, Tensor? row_scale, Tensor? bias, int out_features, int cluster_dim)"
    " -> Tensor",
    "CUDA",
    linear_triton,
    _meta,
)
