"""The structures of the engine's headers, field by field, and its functions."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

from cluscomp_kernels import native

__all__ = ["Branch", "Decoder", "Functions", "Linear", "Matrix", "Norm", "functions"]

_pointer, _i32, _i64, _f32 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_float


class Matrix(ctypes.Structure):
    """`cc_matrix` of matrix.h."""

    _fields_: ClassVar = [
        ("codes", _pointer),
        ("entries", _pointer),
        ("row_scale", _pointer),
        ("bias", _pointer),
        ("unit", _pointer),
        ("in_features", _i64),
        ("out_features", _i64),
        ("dim", _i32),
        ("planes", _i32),
        ("pitch", _i32),
        ("bits", _i32),
        ("in_registers", _i32),
        ("reserved", _i32),
    ]


class Linear(ctypes.Structure):
    """`cc_linear` of engine.h."""

    _fields_: ClassVar = [
        ("stages", ctypes.POINTER(Matrix)),
        ("values", _pointer),
        ("bias", _pointer),
        ("in_features", _i64),
        ("out_features", _i64),
        ("num_stages", _i32),
        ("value_type", _i32),
    ]


class Norm(ctypes.Structure):
    """`cc_norm` of engine.h."""

    _fields_: ClassVar = [("weight", _pointer), ("eps", _f32), ("reserved", _i32)]


class Branch(ctypes.Structure):
    """`cc_branch` of engine.h."""

    _fields_: ClassVar = [
        *((name, _i32) for name in ("kind", "heads", "kv_heads", "head_dim", "rope", "window")),
        *((name, _i32) for name in ("activation", "num_experts", "top_k", "normalised")),
        ("scale", _f32),
        ("reserved", _i32),
        *((name, Norm) for name in ("norm", "post_norm", "query_norm", "key_norm")),
        *((name, ctypes.POINTER(Linear)) for name in ("query", "key", "value", "output", "gate", "up", "down", "router")),
    ]


class Decoder(ctypes.Structure):
    """`cc_decoder` of engine.h."""

    _fields_: ClassVar = [
        ("branches", ctypes.POINTER(Branch)),
        ("embedding", ctypes.POINTER(Linear)),
        ("head", ctypes.POINTER(Linear)),
        ("inverse_frequencies", ctypes.POINTER(_pointer)),
        ("norm", Norm),
        ("num_branches", _i64),
        ("hidden_size", _i64),
        ("vocab_size", _i64),
        ("embedding_scale", _f32),
        ("num_ropes", _i32),
    ]


class Functions(NamedTuple):
    """The functions of engine.h, without `cc_`."""

    engine_supported: Callable[..., int]
    engine_new: Callable[..., int | None]
    engine_free: Callable[..., None]
    engine_run: Callable[..., int]
    engine_stream: Callable[..., int]
    cache_new: Callable[..., int | None]
    cache_free: Callable[..., None]
    cache_length: Callable[..., int]
    cache_truncate: Callable[..., None]
    pool_new: Callable[..., int | None]
    pool_free: Callable[..., None]
    linear_apply: Callable[..., int]
    linear_rows: Callable[..., None]
    pool_read: Callable[..., int]
    entries_layout: Callable[..., int]
    make_entries: Callable[..., float]
    largest_code: Callable[..., int]


@functools.cache
def functions() -> Functions:
    """The library's functions, declared. Raises RuntimeError if there is no library."""

    def declare(name: str, result: Any, *arguments: Any) -> Any:
        return native.function(f"cc_{name}", arguments, result, library="_engine")

    decoder, linear, matrix = ctypes.POINTER(Decoder), ctypes.POINTER(Linear), ctypes.POINTER(Matrix)
    return Functions(
        engine_supported=declare("engine_supported", _i32, _i32),
        engine_new=declare("engine_new", _pointer, decoder, _i32, _i32),
        engine_free=declare("engine_free", None, _pointer),
        engine_run=declare("engine_run", _i32, _pointer, _pointer, _pointer, _i64, _i32, _pointer),
        engine_stream=declare("engine_stream", _i32, _pointer, _pointer, _pointer, _i64, _i64, _pointer),
        cache_new=declare("cache_new", _pointer, _pointer, _i64, _i32),
        cache_free=declare("cache_free", None, _pointer),
        cache_length=declare("cache_length", _i64, _pointer),
        cache_truncate=declare("cache_truncate", None, _pointer, _i64),
        pool_new=declare("pool_new", _pointer, _i32, _i32),
        pool_free=declare("pool_free", None, _pointer),
        linear_apply=declare("linear_apply", _i32, _pointer, linear, _pointer, _i64, _pointer),
        linear_rows=declare("linear_rows", None, _pointer, linear, _pointer, _i64, _pointer),
        pool_read=declare("pool_read", ctypes.c_uint64, _pointer, _pointer, _i64),
        entries_layout=declare("entries_layout", _i64, matrix, _i64, _i32, _i32, _i32),
        make_entries=declare("make_entries", _f32, matrix, _pointer, _i64, _i32, _pointer),
        largest_code=declare("largest_code", ctypes.c_uint32, _pointer, _i64, _i32),
    )
