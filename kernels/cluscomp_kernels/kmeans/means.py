"""The result of the update step of a Lloyd iteration, and the revival of empty clusters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["Indices", "Means", "revive"]

Floats = npt.NDArray[np.float32]
Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Means:
    """Values per cluster.

    `centroids` float32 `[k, dim]`, the weighted means; `mass` float64 `[k]`, the sums of weights; `error` float64 `[k]`, the
    weighted squared errors against the previous centroids; `farthest` int32 `[k]`, the index of the point with the largest
    share of the error, or -1 if the error is 0.
    """

    centroids: Floats
    mass: npt.NDArray[np.float64]
    error: npt.NDArray[np.float64]
    farthest: npt.NDArray[np.int32]


def revive(means: Means, points_at: Callable[[npt.NDArray[np.int32]], Floats]) -> tuple[Indices, Indices]:
    """Revive clusters without weight by splitting those with the largest errors; return `(revived, donors)`, int64 indices.

    The centroid of an empty cluster moves to the farthest point of its donor; the next assignment divides the donor's points
    between the two. Each cluster is a donor at most once per iteration. Changes `means.centroids` in place.
    """
    dead = np.flatnonzero(means.mass <= 0)
    if len(dead) == 0:
        return dead, dead
    donors = np.argsort(-means.error, kind="stable")[: len(dead)]
    donors = donors[means.farthest[donors] >= 0]
    revived = dead[: len(donors)]
    means.centroids[revived] = points_at(means.farthest[donors])
    return revived, donors
