"""Centroids packed in tiles for search, and lists of their nearest neighbours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cluscomp_kernels.kmeans import library

__all__ = ["Tiles", "neighbour_lists", "outer_boxes", "pack_tiles", "refresh_lists"]

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int32]

LANES = 16
FAR = np.float32(1e30)
FAR_HALF_NORM = np.float32(1e38)
NO_ID = np.int32(2**31 - 1)
TILES_PER_CALL = 256
NEAR = 12
"""Nearest members of a list whose own lists are searched when the list is refreshed."""
WIDTH = 64
"""Entries searched in each of those lists."""


@dataclass(frozen=True)
class Tiles:
    """Centroids in tiles of 16 with bounding boxes; `tiles.h` describes the layout."""

    tiles: Floats
    ids: Ints
    low: Floats
    high: Floats
    half_norms: Floats
    largest: float

    def arguments(self) -> tuple[Any, ...]:
        """Return the arguments of the C functions that describe the tiles."""
        return self.tiles, self.ids, self.low, self.high, self.half_norms, self.largest, len(self.tiles)


def _in_lanes(rows: Floats) -> Floats:
    """Rearrange `[rows, dim]` to `[ceil(rows / 16), dim, 16]`, padded with far points."""
    count, dim = rows.shape
    filled = np.full((-(-count // LANES) * LANES, dim), FAR, dtype=np.float32)
    filled[:count] = rows
    return np.ascontiguousarray(filled.reshape(-1, LANES, dim).transpose(0, 2, 1))


def pack_tiles(centroids: Floats, order: Ints | None = None) -> Tiles:
    """Pack `centroids` `[k, dim]` in tiles. `order` (int `[k]`) should put near ones together; default: as given."""
    ids = np.arange(len(centroids), dtype=np.int32) if order is None else order
    ordered = centroids[ids]
    edges = np.arange(0, len(ids), LANES)
    low, high = np.minimum.reduceat(ordered, edges, axis=0), np.maximum.reduceat(ordered, edges, axis=0)
    padded = np.full(len(edges) * LANES, NO_ID, dtype=np.int32)
    padded[: len(ids)] = ids
    norms = np.einsum("kd,kd->k", ordered, ordered, dtype=np.float64)
    half_norms = np.full(len(padded), FAR_HALF_NORM, dtype=np.float32)
    half_norms[: len(ids)] = norms / 2
    # Rounded up, since the search relies on this bound.
    largest = float(np.nextafter(np.float32(norms.max()), np.float32(np.inf)))
    return Tiles(_in_lanes(ordered), padded, _in_lanes(low), _in_lanes(high), half_norms, largest)


def outer_boxes(tiles: Tiles) -> tuple[Floats, Floats]:
    """Return the low and high corners of the boxes around every 16 tiles: float32 `[ceil(num_tiles / 256), dim, 16]` each."""
    filled = tiles.low == FAR
    low = np.min(tiles.low, axis=2)
    high = np.max(np.where(filled, -FAR, tiles.high), axis=2)
    return _in_lanes(low), _in_lanes(high)


def neighbour_lists(
    tiles: Tiles, centroids: Floats, length: int, *, threads: int, previous: Ints | None, tick: Callable[[], None]
) -> Ints:
    """Return the `length` < k nearest other centroids of each centroid, int32 `[k, length]`, nearest first.

    If several centroids are equally far at the end of a list, any of them may be in it. `previous` lists of the same shape,
    made before the centroids moved, speed up the search and are overwritten.
    """
    count, dim = centroids.shape
    lists = np.empty((count, length), dtype=np.int32) if previous is None else previous
    if length == 0:
        return lists
    num_tiles = len(tiles.tiles)
    padded_tiles = -(-num_tiles // LANES) * LANES
    capacity = 4 * length + 4 * LANES
    scratch = np.empty(threads * LANES * capacity, dtype=np.uint64)
    bounds = np.empty(threads * padded_tiles, dtype=np.float32)
    search = (lists, length, previous is not None, scratch, capacity, bounds, padded_tiles)
    for first in range(0, num_tiles, TILES_PER_CALL):
        piece = (first, min(first + TILES_PER_CALL, num_tiles), threads, library.INSTRUCTION_LEVEL)
        library.call("cc_kmeans_neighbours", *tiles.arguments(), centroids, dim, *search, *piece)
        tick()
    return lists


def refresh_lists(centroids: Floats, old: Ints, *, threads: int, tick: Callable[[], None]) -> Ints:
    """Return approximate neighbour lists from the lists made before the centroids moved; faster than `neighbour_lists`."""
    count, dim = centroids.shape
    length = old.shape[1]
    lists = np.empty_like(old)
    if length == 0:
        return lists
    capacity = 2 * length + 4 * LANES
    keys = np.empty(threads * capacity, dtype=np.uint64)
    stamps = np.zeros(threads * count, dtype=np.int32)
    search = (old, lists, length, min(NEAR, length), min(WIDTH, length), keys, capacity, stamps)
    step = LANES * TILES_PER_CALL
    for first in range(0, count, step):
        piece = (first, min(first + step, count), threads, library.INSTRUCTION_LEVEL)
        library.call("cc_kmeans_refresh", centroids, count, dim, *search, *piece)
        tick()
    return lists
