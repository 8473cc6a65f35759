"""Centroids packed for search, their neighbour lists, and the two halves of a Lloyd iteration on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cluscomp_kernels.kmeans import library

__all__ = ["Groups", "Scan", "Tiles", "group", "neighbour_lists", "pack_tiles", "scan", "update_means"]

Floats = npt.NDArray[np.float32]
Codes = npt.NDArray[np.uint16]
Ints = npt.NDArray[np.int32]
Tick = Callable[[], None]

LANES = 16
FAR = np.float32(1e30)
NO_ID = np.int32(2**31 - 1)


@dataclass(frozen=True)
class Tiles:
    """Centroids in tiles of 16 with bounding boxes; the layout is described in `tiles.h`."""

    tiles: Floats
    ids: Ints
    low: Floats
    high: Floats

    def arguments(self) -> tuple[Floats, Ints, Floats, Floats, int]:
        return self.tiles, self.ids, self.low, self.high, len(self.tiles)


def _in_lanes(rows: Floats) -> Floats:
    """`[rows, dim]` to `[ceil(rows / 16), dim, 16]`, filled up with far points."""
    count, dim = rows.shape
    filled = np.full((-(-count // LANES) * LANES, dim), FAR, dtype=np.float32)
    filled[:count] = rows
    return np.ascontiguousarray(filled.reshape(-1, LANES, dim).transpose(0, 2, 1))


def pack_tiles(centroids: Floats, order: npt.NDArray[np.integer] | None = None) -> Tiles:
    """Pack `centroids` `[k, dim]` in an `order` (int `[k]`) in which near ones are together; by default as they come."""
    ids = np.arange(len(centroids)) if order is None else order
    ordered = centroids[ids]
    edges = np.arange(0, len(ids), LANES)
    low, high = np.minimum.reduceat(ordered, edges, axis=0), np.maximum.reduceat(ordered, edges, axis=0)
    padded = np.full(len(edges) * LANES, NO_ID, dtype=np.int32)
    padded[: len(ids)] = ids
    return Tiles(_in_lanes(ordered), padded, _in_lanes(low), _in_lanes(high))


def neighbour_lists(tiles: Tiles, centroids: Floats, length: int, threads: int, previous: Ints | None, tick: Tick) -> Ints:
    """The `length` nearest other centroids of each centroid, int32 `[k, length]`, nearest first; length < k.

    `previous` lists of the same shape, of centroids that moved since, speed the search up and are overwritten.
    """
    count, dim = centroids.shape
    lists = np.empty((count, length), dtype=np.int32) if previous is None else previous
    if length == 0:
        return lists
    num_tiles = len(tiles.tiles)
    capacity = 4 * length + 4 * LANES
    padded_tiles = -(-num_tiles // LANES) * LANES
    scratch = np.empty(threads * LANES * capacity, dtype=np.uint64)
    bounds = np.empty(threads * padded_tiles, dtype=np.float32)
    step = 512
    for first in range(0, num_tiles, step):
        lists_arguments = (lists, length, previous is not None, scratch, capacity, bounds, padded_tiles)
        piece = (first, min(first + step, num_tiles), threads, library.INSTRUCTION_LEVEL)
        library.call("cc_kmeans_neighbours", *tiles.arguments(), centroids, dim, *lists_arguments, *piece)
        tick()
    return lists


@dataclass(frozen=True)
class Groups:
    """Points by cluster: those of cluster c are `order[start[c]:start[c + 1]]`, ascending."""

    order: Ints
    start: Ints


def group(codes: Codes, num_clusters: int) -> Groups:
    """Group points by their code."""
    groups = Groups(np.empty(len(codes), dtype=np.int32), np.empty(num_clusters + 1, dtype=np.int32))
    library.call("cc_kmeans_group", codes, len(codes), num_clusters, groups.start, groups.order)
    return groups


@dataclass(frozen=True)
class Scan:
    """Nearest centroids: `codes` uint16 `[n]`, squared `distances` float32 `[n]`, and how many points the lists left open."""

    codes: Codes
    distances: Floats
    open_points: int


def scan(
    tiles: Tiles, lists: Ints, points: Floats, groups: Groups, centroids: Floats, *, exact: bool, threads: int, tick: Tick
) -> Scan:
    """Assign every point to the nearest of its group's centroid and that centroid's listed neighbours.

    `exact` also searches all centroids for the points whose list ended too early; it needs fresh lists.
    """
    count, dim = centroids.shape
    codes = np.empty(len(points), dtype=np.uint16)
    distances = np.empty(len(points), dtype=np.float32)
    open_points = np.empty(count, dtype=np.int64)
    step = max(1, min(count, (count << 18) // max(1, len(points))))
    for first in range(0, count, step):
        data = (points, groups.order, groups.start, centroids, count, dim, lists, lists.shape[1], exact)
        piece = (first, min(first + step, count), threads, library.INSTRUCTION_LEVEL)
        library.call("cc_kmeans_scan", *tiles.arguments(), *data, codes, distances, open_points, *piece)
        tick()
    return Scan(codes, distances, int(open_points.sum()))


@dataclass(frozen=True)
class Means:
    """Per cluster: the weighted mean of its points, their weight, their error, and the point with the largest part in it."""

    centroids: Floats
    mass: npt.NDArray[np.float64]
    error: npt.NDArray[np.float64]
    farthest: Ints


def update_means(
    points: Floats, weights: Floats | None, distances: Floats, groups: Groups, centroids: Floats, threads: int
) -> Means:
    """The mean of each group; where a group weighs nothing, the centroid it had."""
    count, dim = centroids.shape
    means = Means(centroids.copy(), np.empty(count), np.empty(count), np.empty(count, dtype=np.int32))
    results = (means.centroids, means.mass, means.error, means.farthest, threads, library.INSTRUCTION_LEVEL)
    library.call("cc_kmeans_update", points, weights, distances, groups.order, groups.start, count, dim, *results)
    return means
