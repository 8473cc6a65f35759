"""The C kernels of the compressed linear operator and their torch operator `cluscomp::linear_tiled`.

Numeric contract: weights are widened to float32 without rounding. Products are accumulated in float32 with fused
multiply-adds (plain C may round twice), in the order of the input channels. The sum is multiplied by `row_scale`, then `bias`
is added, and the result is rounded once to the dtype of `x`. Up to FUSED_TOKENS tokens, a token's result depends neither on the
number of threads nor on the other tokens; with more tokens, the weight is decoded a few columns at a time and multiplied by
torch.

The best variant that the machine supports is used (AVX-512, AVX2 or plain C); the environment variable CLUSCOMP_CPU forces one.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cluscomp_kernels import native
from cluscomp_kernels.clus_linear.library import define_operator
from cluscomp_kernels.clus_linear.operands import check_input
from cluscomp_kernels.threads import kernel_threads

__all__ = [
    "LANES",
    "VARIANTS",
    "BoundWeight",
    "cpu_variant",
    "decode_tiled",
    "pad_codebook",
    "row_length",
    "rows_tiled",
    "tile_codes",
]

VARIANTS = ("plain", "avx2", "avx512")
"""Ordered by their numbers in linear.c."""
LANES = 64
"""Values per input channel of a tile: CC_LANES of clus_linear.h."""
FUSED_TOKENS = 32
"""With more tokens than this, torch multiplies by the decoded weight."""
DECODED_BYTES = 2 << 20
"""Bytes of float32 weight decoded at a time, at most."""

_VALUE_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


class _Weight(ctypes.Structure):
    """Mirrors cc_weight of linear.c, field by field."""

    _fields_ = (
        ("codes", ctypes.c_void_p),
        ("codebook", ctypes.c_void_p),
        ("row_scale", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("in_features", ctypes.c_int64),
        ("out_features", ctypes.c_int64),
        ("cluster_dim", ctypes.c_int32),
        ("row_log2", ctypes.c_int32),
        ("value_type", ctypes.c_int32),
        ("code_bytes", ctypes.c_int32),
        ("variant", ctypes.c_int32),
        ("threads", ctypes.c_int32),
    )


class _Functions(NamedTuple):
    supported: Callable[..., int]
    tile: Callable[..., int]
    linear: Callable[..., None]
    decode: Callable[..., None]
    rows: Callable[..., None]


@functools.cache
def _functions() -> _Functions:
    pointer, int64, int32, weight = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.POINTER(_Weight)
    return _Functions(
        supported=native.function("cc_clus_supported", [int32], int32),
        tile=native.function("cc_clus_tile", [pointer, int64, int64, int64, int32, pointer, int32], int32),
        linear=native.function("cc_clus_linear", [weight, pointer, int64, pointer]),
        decode=native.function("cc_clus_decode", [weight, int64, int64, pointer, int64]),
        rows=native.function("cc_clus_rows", [weight, pointer, int64, pointer]),
    )


@functools.cache
def _variant_number(forced: str | None) -> int:
    available = [name for number, name in enumerate(VARIANTS) if _functions().supported(number)]
    name = forced or available[-1]
    if name not in available:
        raise ValueError(f"CLUSCOMP_CPU={name} is not available on this machine; available: {', '.join(available)}")
    return VARIANTS.index(name)


def cpu_variant() -> str:
    """Return the variant in use, one of VARIANTS. Raises ValueError if CLUSCOMP_CPU names one that is not available."""
    return VARIANTS[_variant_number(os.environ.get("CLUSCOMP_CPU"))]


def row_length(cluster_dim: int) -> int:
    """Return the length of a padded codebook row: the next power of two. Raises ValueError unless 1 <= cluster_dim <= LANES."""
    if not 1 <= cluster_dim <= LANES:
        raise ValueError(f"the native kernels support a cluster_dim of 1 to {LANES}, got {cluster_dim}; use path='reference'")
    return int(1 << (cluster_dim - 1).bit_length())


def pad_codebook(codebook: Tensor) -> Tensor:
    """Return the codebook padded with zeros to `[rows, row_length]`, contiguous.

    The dtype is kept (float64 becomes float32). `rows` is num_clusters, or at least 256 if rows have one element: some
    processors hold such a codebook in registers.
    """
    rows, cluster_dim = codebook.shape
    row = row_length(cluster_dim)
    dtype = codebook.dtype if codebook.dtype in _VALUE_TYPES else torch.float32
    padded = torch.zeros((max(rows, 256) if row == 1 else rows, row), dtype=dtype)
    padded[:rows, :cluster_dim] = codebook
    return padded


def tile_codes(codes: Tensor, num_clusters: int, cluster_dim: int) -> Tensor:
    """Return uint16 codes `[in_features, groups]` as `[tiles, in_features, groups_per_tile]`, uint8 if num_clusters <= 256.

    Contiguous `codes` are read without a copy. Raises ValueError if a code is not below num_clusters.
    """
    in_features, groups = codes.shape
    per_tile = LANES // row_length(cluster_dim)
    narrow = num_clusters <= 256
    tiled = torch.empty((-(-groups // per_tile), in_features, per_tile), dtype=torch.uint8 if narrow else torch.uint16)
    source = codes.contiguous()
    code_bytes = 1 if narrow else 2
    threads = kernel_threads()
    largest = _functions().tile(source.data_ptr(), in_features, groups, per_tile, code_bytes, tiled.data_ptr(), threads)
    if largest >= num_clusters:
        raise ValueError(f"codes go up to {largest}, but the codebook has only {num_clusters} clusters")
    return tiled


def _weight(
    codes: Tensor, codebook: Tensor, row_scale: Tensor | None, bias: Tensor | None, out_features: int, cluster_dim: int
) -> _Weight:
    per_tile = codes.shape[2]
    row = codebook.shape[1]
    fits = row * per_tile == LANES and row >> 1 < cluster_dim <= row and (row > 1 or codebook.shape[0] >= 256)
    if not (fits and codes.shape[0] * per_tile * cluster_dim >= out_features > 0):
        raise ValueError(
            f"tiled codes {tuple(codes.shape)} and padded codebook {tuple(codebook.shape)} do not make {out_features} "
            f"out_features in vectors of {cluster_dim}; use tile_codes() and pad_codebook()"
        )
    for name, tensor in (("row_scale", row_scale), ("bias", bias)):
        if tensor is not None and not (
            tensor.dtype == torch.float32 and tensor.shape == (out_features,) and tensor.is_contiguous()
        ):
            raise ValueError(f"{name} must be contiguous float32 [{out_features}]")
    if not (codes.is_contiguous() and codebook.is_contiguous()):
        raise ValueError("tiled codes and padded codebook must be contiguous")
    return _Weight(
        codes.data_ptr(),
        codebook.data_ptr(),
        None if row_scale is None else row_scale.data_ptr(),
        None if bias is None else bias.data_ptr(),
        codes.shape[1],
        out_features,
        cluster_dim,
        row.bit_length() - 1,
        _VALUE_TYPES[codebook.dtype],
        1 if codes.dtype == torch.uint8 else 2,
        _variant_number(os.environ.get("CLUSCOMP_CPU")),
        kernel_threads(),
    )


def _linear_tiled(
    x: Tensor,
    codes: Tensor,
    codebook: Tensor,
    row_scale: Tensor | None,
    bias: Tensor | None,
    out_features: int,
    cluster_dim: int,
) -> Tensor:
    check_input(x, codes.shape[1])
    weight = _weight(codes, codebook, row_scale, bias, out_features, cluster_dim)
    flat = x.reshape(-1, x.shape[-1]).to(torch.float32).contiguous()
    tokens = flat.shape[0]
    y = torch.empty((*x.shape[:-1], out_features), dtype=torch.float32)
    if tokens <= FUSED_TOKENS:
        _functions().linear(weight, flat.data_ptr(), tokens, y.data_ptr())
        return y.to(x.dtype)
    rows = y.view(tokens, out_features)
    for begin, dense in _decoded_columns(weight, codes.shape[0]):
        torch.mm(flat, dense, out=rows[:, begin : begin + dense.shape[1]])
    if row_scale is not None:
        rows.mul_(row_scale)
    if bias is not None:
        rows.add_(bias)
    return y.to(x.dtype)


class BoundWeight:
    """Operands of `cluscomp::linear_tiled`, checked once, for calls that bypass the dispatcher and autograd.

    Decoding a token makes hundreds of calls of tens of microseconds each, so the overhead per call matters.
    """

    def __init__(
        self,
        codes: Tensor,
        codebook: Tensor,
        row_scale: Tensor | None,
        bias: Tensor | None,
        out_features: int,
        cluster_dim: int,
    ) -> None:
        self._operands = (codes, codebook, row_scale, bias)  # keeps the memory of the pointers alive
        self._weight = _weight(codes, codebook, row_scale, bias, out_features, cluster_dim)
        self._in_features = codes.shape[1]
        self._out_features = out_features
        self._linear = _functions().linear

    def supports(self, x: Tensor) -> bool:
        """Return whether `linear` may be called: `x` is a plain contiguous float32 CPU tensor of few tokens, not traced."""
        return (
            type(x) is Tensor
            and x.dtype is torch.float32
            and x.is_cpu
            and x.is_contiguous()
            and x.dim() > 0
            and x.shape[-1] == self._in_features
            and x.numel() <= FUSED_TOKENS * self._in_features
            and not torch.compiler.is_compiling()
        )

    def linear(self, x: Tensor) -> Tensor:
        """Return the result of the operator for an `x` that `supports` accepts."""
        shape = x.shape
        y = torch.empty((*shape[:-1], self._out_features), dtype=torch.float32)
        self._weight.threads = kernel_threads()
        self._linear(self._weight, x.data_ptr(), shape[:-1].numel(), y.data_ptr())
        return y


def _decoded_columns(weight: _Weight, tiles: int) -> Any:
    """Yield `(first output, W^T[:, outputs])` for consecutive ranges of outputs; the buffer is reused."""
    per_tile = (LANES >> weight.row_log2) * weight.cluster_dim
    step = max(1, DECODED_BYTES // (4 * per_tile * max(1, weight.in_features)))
    for first in range(0, tiles, step):
        last = min(first + step, tiles)
        begin, end = first * per_tile, min(last * per_tile, weight.out_features)
        if end <= begin:
            return
        dense = torch.empty((weight.in_features, end - begin), dtype=torch.float32)
        _functions().decode(weight, first, last, dense.data_ptr(), end - begin)
        yield begin, dense


def decode_tiled(codes: Tensor, codebook: Tensor, out_features: int, cluster_dim: int) -> Tensor:
    """Return `W^T [in_features, out_features]` in float32, without row scale."""
    weight = _weight(codes, codebook, None, None, out_features, cluster_dim)
    dense = torch.empty((codes.shape[1], out_features), dtype=torch.float32)
    _functions().decode(weight, 0, -(-out_features // (codes.shape[2] * cluster_dim)), dense.data_ptr(), out_features)
    return dense


def rows_tiled(
    ids: Tensor, codes: Tensor, codebook: Tensor, row_scale: Tensor | None, out_features: int, cluster_dim: int
) -> Tensor:
    """Return `W[ids]`, float32 `[..., in_features]`, times the row scale. Raises IndexError unless 0 <= ids < out_features."""
    flat = ids.reshape(-1).to(torch.int64).contiguous()
    if flat.numel() and not (int(flat.min()) >= 0 and int(flat.max()) < out_features):
        raise IndexError(f"ids go from {int(flat.min())} to {int(flat.max())}, expected 0 to {out_features - 1}")
    rows = torch.empty((*ids.shape, codes.shape[1]), dtype=torch.float32)
    weight = _weight(codes, codebook, row_scale, None, out_features, cluster_dim)
    _functions().rows(weight, flat.data_ptr(), flat.numel(), rows.data_ptr())
    return rows


def _linear_tiled_meta(
    x: Tensor,
    codes: Tensor,
    codebook: Tensor,
    row_scale: Tensor | None,
    bias: Tensor | None,
    out_features: int,
    cluster_dim: int,
) -> Tensor:
    check_input(x, codes.shape[1])
    return x.new_empty((*x.shape[:-1], out_features))


define_operator(
    "linear_tiled(Tensor x, Tensor codes, Tensor codebook, Tensor? row_scale, Tensor? bias, int out_features, int cluster_dim)"
    " -> Tensor",
    "CPU",
    _linear_tiled,
    _linear_tiled_meta,
)
