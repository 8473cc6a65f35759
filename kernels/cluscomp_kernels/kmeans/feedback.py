"""`assign_with_feedback`: choose codes channel by channel, feeding each channel's error back into the following ones."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch

from cluscomp_kernels.kmeans import library
from cluscomp_kernels.kmeans.clustering import compute_path
from cluscomp_kernels.kmeans.native_engine import spatial_order
from cluscomp_kernels.kmeans.tiles import outer_boxes, pack_tiles
from cluscomp_kernels.kmeans.torch_engine import nearest_search
from cluscomp_kernels.kmeans.validation import MAX_CLUSTERS, checked_threads, checked_vectors

__all__ = ["assign_with_feedback", "feedback_factor"]

Floats = npt.NDArray[np.float32]
Codes = npt.NDArray[np.uint16]

Search = Callable[[Floats, Floats, Floats, Floats, Floats], Codes]
"""`(weights, importance, targets, errors, factor) -> codes` for a block of channels.

`weights` and `targets` are `[channels, width]`, `importance` `[width]`, `factor` `[channels, channels]`. Overwrites `errors`
`[channels, width]`, and adds the feedback of the errors to `targets`.
"""

BLOCK = 64
"""Channels of a block. Within a block, feedback goes channel by channel; one matrix product feeds back to later blocks."""


def feedback_factor(moments: torch.Tensor, order: torch.Tensor | None = None) -> torch.Tensor:
    """Return the unit upper triangular factor R of `moments = R D R^T`, D diagonal, float64 `[channels, channels]`.

    `moments` is symmetric: the mean of `x x^T` over inputs x. `order`, int64 `[channels]`, first permutes the channels.
    Allocates two more matrices of that size. Raises torch.linalg.LinAlgError unless `moments` is positive definite.
    """
    last_first = (torch.arange(len(moments)) if order is None else order).flip(0)
    # Column-major, as LAPACK expects, so that the factor overwrites the matrix.
    lower = moments.mT[last_first[:, None], last_first].mT
    torch.linalg.cholesky(lower, out=lower)
    lower /= lower.diagonal().clone()
    return lower.flip(0, 1)


def assign_with_feedback(
    weights: Floats,
    centroids: Floats,
    factor: Floats,
    *,
    out_features: int | None = None,
    importance: Floats | None = None,
    threads: int | None = None,
    device: str = "cpu",
) -> Codes:
    """Return codes uint16 `[channels, groups]` that keep `x @ (weights - decoded)` small, chosen greedily in channel order.

    `weights` float32 `[channels, groups * dim]`; `centroids` float32 `[k, dim]`; `factor` float32 `[channels, channels]` from
    `feedback_factor`. Channel k gets the nearest centroids of

        w_k + sum over j < k of (w_j - q_j) factor[j, k]

    where q are the decoded weights. This is the greedy choice of GPTQ (Frantar et al., arXiv 2210.17323) in the form of LDLQ
    (Chee et al., arXiv 2307.13304), which needs no inverse. Squared differences are weighted by the `importance` of their
    columns, float32 `[groups * dim]`, positive, 1 by default: within each vector, error is steered to the columns that matter
    least. Columns from `out_features` on only pad the last group, and their errors do not count. The result is independent of
    the number of threads if torch's float32 matrix products are.

    Raises TypeError if an argument has the wrong type; ValueError if a value is out of range or shapes do not match.
    """
    centroids = checked_vectors(centroids, "centroids")
    dim = centroids.shape[1]
    if len(centroids) > MAX_CLUSTERS:
        raise ValueError(f"at most {MAX_CLUSTERS} centroids are possible (a code fits 16 bits), got {len(centroids)}")
    if weights.ndim != 2 or weights.shape[1] % dim:
        raise ValueError(f"weights must have shape [channels, groups * {dim}], got {list(weights.shape)}")
    channels, width = weights.shape
    weights = checked_vectors(weights.reshape(-1, dim), "weights").reshape(channels, width)
    if factor.dtype != np.float32 or factor.shape != (channels, channels) or not np.isfinite(factor).all():
        raise ValueError(f"factor must be finite float32 [{channels}, {channels}], got {factor.dtype} {list(factor.shape)}")
    rows = width if out_features is None else out_features
    if not width - dim < rows <= width:
        raise ValueError(f"out_features must be {width - dim + 1} to {width} for {width // dim} groups of {dim}, got {rows}")
    if importance is None:
        importance = np.ones(width, dtype=np.float32)
    if importance.dtype != np.float32 or importance.shape != (width,):
        raise ValueError(f"importance must be float32 [{width}], got {importance.dtype} {list(importance.shape)}")
    # Tiles are padded with far points, whose squared distances are infinite: an importance of 0 would make them NaN.
    if not (np.isfinite(importance).all() and (importance > 0).all()):
        raise ValueError("importance must be finite and positive")
    path = compute_path(device)
    search = (
        _native_search(centroids, rows, checked_threads(threads))
        if path == "native"
        else _torch_search(centroids, rows, device)
    )
    shares, targets = torch.from_numpy(factor), torch.from_numpy(weights.copy())
    codes = np.empty((channels, width // dim), dtype=np.uint16)
    for begin in range(0, channels, BLOCK):
        end = min(begin + BLOCK, channels)
        errors = np.empty((end - begin, width), dtype=np.float32)
        inside = np.ascontiguousarray(factor[begin:end, begin:end])
        codes[begin:end] = search(weights[begin:end], importance, targets[begin:end].numpy(), errors, inside)
        targets[end:].addmm_(shares[begin:end, end:].t(), torch.from_numpy(errors))
    return codes


def _native_search(centroids: Floats, out_features: int, threads: int) -> Search:
    dim = centroids.shape[1]
    tiles = pack_tiles(centroids, spatial_order(centroids, threads))
    space = (*tiles.arguments(), *outer_boxes(tiles), centroids, dim)

    def search(weights: Floats, importance: Floats, targets: Floats, errors: Floats, factor: Floats) -> Codes:
        channels, width = weights.shape
        codes = np.empty((channels, width // dim), dtype=np.uint16)
        sizes = (channels, width // dim, out_features, threads, library.INSTRUCTION_LEVEL)
        library.call("cc_kmeans_feedback", *space, weights, importance, targets, errors, codes, factor, *sizes)
        return codes

    return search


def _torch_search(centroids: Floats, out_features: int, device: str) -> Search:
    target = torch.device(device)
    nearest, space = nearest_search(target), torch.from_numpy(centroids).to(target)
    dim = centroids.shape[1]

    def search(weights: Floats, importance: Floats, targets: Floats, errors: Floats, factor: Floats) -> Codes:
        channels, width = weights.shape
        wanted, aims, shares = (torch.from_numpy(values).to(target) for values in (weights, targets, factor))
        counts = torch.from_numpy(importance).to(target).reshape(-1, dim)
        codes = torch.empty((channels, width // dim), dtype=torch.int64, device=target)
        for channel in range(channels):
            codes[channel] = nearest(aims[channel].reshape(-1, dim), space, counts)[0]
            error = wanted[channel] - space[codes[channel]].reshape(-1)
            error[out_features:] = 0
            errors[channel] = error.cpu().numpy()
            aims[channel + 1 :] += shares[channel, channel + 1 :, None] * error
        return codes.cpu().numpy().astype(np.uint16)

    return search
