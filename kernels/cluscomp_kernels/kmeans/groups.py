"""The two halves of a Lloyd iteration on the CPU, scan and update, over points grouped by cluster."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cluscomp_kernels.kmeans import library
from cluscomp_kernels.kmeans.means import Means
from cluscomp_kernels.kmeans.tiles import Tiles

__all__ = ["Groups", "Scan", "group", "scan", "update_means"]

Floats = npt.NDArray[np.float32]
Codes = npt.NDArray[np.uint16]
Ints = npt.NDArray[np.int32]

POINTS_PER_CALL = 1 << 17


@dataclass(frozen=True)
class Groups:
    """Points by cluster: cluster c has the points `order[start[c]:start[c + 1]]`, in ascending order."""

    order: Ints
    start: Ints


def group(codes: Codes, num_clusters: int) -> Groups:
    """Group points by code."""
    groups = Groups(np.empty(len(codes), dtype=np.int32), np.empty(num_clusters + 1, dtype=np.int32))
    library.call("cc_kmeans_group", codes, len(codes), num_clusters, groups.start, groups.order)
    return groups


@dataclass(frozen=True)
class Scan:
    """Nearest centroids: `codes` uint16 `[n]`, squared `distances` float32 `[n]`, and the number of open points (scan.c)."""

    codes: Codes
    distances: Floats
    open_points: int


def scan(
    tiles: Tiles,
    lists: Ints,
    points: Floats,
    groups: Groups,
    centroids: Floats,
    *,
    exact: bool,
    stale: bool,
    threads: int,
    tick: Callable[[], None],
) -> Scan:
    """Assign every point to the nearest among its group's centroid and that centroid's listed neighbours.

    An exact scan then searches all centroids for the open points: those for which a centroid outside the list may be nearer.
    If the lists are stale (made for centroids that have moved since), all points are open.
    """
    count, dim = centroids.shape
    codes = np.empty(len(points), dtype=np.uint16)
    distances = np.empty(len(points), dtype=np.float32)
    open_points = np.empty(count, dtype=np.int64)
    data = (points, groups.order, groups.start, centroids, count, dim, lists, lists.shape[1], exact, stale)
    step = max(1, count * POINTS_PER_CALL // len(points))
    for first in range(0, count, step):
        piece = (first, min(first + step, count), threads, library.INSTRUCTION_LEVEL)
        library.call("cc_kmeans_scan", *tiles.arguments(), *data, codes, distances, open_points, *piece)
        tick()
    return Scan(codes, distances, int(open_points.sum()))


def update_means(
    points: Floats, weights: Floats | None, distances: Floats, groups: Groups, centroids: Floats, *, threads: int
) -> Means:
    """Return the mean of each group; a group without weight keeps its centroid."""
    count, dim = centroids.shape
    means = Means(centroids.copy(), np.empty(count), np.empty(count), np.empty(count, dtype=np.int32))
    results = (means.centroids, means.mass, means.error, means.farthest, threads, library.INSTRUCTION_LEVEL)
    library.call("cc_kmeans_update", points, weights, distances, groups.order, groups.start, count, dim, *results)
    return means
