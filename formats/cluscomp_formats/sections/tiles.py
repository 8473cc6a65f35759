"""Tiled codes: the order in which the kernels read the codes of weights with vectors along the out axis.

Codes `[in_features, groups]` are taken in tiles of 16 groups and quads of 4 consecutive input channels. The last tile has the
groups that are left, rounded up to an even number; the last quad may be incomplete. Codes that stand for no group or no channel
are 0. The order is: tile, quad, group in the tile, channel in the quad. All codes form one bit stream (see `bits`). A *record*,
the codes of one tile and one quad, begins at a whole byte.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from cluscomp_formats.ir import QUAD, TILE, Stage, tiled_size
from cluscomp_formats.sections.bits import pack_bits, unpack_bits

__all__ = ["largest_padding", "tile_codes", "tiled_bytes", "tiled_codes", "tiled_pieces", "untile_codes"]

Codes = npt.NDArray[np.uint16]
Bytes = npt.NDArray[np.uint8]

_PIECE = 1 << 17
"""Codes per piece, if a tile is not longer: few enough to stay in the cache."""

_U2 = np.dtype("<u2")
_RECORD = np.dtype(f"V{2 * QUAD * TILE}")
"""A record of unpacked codes as one opaque item, because numpy copies short rows slowly."""


def tiled_bytes(in_features: int, groups: int, bits: int) -> int:
    """Return the length in bytes of the tiled codes of an array `[in_features, groups]`."""
    return tiled_size(in_features, groups) * bits // 8


def tiled_codes(stage: Stage) -> Bytes:
    """Return the tiled codes of a stage of a weight with vectors along the out axis, uint8 `[tiled_bytes]`.

    This is a read-only view of the file if the file stores them; otherwise the codes are read and tiled. Raises what
    `stage.codes.read()` raises.
    """
    codes, bits = stage.codes, stage.codebook.code_bits
    if codes.tiled is not None:
        stream = codes.tiled()
        # Another codebook than that of the file may have another width.
        if stream.size == tiled_bytes(codes.shape[0], codes.shape[1], bits):
            return stream
    return tile_codes(codes.read(), bits)


def tile_codes(codes: Codes, bits: int) -> Bytes:
    """Return `codes` uint16 `[in_features, groups]` as tiled codes, uint8 `[tiled_bytes(in_features, groups, bits)]`.

    The caller must ensure that every code is below `2**bits`.
    """
    in_features, groups = codes.shape
    stream = np.empty(tiled_bytes(in_features, groups, bits), dtype=np.uint8)
    begin = 0
    for piece in tiled_pieces(codes, bits):
        stream[begin : begin + piece.size] = piece
        begin += piece.size
    return stream


def tiled_pieces(codes: Codes, bits: int) -> Iterator[Bytes]:
    """Yield the result of `tile_codes` in pieces."""
    in_features, groups = codes.shape
    for first, last in _spans(in_features, groups):
        yield pack_bits(_in_tiles(codes[:, first:last]), bits)


def untile_codes(stream: Bytes, in_features: int, groups: int, bits: int) -> Codes:
    """Return the codes uint16 `[in_features, groups]` of a tiled `stream`, uint8 `[tiled_bytes(in_features, groups, bits)]`.

    Padding is ignored. Raises ValueError if the stream has the wrong length.
    """
    expected = tiled_bytes(in_features, groups, bits)
    if stream.shape != (expected,):
        raise ValueError(f"tiled codes {[in_features, groups]} of {bits} bits take {expected} bytes, got {list(stream.shape)}")
    codes = np.empty((in_features, groups), dtype=_U2)
    begin = 0
    for first, last in _spans(in_features, groups):
        count = tiled_size(in_features, last - first)
        end = begin + count * bits // 8
        _from_tiles(unpack_bits(stream[begin:end], count, bits), codes[:, first:last])
        begin = end
    return codes


def largest_padding(stream: Bytes, in_features: int, groups: int, bits: int) -> int:
    """Return the largest of the codes that stand for no group or no channel in a tiled `stream`; 0 without such codes."""
    quads = -(-in_features // QUAD)
    full, rest = divmod(groups, TILE)
    width = rest + rest % 2
    end = full * quads * TILE * QUAD * bits // 8
    largest = 0
    channels = in_features % QUAD
    if channels:
        records = np.ascontiguousarray(stream[:end].reshape(full, quads, -1)[:, -1]).reshape(-1) if full else stream[:0]
        last = stream[end:].reshape(quads, -1)[-1] if rest else stream[:0]
        for part, count in ((records, full * TILE), (last, width)):
            padding = unpack_bits(part, count * QUAD, bits).reshape(count, QUAD)[:, channels:]
            largest = max(largest, int(padding.max(initial=0)))
    if rest % 2:
        tile = unpack_bits(stream[end:], quads * width * QUAD, bits).reshape(quads, width, QUAD)
        largest = max(largest, int(tile[:, -1].max()))
    return largest


def _spans(in_features: int, groups: int) -> Iterator[tuple[int, int]]:
    """Yield the first and the end of ranges of groups: some full tiles each, then the last tile if it is not full."""
    full = groups - groups % TILE
    step = max(1, _PIECE // tiled_size(in_features, TILE)) * TILE
    for first in range(0, full, step):
        yield first, min(first + step, full)
    if full < groups:
        yield full, groups


def _in_tiles(codes: Codes) -> Codes:
    """Return the codes of full tiles, or of the last tile, in tiled order, `[tiled_size]`."""
    in_features, groups = codes.shape
    quads = -(-in_features // QUAD)
    width = groups + groups % 2
    make = np.empty if in_features % QUAD == 0 and width == groups else np.zeros
    lanes = make((quads, width, QUAD), dtype=_U2)
    for channel in range(QUAD):
        rows = codes[channel::QUAD]
        lanes[: len(rows), :groups, channel] = rows
    if groups <= TILE:
        return lanes.reshape(-1)
    records = lanes.reshape(-1).view(_RECORD).reshape(quads, -1)
    return np.ascontiguousarray(records.T).reshape(-1).view(_U2)


def _from_tiles(tiled: Codes, codes: Codes) -> None:
    """Put codes of full tiles, or of the last tile, from tiled order into `codes [in_features, groups]`."""
    in_features, groups = codes.shape
    quads = -(-in_features // QUAD)
    if groups > TILE:
        records = np.ascontiguousarray(tiled).view(_RECORD).reshape(-1, quads)
        tiled = np.ascontiguousarray(records.T).reshape(-1).view(_U2)
    lanes = tiled.reshape(quads, -1, QUAD)
    for channel in range(QUAD):
        rows = codes[channel::QUAD]
        rows[...] = lanes[: len(rows), :groups, channel]
