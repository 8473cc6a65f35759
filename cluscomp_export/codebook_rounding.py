"""Centroids as 8-bit integers times a step, which the row scales of the weights absorb."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["LARGEST", "LEAST_STEP", "round_centroids"]

Floats = npt.NDArray[np.float32]

LARGEST = 127
LEAST_STEP = 2.0**-8
"""Rows have unit variance, so finer steps are useless; with this one, most row scales times the step fit float16."""

CANDIDATES = 48
FEWEST_STEPS = 8
"""The smallest step tried is the largest centroid over `LARGEST * FEWEST_STEPS`: it clips values beyond an eighth of it."""


def round_centroids(centroids: Floats, sizes: npt.NDArray[np.float64]) -> tuple[npt.NDArray[np.int8], np.float32]:
    """Integers `[num_clusters, cluster_dim]` from -127 to 127 and a step, so that `integers * step` is closest to `centroids`.

    Closest means the least squared error, with clipped values included and every centroid weighted by the size of its cluster
    `[num_clusters]`, over a geometric series of steps.
    """
    largest = float(np.abs(centroids).max())
    fractions = np.geomspace(1, 1 / FEWEST_STEPS, CANDIDATES)
    steps = np.unique(np.maximum(largest / LARGEST * fractions, LEAST_STEP)).astype(np.float32)
    errors = [float(sizes @ np.square(centroids - _rounded(centroids, step) * step).sum(1, dtype=np.float64)) for step in steps]
    step = steps[int(np.argmin(errors))]
    return _rounded(centroids, step).astype(np.int8), step


def _rounded(centroids: Floats, step: np.float32) -> Floats:
    rounded: Floats = np.clip(np.rint(centroids / step), -LARGEST, LARGEST)
    return rounded
