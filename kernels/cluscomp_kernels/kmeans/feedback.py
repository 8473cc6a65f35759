"""`assign_with_feedback`: codes chosen channel after channel, each making up for the errors of those before."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from cluscomp_kernels.kmeans import library
from cluscomp_kernels.kmeans.clustering import compute_path
from cluscomp_kernels.kmeans.native_engine import spatial_order
from cluscomp_kernels.kmeans.tiles import LANES, Tiles, pack_tiles
from cluscomp_kernels.kmeans.torch_engine import nearest_search
from cluscomp_kernels.kmeans.validation import MAX_CLUSTERS, checked_threads, checked_vectors

__all__ = ["assign_with_feedback", "feedback_factor"]

Floats = npt.NDArray[np.float32]
Codes = npt.NDArray[np.uint16]

BLOCK = 64
"""Channels that feed back to each other before a matrix product feeds back to all others."""


def feedback_factor(hessian: torch.Tensor) -> torch.Tensor:
    """The unit upper triangle R of `hessian = R D R^T`, float64 `[channels, channels]`; D is diagonal.

    With it the greedy choice is GPTQ's: channel k aims at `w_k + sum over j < k of (w_j - q_j) R[j, k]`, which makes the later
    channels of less weight cancel what the earlier ones did wrong (the form of Chee et al., "QuIP", arXiv 2307.13304, eq. 5 and
    theorem 6; it needs no inverse). Raises torch.linalg.LinAlgError if `hessian` is not positive definite.
    """
    lower = torch.linalg.cholesky(hessian.flip(0, 1))
    return (lower / lower.diagonal()).flip(0, 1)


def assign_with_feedback(
    weights: Floats,
    centroids: Floats,
    factor: Floats,
    *,
    out_features: int | None = None,
    threads: int | None = None,
    device: str = "cpu",
) -> Codes:
    """Codes uint16 `[channels, groups]` for `weights` float32 `[channels, groups * dim]` that keep `weights.T @ x` small.
    """
    path = compute_path(device)
    channels, width = weights.shape
    dim = centroids.shape[1]
    rows = width if out_features is None else out_features
    search = (_native if path == "native" else _torch)(centroids, rows, checked_threads(threads), path)
    targets = torch.from_numpy(weights.copy())
    errors = torch.zeros_like(targets)
    shares = torch.from_numpy(factor)
    codes = np.empty((channels, width // dim), dtype=np.uint16)
    for begin in range(0, channels, BLOCK):
        block = slice(begin, min(begin + BLOCK, channels))
        inside = np.ascontiguousarray(factor[block, block])
        codes[block] = search(weights[block], targets[block].numpy(), errors[block].numpy(), inside)
        targets[block.stop :].addmm_(shares[block, block.stop :].T, errors[block])
    return codes


def _native(centroids: Floats, out_features: int, threads: int, path: str) -> Callable[..., Codes]:
    order = spatial_order(centroids, threads)
    tiles = pack_tiles(centroids, order)
    dim = centroids.shape[1]
    outer = [_corners(tiles.low, np.minimum), _corners(tiles.high, np.maximum)]

    def search(weights: Floats, targets: Floats, errors: Floats, factor: Floats) -> Codes:
        channels, width = weights.shape
        codes = np.empty((channels, width // dim), dtype=np.uint16)
        sizes = (channels, width // dim, out_features, threads, library.INSTRUCTION_LEVEL)
        library.call(
            "cc_kmeans_feedback", *tiles.arguments(), *outer, centroids, dim, weights, targets, errors, codes, factor, *sizes
        )
        return codes

    return search


def _corners(boxes: Floats, least: Any) -> Floats:
    """Corners of the boxes around every 16 boxes, themselves in lanes."""
    from cluscomp_kernels.kmeans.tiles import _in_lanes

    inner = boxes.copy()
    if least is np.maximum:
        inner[inner >= 1e30] = -1e30
    return _in_lanes(least.reduce(inner, axis=2))
