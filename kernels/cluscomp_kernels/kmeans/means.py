"""What the update step of a Lloyd iteration gives, and how clusters that died are revived."""

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
    """Per cluster: `centroids` float32 `[k, dim]`, the weighted means; `mass` float64 `[k]`, the sums of weights; `error`
    float64 `[k]`, the weighted squared errors against the centroids before; `farthest` int32 `[k]`, the point with the
    largest part in the error, or -1."""

    centroids: Floats
    mass: npt.NDArray[np.float64]
    error: npt.NDArray[np.float64]
    farthest: npt.NDArray[np.int32]


def revive(means: Means, points_at: Callable[[npt.NDArray[np.int32]], Floats]) -> tuple[Indices, Indices]:
    """Split the clusters with the largest errors to revive those without weight; returns the revived and their donors.

    A dead centroid moves to the farthest point of its donor, and the next assignment shares the donor's points out. Each
    cluster gives once per iteration. Changes `means.centroids` in place.
    """
    dead = np.flatnonzero(means.mass <= 0)
    if len(dead) == 0:
        return dead, dead
    donors = np.argsort(-means.error, kind="stable")[: len(dead)]
    donors = donors[means.farthest[donors] >= 0]
    revived = dead[: len(donors)]
    means.centroids[revived] = points_at(means.farthest[donors])
    return revived, donors
