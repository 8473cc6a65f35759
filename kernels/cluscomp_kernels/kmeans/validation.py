"""Checks of the arguments of the k-means kernel."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["MAX_CLUSTERS", "MAX_DIM", "checked_threads", "checked_vectors", "checked_weights"]

Floats = npt.NDArray[np.float32]

MAX_CLUSTERS = 65536
"""A code fits 16 bits."""
MAX_DIM = 64
MAX_POINTS = 2**31 - 1
MAX_MAGNITUDE = 1e17
"""Squared distances of larger values would overflow float32."""

ROWS_PER_CHECK = 1 << 20


def checked_vectors(values: Any, what: str) -> Floats:
    """Return `values` as a C-contiguous float32 `[n, dim]` array, after checking 1 <= dim <= 64, 1 <= n < 2**31 and all values.

    Raises TypeError if the type or dtype is wrong; ValueError if the shape is wrong, or if a value is not finite or exceeds
    1e17 in magnitude, naming the first one.
    """
    if not isinstance(values, np.ndarray) or values.dtype != np.float32:
        found = values.dtype if isinstance(values, np.ndarray) else type(values).__name__
        raise TypeError(f"{what} must be a float32 numpy array, got {found}")
    if values.ndim != 2 or not 1 <= values.shape[1] <= MAX_DIM:
        raise ValueError(f"{what} must have shape [n, dim] with dim 1 to {MAX_DIM}, got {list(values.shape)}")
    if not 1 <= len(values) <= MAX_POINTS:
        raise ValueError(f"{what} must have 1 to {MAX_POINTS} rows, got {len(values)}")
    vectors = np.ascontiguousarray(values)
    for begin in range(0, len(vectors), ROWS_PER_CHECK):
        piece = vectors[begin : begin + ROWS_PER_CHECK]
        # A comparison with NaN is false, so this catches NaN and infinities too.
        if not (piece.min() >= -MAX_MAGNITUDE and piece.max() <= MAX_MAGNITUDE):
            bad = ~(np.abs(piece) <= MAX_MAGNITUDE)
            row, column = np.argwhere(bad)[0]
            limit = f"finite and at most {MAX_MAGNITUDE:g} in magnitude"
            raise ValueError(f"{what}[{begin + row}, {column}] is {piece[row, column]}; all values must be {limit}")
    return vectors


def checked_weights(weights: Any, num_points: int) -> Floats | None:
    """Return `weights` as a float32 `[num_points]` array, after checking its values; None if there are none or all are zero.

    Raises TypeError if the type or dtype is wrong; ValueError if the shape is wrong, or if a weight is negative or not finite,
    naming the first one.
    """
    if weights is None:
        return None
    if not isinstance(weights, np.ndarray) or weights.dtype != np.float32:
        found = weights.dtype if isinstance(weights, np.ndarray) else type(weights).__name__
        raise TypeError(f"weights must be a float32 numpy array, got {found}")
    if weights.shape != (num_points,):
        raise ValueError(f"weights must have shape [{num_points}], one per point, got {list(weights.shape)}")
    bad = np.flatnonzero(~(np.isfinite(weights) & (weights >= 0)))
    if len(bad):
        raise ValueError(f"weights[{bad[0]}] is {weights[bad[0]]}; all weights must be finite and not negative")
    return np.ascontiguousarray(weights) if weights.any() else None


def checked_threads(threads: int | None) -> int:
    """Return `threads`, at most 256, or by default the number of CPUs of this process. Raises ValueError if below 1."""
    if threads is None:
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if threads < 1:
        raise ValueError(f"threads must be at least 1, got {threads}")
    return min(threads, 256)
