"""Where the weights of a matrix have quantisation error: a trial with a small codebook.

Errors are not spread evenly. A codebook weighted by activations favours the input channels with large second moments. Their
weights are often small and then have little error, and the gradients of the loss can be concentrated in exactly these
channels. The trial clusters pairs of weights like a real conversion, with row scales and second moments.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from cluscomp_export.planning.candidates import expected_error
from cluscomp_kernels.kmeans import assign, kmeans

__all__ = ["trial_errors"]

Floats = npt.NDArray[np.float32]

CLUSTER_DIM = 2
NUM_CLUSTERS = 64
SAMPLE = 16384
"""Vectors to which the codebook is fitted, evenly spaced."""
ROWS = 4096
"""Rows processed at a time, a multiple of the dimension."""


def trial_errors(weight: Floats, second_moments: Floats, *, row_scale: bool, threads: int | None = None) -> Floats:
    """Errors of a matrix `[out_features, in_features]`, scaled so that theory expects the sum of squares of the matrix.

    `second_moments` `[in_features]` are the second moments that weight the input channels.
    """
    out_features, in_features = weight.shape
    rms = np.sqrt(np.mean(np.square(weight, dtype=np.float64), axis=1 if row_scale else None, keepdims=True))
    scale = np.broadcast_to(np.where(rms == 0, 1, rms), (out_features, 1)).astype(np.float32)
    pieces = max(1, out_features // CLUSTER_DIM)
    count = in_features * pieces
    chosen = np.arange(0, count, max(1, count // SAMPLE))
    channels, groups = chosen % in_features, chosen // in_features
    places = np.minimum(groups[:, None] * CLUSTER_DIM + np.arange(CLUSTER_DIM), out_features - 1)
    sample = np.ascontiguousarray(weight[places, channels[:, None]] / scale[places, 0])
    clusters = min(NUM_CLUSTERS, len(sample))
    centroids = kmeans(sample, clusters, weights=np.ascontiguousarray(second_moments[channels]), threads=threads).centroids
    expected = np.float32(expected_error(CLUSTER_DIM, clusters, 1 << 62))
    errors = np.empty_like(weight)
    for begin in range(0, out_features, ROWS):
        rows = slice(begin, min(begin + ROWS, out_features))
        scaled = (weight[rows] / scale[rows]).T
        padded = np.zeros((in_features, -(-scaled.shape[1] // CLUSTER_DIM) * CLUSTER_DIM), dtype=np.float32)
        padded[:, : scaled.shape[1]] = scaled
        given = centroids[assign(padded.reshape(-1, CLUSTER_DIM), centroids, threads=threads)].reshape(padded.shape)
        errors[rows] = (given[:, : scaled.shape[1]] - scaled).T * (scale[rows] / np.sqrt(expected))
    return errors
