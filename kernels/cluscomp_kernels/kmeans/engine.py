"""What a Lloyd loop needs from a device, and the loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
import numpy.typing as npt

from cluscomp_kernels.kmeans.means import Indices, Means, revive

__all__ = ["Engine", "run_lloyd"]

Floats = npt.NDArray[np.float32]
Codes = npt.NDArray[np.uint16]


class Engine(Protocol):
    """Holds the points on a device, with the code of each."""

    @property
    def codes(self) -> Codes:
        """The centroid of every point, uint16 `[n]`, as of the last assignment."""

    def assign(self, centroids: Floats, *, exact: bool) -> None:
        """Assign every point to its nearest centroid; if not `exact`, an engine may miss the nearest of a few points."""

    def update(self, centroids: Floats) -> Means:
        """The means of the clusters, and their errors against `centroids`, with which the last assignment was made."""

    def points_at(self, indices: npt.NDArray[np.int32]) -> Floats:
        """Points by the numbers that `Means.farthest` gives."""

    def centroids_jumped(self, revived: Indices, donors: Indices) -> None:
        """Each revived centroid now lies beside its donor: what is remembered of its neighbourhood no longer holds."""


RELAXATION = 2.0
"""How far centroids move, in units of the way to the mean."""
PLAIN_ITERATIONS = 2
"""The last iterations move to the mean itself."""


def run_lloyd(
    engine: Engine, centroids: Floats, iterations: int, *, plain: bool, after_iteration: Callable[[int], None]
) -> tuple[Floats, float, int]:
    """Up to `iterations` Lloyd iterations, then an exact assignment to the centroids they end with.

    `plain` iterations are those of the textbook: exact assignment, move to the mean. Otherwise assignments may miss the
    nearest centroid of a few points, and all but the last iterations move past the mean, as far again. That reaches in a few
    iterations a lower error than many plain ones (over-relaxation: Lee, Baek and Sung, "Modified K-means algorithm for vector
    quantizer design", IEEE Signal Processing Letters 4(1), 1997).

    Stops earlier when an iteration moves no centroid. Returns the centroids, the weighted squared error of the final codes
    and the number of iterations made.
    """
    done = 0
    while done < iterations:
        engine.assign(centroids, exact=plain)
        means = engine.update(centroids)
        moved = means.centroids - centroids
        if not plain and iterations - done > PLAIN_ITERATIONS:
            means.centroids[:] = centroids + np.float32(RELAXATION) * moved
        revived, donors = revive(means, engine.points_at)
        if len(revived):
            engine.centroids_jumped(revived, donors)
        still = np.array_equal(means.centroids, centroids)
        centroids = means.centroids
        done += 1
        after_iteration(done)
        if still:
            break
    engine.assign(centroids, exact=True)
    return centroids, float(engine.update(centroids).error.sum()), done
