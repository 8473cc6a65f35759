"""Reference of the k-means kernel in a few lines of numpy; slow, for tests and benchmarks.

Distances are squared Euclidean, in float32, summed from the first dimension to the last, with every operation rounded. The
nearest centroid is the one with the smallest distance; among equally near ones, that with the lowest index. Every path of this
package gives exactly these codes.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["feedback_codes", "lloyd_step", "nearest", "squared_distances"]

Floats = npt.NDArray[np.float32]


def squared_distances(points: Floats, centroids: Floats, importance: Floats | None = None) -> Floats:
    """Return the distances float32 `[n, k]` between `points` `[n, dim]` and `centroids` `[k, dim]`.

    `importance` `[n, dim]` weights the squared differences.
    """
    total = np.zeros((len(points), len(centroids)), dtype=np.float32)
    for d in range(points.shape[1]):
        squares = np.square(points[:, d, None] - centroids[None, :, d])
        total += squares if importance is None else squares * importance[:, d, None]
    return total


def nearest(
    points: Floats, centroids: Floats, importance: Floats | None = None, chunk: int = 256
) -> tuple[npt.NDArray[np.uint16], Floats]:
    """Return the nearest centroid of each point, uint16 `[n]`, and its squared distance, float32 `[n]`.

    The arguments are those of `squared_distances`.
    """
    codes = np.empty(len(points), dtype=np.uint16)
    least = np.empty(len(points), dtype=np.float32)
    for begin in range(0, len(points), chunk):
        some = slice(begin, begin + chunk)
        distances = squared_distances(points[some], centroids, None if importance is None else importance[some])
        index = distances.argmin(axis=1)
        codes[some] = index
        least[some] = distances[np.arange(len(index)), index]
    return codes, least


def lloyd_step(points: Floats, weights: Floats | None, centroids: Floats) -> Floats:
    """Assign the points, then move each centroid to their weighted mean (in float64); one without weight keeps its place."""
    codes, _ = nearest(points, centroids)
    mass = np.ones(len(points)) if weights is None else weights.astype(np.float64)
    total = np.bincount(codes, mass, len(centroids))
    moved = centroids.copy()
    alive = total > 0
    for d in range(points.shape[1]):
        moved[alive, d] = np.bincount(codes, mass * points[:, d], len(centroids))[alive] / total[alive]
    return moved


def feedback_codes(
    weights: Floats, centroids: Floats, factor: Floats, out_features: int, importance: Floats | None = None
) -> npt.NDArray[np.uint16]:
    """Return codes uint16 `[channels, groups]` of `weights` `[channels, groups * dim]`, as `assign_with_feedback`.

    Sums are float64. `importance` `[groups * dim]` weights the squared differences.
    """
    dim = centroids.shape[1]
    counts = None if importance is None else importance.reshape(-1, dim)
    codes = np.empty((len(weights), weights.shape[1] // dim), dtype=np.uint16)
    errors = np.zeros(weights.shape)
    for channel in range(len(weights)):
        target = weights[channel] + factor[:channel, channel] @ errors[:channel]
        codes[channel] = nearest(target.astype(np.float32).reshape(-1, dim), centroids, counts)[0]
        errors[channel] = weights[channel] - centroids[codes[channel]].reshape(-1)
        errors[channel, out_features:] = 0
    return codes
