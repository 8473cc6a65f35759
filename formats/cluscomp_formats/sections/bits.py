"""Pack codes to a bit stream: little-endian integers of `bits` bits each, without gaps.

Bit `i` of the stream is bit `i % 8` of byte `i // 8` (least significant first). Code `j` has bits `j * bits` to
`(j + 1) * bits - 1`, its least significant bit first. Eight codes fill `bits` bytes exactly, so a stream can be packed and
unpacked in pieces of a multiple of eight codes. The unused high bits of the last byte are zero.

Pairs of neighbouring codes are merged (or split) within 32-bit and then 64-bit words, so that all arithmetic works on
contiguous arrays. This is done in blocks, so that the temporaries fit the cache, for streams of any size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["MAX_BITS", "LargestCode", "largest_code", "pack_bits", "packed_bytes", "unpack_bits"]

Codes = npt.NDArray[np.uint16]
Bytes = npt.NDArray[np.uint8]

LargestCode = Callable[[Bytes, int, int], int]
"""A function with the arguments and the result of `largest_code`."""

MAX_BITS = 16

_BLOCK = 1 << 16
"""Codes per block: about 0.5 MB of temporaries. A multiple of 8."""

_U2, _U4, _U8 = np.dtype("<u2"), np.dtype("<u4"), np.dtype("<u8")
_LOW_HALF_OF_U4 = np.uint32(0xFFFF)
_LOW_HALF_OF_U8 = np.uint64(0xFFFFFFFF)


def packed_bytes(count: int, bits: int) -> int:
    """Return the length in bytes of a stream of `count` codes of `bits` bits."""
    return (count * bits + 7) // 8


def pack_bits(codes: npt.NDArray[Any], bits: int) -> Bytes:
    """Pack uint16 `codes` of any shape, in C order, into uint8 `[packed_bytes(codes.size, bits)]`.

    The caller must ensure that every code is below `2**bits`; a larger one would overwrite its neighbours. Raises ValueError if
    the width is not 1 to 16, TypeError if the codes are not uint16.
    """
    _check_bits(bits)
    if codes.dtype != _U2:
        raise TypeError(f"codes must be uint16, got {codes.dtype}")
    flat = np.ascontiguousarray(codes).reshape(-1)
    if bits == 16:
        return flat.view(np.uint8)
    if bits == 8:
        return flat.astype(np.uint8)
    packed = np.empty(packed_bytes(flat.size, bits), dtype=np.uint8)
    for start in range(0, flat.size, _BLOCK):
        block = _pack_block(_padded(flat[start : start + _BLOCK], 8), bits)
        begin = start // 8 * bits
        # Only the last block can be longer than the rest of the stream: it was padded to a multiple of eight codes.
        packed[begin : begin + block.size] = block[: packed.size - begin]
    return packed


def unpack_bits(data: Bytes, count: int, bits: int) -> Codes:
    """Unpack uint8 `data [packed_bytes(count, bits)]` into uint16 `[count]`.

    The result may be a view of `data` (at 16 bits). Raises ValueError if the width is not 1 to 16, or if `data` has the wrong
    length.
    """
    _check_bits(bits)
    if data.dtype != np.uint8 or data.shape != (packed_bytes(count, bits),):
        raise ValueError(f"{count} codes of {bits} bits take {packed_bytes(count, bits)} bytes, got {data.dtype} {data.shape}")
    flat = np.ascontiguousarray(data)
    if bits == 16:
        return flat.view(_U2)
    if bits == 8:
        return flat.astype(_U2)
    codes = np.empty(-(-count // 8) * 8, dtype=_U2)
    for start in range(0, codes.size, _BLOCK):
        block = codes[start : start + _BLOCK]
        begin = start // 8 * bits
        # Words are read as 8 bytes from their first byte, so the block needs up to 8 bytes after its end.
        needed = block.size // 8 * bits + 8
        piece = flat[begin : begin + needed]
        if piece.size < needed:
            piece = np.concatenate([piece, np.zeros(needed - piece.size, dtype=np.uint8)])
        _unpack_block(piece, bits, block)
    return codes[:count]


def largest_code(data: Bytes, count: int, bits: int) -> int:
    """Return the largest code of a non-empty stream, as given to `unpack_bits`, with little memory."""
    if bits == 8:
        return int(data.max())
    largest = 0
    for start in range(0, count, _BLOCK):
        size = min(_BLOCK, count - start)
        begin = start // 8 * bits
        codes = unpack_bits(data[begin : begin + packed_bytes(size, bits)], size, bits)
        largest = max(largest, int(codes.max()))
    return largest


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= MAX_BITS:
        raise ValueError(f"codes are 1 to {MAX_BITS} bits wide, got {bits}")


def _padded(codes: Codes, multiple: int) -> Codes:
    missing = -codes.size % multiple
    return np.concatenate([codes, np.zeros(missing, dtype=_U2)]) if missing else codes


def _pack_block(codes: Codes, bits: int) -> Bytes:
    """Pack a multiple of eight codes."""
    pairs = codes.view(_U4)
    pairs = (pairs & _LOW_HALF_OF_U4) | ((pairs >> np.uint32(16)) << np.uint32(bits))
    quads = pairs.view(_U8)
    quads = (quads & _LOW_HALF_OF_U8) | ((quads >> np.uint64(32)) << np.uint64(2 * bits))
    if bits % 2 == 0:
        return _first_bytes(quads, itemsize=8, kept=bits // 2)
    # Four codes of odd width end in the middle of a byte; eight codes do not, but may need more than 64 bits.
    halves = quads.reshape(-1, 2)
    octets = np.empty_like(halves)
    octets[:, 0] = halves[:, 0] | (halves[:, 1] << np.uint64(4 * bits))
    octets[:, 1] = halves[:, 1] >> np.uint64(64 - 4 * bits)
    return _first_bytes(octets, itemsize=16, kept=bits)


def _first_bytes(words: npt.NDArray[Any], itemsize: int, kept: int) -> Bytes:
    """Return the first `kept` of every `itemsize` bytes. Uses opaque items, because numpy copies short rows slowly."""
    item = np.dtype(f"V{kept}")
    rows = np.ndarray(words.nbytes // itemsize, item, words, strides=(itemsize,))
    return np.ascontiguousarray(rows).view(np.uint8)


def _unpack_block(piece: Bytes, bits: int, codes: Codes) -> None:
    """Unpack a multiple of eight codes into `codes`. `piece` is 8 bytes longer than the codes."""
    octets = codes.size // 8
    if bits % 2 == 0:
        quads = np.ndarray(2 * octets, _U8, piece, strides=(bits // 2,)).copy()
    else:
        halves = np.empty((octets, 2), dtype=_U8)
        halves[:, 0] = np.ndarray(octets, _U8, piece, strides=(bits,))
        # The second four codes begin in the middle of a byte, but 4 + 4 * 15 bits still fit a word.
        halves[:, 1] = np.ndarray(octets, _U8, piece, offset=bits // 2, strides=(bits,)) >> np.uint64(4)
        quads = halves.reshape(-1)
    pair_mask = np.uint64((1 << 2 * bits) - 1)
    quads = (quads & pair_mask) | (((quads >> np.uint64(2 * bits)) & pair_mask) << np.uint64(32))
    pairs = quads.view(_U4)
    mask = np.uint32((1 << bits) - 1)
    np.bitwise_or(pairs & mask, ((pairs >> np.uint32(bits)) & mask) << np.uint32(16), out=codes.view(_U4))
