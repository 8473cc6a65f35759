"""The fused nearest-centroid search on a GPU, in Triton.

A program compares a tile of points with one tile of centroids after another. It keeps the smallest distance and its centroid
per point and lane, and reduces the lanes once at the end. Differences are squared and summed in float32, from the first
dimension to the last, without fused multiply-adds, so the codes equal those of the CPU bit for bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

__all__ = ["BLOCK_CENTROIDS", "BLOCK_POINTS", "WARPS", "nearest_kernel", "nearest_triton"]

BLOCK_POINTS = 32
BLOCK_CENTROIDS = 64
WARPS = 4


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def nearest_kernel(  # type: ignore[no-untyped-def]
    points,
    centroids,
    importance,
    codes,
    distances,
    num_points,
    num_centroids,
    DIM: tl.constexpr,  # noqa: N803
    POINTS: tl.constexpr,  # noqa: N803
    CENTROIDS: tl.constexpr,  # noqa: N803
    WEIGHTED: tl.constexpr,  # noqa: N803
):
    """`points` float32 `[n, DIM]`, `centroids` float32 `[DIM, k]` -> `codes` int32 `[n]`, squared `distances` float32 `[n]`.

    `importance` float32 `[n, DIM]` weights the squared differences; it is not read unless `WEIGHTED`.
    """
    row = tl.program_id(0).to(tl.int64) * POINTS + tl.arange(0, POINTS)
    inside = row < num_points
    least = tl.full((POINTS, CENTROIDS), float("inf"), tl.float32)
    nearest = tl.zeros((POINTS, CENTROIDS), tl.int32)
    for begin in range(0, num_centroids, CENTROIDS):
        column = begin + tl.arange(0, CENTROIDS)
        there = column < num_centroids
        total = tl.zeros((POINTS, CENTROIDS), tl.float32)
        for d in range(DIM):
            x = tl.load(points + row * DIM + d, mask=inside, other=0.0)
            c = tl.load(centroids + d * num_centroids + column, mask=there, other=0.0)
            difference = x[:, None] - c[None, :]
            square = difference * difference
            if WEIGHTED:
                square *= tl.load(importance + row * DIM + d, mask=inside, other=0.0)[:, None]
            total += square
        nearer = (total < least) & there[None, :]
        least = tl.where(nearer, total, least)
        nearest = tl.where(nearer, column[None, :], nearest)
    distance = tl.min(least, axis=1)
    code = tl.min(tl.where(least == distance[:, None], nearest, 2147483647), axis=1)
    tl.store(codes + row, code, mask=inside)
    tl.store(distances + row, distance, mask=inside)


def nearest_triton(
    points: torch.Tensor, centroids: torch.Tensor, importance: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Implement `torch_engine.Search`."""
    num_points, dim = points.shape
    codes = torch.empty(num_points, dtype=torch.int32, device=points.device)
    distances = torch.empty(num_points, dtype=torch.float32, device=points.device)
    # Triton launches on the current device, not on that of the operands.
    with torch.cuda.device_of(points):  # type: ignore[no-untyped-call]
        nearest_kernel[(triton.cdiv(num_points, BLOCK_POINTS),)](
            points,
            centroids.t().contiguous(),
            points if importance is None else importance,
            codes,
            distances,
            num_points,
            len(centroids),
            DIM=dim,
            POINTS=BLOCK_POINTS,
            CENTROIDS=BLOCK_CENTROIDS,
            WEIGHTED=importance is not None,
            num_warps=WARPS,
            enable_fp_fusion=False,
        )
    return codes, distances
