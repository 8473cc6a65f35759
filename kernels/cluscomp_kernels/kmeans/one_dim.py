"""k-means in one dimension: with sorted values and prefix sums, a Lloyd iteration costs O(k log n) for n points."""

from __future__ import annotations

import heapq

import numpy as np
import numpy.typing as npt

from cluscomp_kernels.kmeans import library

__all__ = ["assign_values", "cluster_values"]

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Codes = npt.NDArray[np.uint16]

VALUES_PER_CALL = 1 << 22
VALUES_PER_SEARCH = 1 << 16


class _Moments:
    """Prefix sums over distinct ascending values. Ranges of values are given by their ends, as numbers or arrays."""

    def __init__(self, values: Floats, mass: Doubles) -> None:
        self.values = values
        self._shift = float(np.average(values, weights=mass))
        offsets = values.astype(np.float64) - self._shift
        self._mass, self._first, self._second = (
            np.concatenate(([0.0], np.cumsum(term))) for term in (mass, mass * offsets, mass * offsets * offsets)
        )

    def mean(self, begin: npt.ArrayLike, end: npt.ArrayLike) -> Doubles:
        """Return the weighted mean of a range of positive weight."""
        b, e = np.asarray(begin), np.asarray(end)
        return np.asarray(self._shift + (self._first[e] - self._first[b]) / (self._mass[e] - self._mass[b]))

    def error(self, begin: npt.ArrayLike, end: npt.ArrayLike) -> Doubles:
        """Return the weighted squared error of a range against its mean, up to rounding."""
        b, e = np.asarray(begin), np.asarray(end)
        first, mass = self._first[e] - self._first[b], self._mass[e] - self._mass[b]
        return np.asarray(np.maximum(self._second[e] - self._second[b] - first * first / mass, 0.0))


def _weighted_values(points: Floats, weights: Floats | None) -> tuple[Floats, Doubles]:
    """Return the distinct values of positive weight, in ascending order, and their weights."""
    if weights is None:
        ordered, ordered_weights = np.sort(points), None
    else:
        order = np.argsort(points, kind="stable")
        ordered, ordered_weights = points[order], weights[order].astype(np.float64)
    first = np.flatnonzero(np.concatenate(([True], ordered[1:] != ordered[:-1])))
    if ordered_weights is None:
        mass = np.diff(np.append(first, len(ordered))).astype(np.float64)
    else:
        mass = np.add.reduceat(ordered_weights, first)
    return ordered[first][mass > 0], mass[mass > 0]


def _split(moments: _Moments, bounds: npt.NDArray[np.int64], num_clusters: int) -> npt.NDArray[np.int64]:
    """Split the range with the largest error at its mean until there are `num_clusters`; return the ranges' ends, ascending."""
    values = moments.values
    begins, ends = bounds[:-1], bounds[1:]
    errors = -moments.error(begins, ends)
    heap = [(error, b, e) for error, b, e in zip(errors.tolist(), begins.tolist(), ends.tolist(), strict=True) if e - b > 1]
    heapq.heapify(heap)
    added: list[int] = []
    while heap and len(bounds) + len(added) <= num_clusters:
        _, begin, end = heapq.heappop(heap)
        middle = begin + int(np.searchsorted(values[begin:end], np.float32(moments.mean(begin, end)), side="right"))
        middle = min(max(middle, begin + 1), end - 1)
        added.append(middle)
        for piece in ((begin, middle), (middle, end)):
            if piece[1] - piece[0] > 1:
                heapq.heappush(heap, (-float(moments.error(*piece)), *piece))
    return np.sort(np.append(bounds, np.asarray(added, dtype=np.int64)))


def cluster_values(points: Floats, weights: Floats | None, num_clusters: int, iterations: int) -> tuple[Floats, int]:
    """Cluster `points` float32 `[n]`; return the centroids, float32 `[num_clusters]`, and the number of iterations made.

    Makes greedy splits, then Lloyd iterations until no centroid moves or `iterations` are done. If there are no more distinct
    values than clusters, the centroids are the values, with the last one repeated.
    """
    values, mass = _weighted_values(points, weights)
    if len(values) <= num_clusters:
        return np.concatenate((values, np.full(num_clusters - len(values), values[-1], dtype=np.float32))), 0
    moments = _Moments(values, mass)
    bounds = _split(moments, np.asarray([0, len(values)]), num_clusters)
    done = 0
    while True:
        centroids = moments.mean(bounds[:-1], bounds[1:])
        if done == iterations:
            break
        done += 1
        # A value at a midpoint belongs to the lower centroid, which has the lower index.
        cuts = np.searchsorted(values, ((centroids[1:] + centroids[:-1]) / 2).astype(np.float32), side="right")
        moved = np.unique(np.concatenate(([0], cuts, [len(values)])))
        if len(moved) <= num_clusters:
            moved = _split(moments, moved, num_clusters)
        if np.array_equal(moved, bounds):
            break
        bounds = moved
    return centroids.astype(np.float32), done


def assign_values(points: Floats, centroids: Floats, threads: int) -> Codes:
    """Return the exact nearest centroid of each point, uint16 `[n]`; the lowest index among equally near ones.

    `points` are float32 `[n]`, `centroids` float32 `[k]`.
    """
    order = np.argsort(centroids, kind="stable").astype(np.int32)
    ordered = centroids[order]
    # The stable sort puts the lowest index first among equal centroids.
    distinct = np.concatenate(([True], ordered[1:] != ordered[:-1]))
    values, ids = ordered[distinct], order[distinct]
    codes = np.empty(len(points), dtype=np.uint16)
    for begin in range(0, len(points), VALUES_PER_CALL):
        piece = points[begin : begin + VALUES_PER_CALL]
        library.call("cc_kmeans_sorted", piece, len(piece), values, ids, len(values), codes[begin:], threads)
    return codes
