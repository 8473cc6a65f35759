"""The Lloyd loop, and the interface of the engines that run its steps on a device."""

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
    """The points on a device, with the code of each point."""

    @property
    def codes(self) -> Codes:
        """Centroid index of every point, uint16 `[n]`, as of the last assignment."""

    def assign(self, centroids: Floats, *, exact: bool) -> None:
        """Assign every point to its nearest centroid; unless `exact`, a few points may get a slightly farther one."""

    def update(self, centroids: Floats) -> Means:
        """Return the means of the clusters, and their errors against `centroids`, those of the last assignment."""

    def points_at(self, indices: npt.NDArray[np.int32]) -> Floats:
        """Return the points `[len(indices), dim]` of indices from `Means.farthest`."""

    def centroids_revived(self, revived: Indices, donors: Indices) -> None:
        """Update any cached neighbours of revived centroids, each of which has moved next to its donor."""


RELAXATION = 2.0
"""Step of a centroid towards the mean, in units of its distance to the mean."""
PLAIN_ITERATIONS = 2
"""Number of final iterations, which move to the mean itself."""


def run_lloyd(
    engine: Engine, centroids: Floats, iterations: int, *, plain: bool, after_iteration: Callable[[int], None]
) -> tuple[Floats, float, int]:
    """Make up to `iterations` Lloyd iterations, then an exact assignment to the final centroids.

    With `plain`, iterations are the textbook's: exact assignment, then a move to the mean. Otherwise assignments may miss the
    nearest centroid of a few points, and all but the last PLAIN_ITERATIONS move twice as far as the mean (over-relaxation: Lee,
    Baek and Sung, "Modified K-means algorithm for vector quantizer design", IEEE Signal Processing Letters 4(1), 1997). A few
    of these iterations reach a lower error than many plain ones.

    Stops early if an iteration moves no centroid. Returns the centroids, the weighted squared error of the final codes and the
    number of iterations made.
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
            engine.centroids_revived(revived, donors)
        still = np.array_equal(means.centroids, centroids)
        centroids = means.centroids
        done += 1
        after_iteration(done)
        if still:
            break
    engine.assign(centroids, exact=True)
    return centroids, float(engine.update(centroids).error.sum()), done
