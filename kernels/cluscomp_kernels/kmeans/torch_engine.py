"""Clustering in torch: on a GPU with the Triton search, and on a CPU without the C library."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from cluscomp_kernels.kmeans.means import Indices, Means

__all__ = ["Search", "TorchEngine", "nearest_search", "nearest_torch"]

Floats = npt.NDArray[np.float32]
Codes = npt.NDArray[np.uint16]

POINTS_PER_LAUNCH = 1 << 20
DISTANCES_PER_CHUNK = 1 << 23


class Search(Protocol):
    """Finds the nearest centroids."""

    def __call__(
        self, points: torch.Tensor, centroids: torch.Tensor, importance: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return `(codes, distances)` of the nearest of `centroids` `[k, dim]` for `points` `[n, dim]`.

        `codes` are int32 `[n]`, the lowest index among equally near centroids; `distances` are squared, float32 `[n]`. The
        operands are contiguous float32 tensors on one device. `importance` `[n, dim]`, positive, weights the squared
        differences.
        """


def nearest_search(device: torch.device) -> Search:
    """Return the brute-force search for a device."""
    if device.type == "cuda" and importlib.util.find_spec("triton") is not None:
        from cluscomp_kernels.kmeans.triton_nearest import nearest_triton

        return nearest_triton
    return nearest_torch


def _distances(points: torch.Tensor, centroids: torch.Tensor, importance: torch.Tensor | None) -> torch.Tensor:
    """Return the float32 distances of `reference.py` from `points` `[n, dim]` to `centroids` `[n or 1, k or 1, dim]`."""
    total = torch.zeros(1, device=points.device)
    for d in range(points.shape[1]):
        squares = (points[:, None, d] - centroids[:, :, d]).square_()
        total = total + (squares if importance is None else squares.mul_(importance[:, None, d]))
    return total


def nearest_torch(
    points: torch.Tensor, centroids: torch.Tensor, importance: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Implement `Search` in torch.

    A float64 matrix product ranks the centroids. The float32 distances to all centroids are computed only for points whose two
    nearest centroids differ by less than the accuracy of a float32 distance.
    """
    dim = points.shape[1]
    codes = torch.empty(len(points), dtype=torch.int32, device=points.device)
    distances = torch.empty(len(points), dtype=torch.float32, device=points.device)
    wide = centroids.double()
    half_squares = wide.square() / 2
    half_norms = half_squares.sum(1)
    # Twice the relative error of a float32 distance; the second term covers float64 cancellation and float32 underflow.
    relative = 4 * (dim + 3) * 2.0**-24
    largest = half_norms.max() * (1.0 if importance is None else importance.max())
    step = max(1, DISTANCES_PER_CHUNK // len(centroids))
    for begin in range(0, len(points), step):
        x = points[begin : begin + step]
        weight = None if importance is None else importance[begin : begin + step]
        x_wide = x.double()
        weighted = x_wide if weight is None else x_wide * weight
        x_half = (weighted * x_wide).sum(1) / 2
        norms = half_norms if weight is None else weight.double() @ half_squares.t()
        scores = torch.addmm(norms, weighted, wide.t(), alpha=-1)
        least, code = scores.min(1)
        margin = relative * (least + x_half).clamp(min=0) + 1e-12 * (x_half + largest) + 1e-36
        unclear = (scores <= (least + margin)[:, None]).sum(1) > 1
        rows = unclear.nonzero()[:, 0]
        if len(rows):
            code[rows] = _distances(x[rows], centroids[None], None if weight is None else weight[rows]).argmin(1)
        codes[begin : begin + step] = code.to(torch.int32)
        distances[begin : begin + step] = _distances(x, centroids[code, None], weight)[:, 0]
    return codes, distances


class TorchEngine:
    """An `Engine` of brute-force searches over `points` `[n, dim]` on `device`. Every assignment is exact.

    Points are sorted by code and summed cluster by cluster, in float64, so results do not depend on timing.
    """

    def __init__(
        self, points: Floats, weights: Floats | None, device: torch.device, search: Search, tick: Callable[[], None]
    ) -> None:
        self._points = torch.from_numpy(points).to(device)
        self._weights = None if weights is None else torch.from_numpy(weights).to(device).double()
        self._search = search
        self._tick = tick
        self._codes = torch.zeros(len(points), dtype=torch.int32, device=device)
        self._distances = torch.zeros(len(points), dtype=torch.float32, device=device)

    @property
    def codes(self) -> Codes:
        return self._codes.cpu().numpy().astype(np.uint16)

    def assign(self, centroids: Floats, *, exact: bool) -> None:
        del exact
        on_device = torch.from_numpy(centroids).to(self._points.device)
        # Each step takes a few seconds at most, so that the caller can interrupt.
        step = POINTS_PER_LAUNCH if self._points.is_cuda else max(1, (1 << 31) // centroids.size)
        for begin in range(0, len(self._points), step):
            end = begin + step
            self._codes[begin:end], self._distances[begin:end] = self._search(self._points[begin:end], on_device)
            self._tick()

    def update(self, centroids: Floats) -> Means:
        count = len(centroids)
        codes = self._codes.long()
        order = torch.argsort(codes, stable=True)
        lengths = torch.bincount(codes, minlength=count)
        shares = self._distances.double()
        vectors = self._points[order].double()
        if self._weights is None:
            mass = lengths.double()
        else:
            shares = shares * self._weights
            vectors = vectors * self._weights[order, None]
            mass = torch.segment_reduce(self._weights[order], "sum", lengths=lengths)
        sums = torch.segment_reduce(vectors, "sum", lengths=lengths, axis=0)
        error = torch.segment_reduce(shares[order], "sum", lengths=lengths)
        worst = torch.zeros(count, dtype=torch.float64, device=codes.device).scatter_reduce_(0, codes, shares, "amax")
        at_worst = ((shares == worst[codes]) & (shares > 0)).nonzero()[:, 0]
        farthest = torch.full((count,), len(codes), device=codes.device)
        farthest.scatter_reduce_(0, codes[at_worst], at_worst, "amin")
        farthest[farthest == len(codes)] = -1
        alive = mass > 0
        means = torch.from_numpy(centroids).to(codes.device).clone()
        means[alive] = (sums[alive] / mass[alive, None]).float()
        parts = (means, mass, error, farthest.to(torch.int32))
        return Means(*(part.cpu().numpy() for part in parts))

    def points_at(self, indices: npt.NDArray[np.int32]) -> Floats:
        found: Floats = self._points[torch.from_numpy(indices).long().to(self._points.device)].cpu().numpy()
        return found

    def centroids_revived(self, revived: Indices, donors: Indices) -> None:
        """Do nothing: no neighbours are cached between assignments."""
