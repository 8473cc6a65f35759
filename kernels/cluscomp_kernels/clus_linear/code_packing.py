"""Bit-packed codes: bit i of a stream is bit i % 8 of byte i // 8, each code with its least significant bit first.

Uses the C kernels where they are there, numpy otherwise; both give the same bytes.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from cluscomp_kernels import native

__all__ = ["pack_codes", "packed_size", "unpack_codes"]

_NUMPY_CODES = 1 << 16
"""Codes that the numpy path handles at a time; it spreads every bit over a byte. A multiple of 8."""


def packed_size(count: int, bits: int) -> int:
    """Bytes of a stream of `count` codes of `bits` bits. Raises ValueError on a negative count or bits outside 1 to 16."""
    if not 1 <= bits <= 16:
        raise ValueError(f"codes have 1 to 16 bits, got {bits}")
    if count < 0:
        raise ValueError(f"the number of codes cannot be negative, got {count}")
    return (count * bits + 7) // 8


@functools.cache
def _functions() -> tuple[Callable[..., None], Callable[..., None]]:
    pointer, int64, int32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    return (
        native.function("cc_pack_codes", [pointer, int64, int32, pointer, int32]),
        native.function("cc_unpack_codes", [pointer, int64, int32, pointer, int32]),
    )


def unpack_codes(packed: npt.NDArray[np.uint8], count: int, bits: int) -> npt.NDArray[np.uint16]:
    """The `count` codes of `bits` bits of a stream uint8 `[bytes]`, as uint16 `[count]`.

    `packed` may be a read-only memory map. Raises TypeError unless it is uint8, ValueError unless it has exactly
    `packed_size(count, bits)` bytes.
    """
    size = packed_size(count, bits)
    if packed.dtype != np.uint8:
        raise TypeError(f"packed codes are {packed.dtype}, expected uint8")
    if packed.shape != (size,):
        raise ValueError(f"packed codes have shape {packed.shape}, expected ({size},) for {count} codes of {bits} bits")
    codes = np.empty(count, dtype=np.uint16)
    if native.library() is None:
        for begin in range(0, count, _NUMPY_CODES):
            end = min(begin + _NUMPY_CODES, count)
            chunk = packed[begin * bits // 8 : packed_size(end, bits)]
            spread = np.unpackbits(chunk, count=(end - begin) * bits, bitorder="little").reshape(-1, bits)
            codes[begin:end] = spread @ (np.uint16(1) << np.arange(bits, dtype=np.uint16))
        return codes
    stream = np.ascontiguousarray(packed)
    _functions()[1](stream.ctypes.data, count, bits, codes.ctypes.data, torch.get_num_threads())
    return codes


def pack_codes(codes: npt.NDArray[np.uint16], bits: int) -> npt.NDArray[np.uint8]:
    """A stream uint8 `[packed_size]` of codes uint16 `[count]`, the unused bits of the last byte 0.

    Raises TypeError unless the codes are uint16, ValueError if one does not fit `bits` bits.
    """
    if codes.dtype != np.uint16:
        raise TypeError(f"codes are {codes.dtype}, expected uint16")
    if codes.ndim != 1:
        raise ValueError(f"codes have shape {codes.shape}, expected [count]")
    packed = np.empty(packed_size(codes.size, bits), dtype=np.uint8)
    if codes.size and int(codes.max()) >> bits:
        raise ValueError(f"codes go up to {int(codes.max())}, which does not fit {bits} bits")
    if native.library() is None:
        for begin in range(0, codes.size, _NUMPY_CODES):
            end = min(begin + _NUMPY_CODES, codes.size)
            spread: npt.NDArray[Any] = (codes[begin:end, None] >> np.arange(bits, dtype=np.uint16)) & np.uint16(1)
            chunk = np.packbits(spread.astype(np.uint8).reshape(-1), bitorder="little")
            packed[begin * bits // 8 : begin * bits // 8 + chunk.size] = chunk
        return packed
    source = np.ascontiguousarray(codes)
    _functions()[0](source.ctypes.data, codes.size, bits, packed.ctypes.data, torch.get_num_threads())
    return packed
