"""`kmeans` and `assign`: checks, the choice of path, and the start of the centroids."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from cluscomp_kernels import native
from cluscomp_kernels.kmeans.engine import Engine, run_lloyd
from cluscomp_kernels.kmeans.native_engine import NativeEngine, assign_native, spatial_order
from cluscomp_kernels.kmeans.one_dim import assign_values, cluster_values
from cluscomp_kernels.kmeans.torch_engine import TorchEngine, nearest_search
from cluscomp_kernels.kmeans.tree import build_tree
from cluscomp_kernels.kmeans.validation import MAX_CLUSTERS, checked_threads, checked_vectors, checked_weights

__all__ = ["KMeansResult", "assign", "kmeans"]

Floats = npt.NDArray[np.float32]
Codes = npt.NDArray[np.uint16]
Progress = Callable[[int, int], None]
Method = Literal["fast", "lloyd"]

LLOYD_ITERATIONS = 20
"""What the ClusComp paper uses."""
VALUE_ITERATIONS = 300
"""In one dimension an iteration costs next to nothing."""
LARGEST_TREE_DIM = 12
"""Beyond, the tree's cells are long boxes, most dimensions cut once or never: a random sample is a better start."""


@dataclass(frozen=True)
class KMeansResult:
    """A clustering of points `[n, dim]`.

    `centroids` float32 `[k, dim]`; `codes` uint16 `[n]`, the nearest centroid of each point, the lowest index of equally near
    ones; `error`, the sum over points of weight times squared distance; `iterations` made; `method` as asked for; `path`, what
    did the work: `native`, `torch` (no C library) or `cuda`.
    """

    centroids: Floats
    codes: Codes
    error: float
    iterations: int
    method: str
    path: str


def default_iterations(dim: int, method: Method) -> int:
    """Iterations made unless the caller says otherwise; see docs/lab-notes.md for how the fast ones were chosen."""
    if method == "lloyd":
        return LLOYD_ITERATIONS
    if dim == 1:
        return VALUE_ITERATIONS
    return 8 if dim <= LARGEST_TREE_DIM else 12


def kmeans(
    points: Floats,
    num_clusters: int,
    *,
    weights: Floats | None = None,
    iterations: int | None = None,
    seed: int = 0,
    threads: int | None = None,
    device: str = "cpu",
    method: Method = "fast",
    on_progress: Progress | None = None,
) -> KMeansResult:
    """Cluster `points` float32 `[n, dim]`, 1 <= dim <= 64, into `num_clusters` <= 65536 centroids.

    `method="fast"` starts from a greedy tree (beyond 12 dimensions a random sample) and assigns by neighbour lists.
    `method="lloyd"` is plain k-means as in the ClusComp paper: a random sample of the points, then `iterations` rounds of
    exact assignment and means. In both, a cluster that loses its points is revived by splitting the one with the largest
    error: it moves to that cluster's farthest point. Both stop early when nothing moves any more.

    `weights` float32 `[n]`, not negative, scale each point's squared error; all zero means equal centroids as without, and
    error 0. The result has `num_clusters` centroids, or the points themselves where there are fewer; with no more distinct
    points than centroids some centroids repeat. It depends on the seed, not on the number of threads or the CPU.
    `on_progress(done, total)` is called about once a second or oftener.

    Raises TypeError for arguments of the wrong type; ValueError for values out of range, naming the first bad point.
    """
    points = checked_vectors(points, "points")
    if not 1 <= num_clusters <= MAX_CLUSTERS:
        raise ValueError(f"num_clusters must be 1 to {MAX_CLUSTERS} (a code fits 16 bits), got {num_clusters}")
    if method not in ("fast", "lloyd"):
        raise ValueError(f"method must be 'fast' or 'lloyd', got {method!r}")
    count, dim = points.shape
    rounds = default_iterations(dim, method) if iterations is None else iterations
    if rounds < 0:
        raise ValueError(f"iterations must not be negative, got {iterations}")
    scales = checked_weights(weights, count)
    job = _Job(points, scales, num_clusters, rounds, seed, checked_threads(threads), _path(device), on_progress)
    if count <= num_clusters:
        result = job.lossless(method)
    elif dim == 1 and method == "fast":
        result = job.values(method)
    else:
        result = job.lloyd(method)
    if weights is not None and scales is None:
        result = KMeansResult(result.centroids, result.codes, 0.0, result.iterations, method, result.path)
    job.report(rounds)
    return result


def assign(points: Floats, centroids: Floats, *, threads: int | None = None, device: str = "cpu") -> Codes:
    """The nearest of `centroids` float32 `[k, dim]` for each of `points` float32 `[n, dim]`, exactly: uint16 `[n]`.

    Of equally near centroids the lowest index; distances are those of `reference.py`. Raises TypeError for arguments of the
    wrong type; ValueError for values out of range, naming the first bad row.
    """
    points, centroids = checked_vectors(points, "points"), checked_vectors(centroids, "centroids")
    if points.shape[1] != centroids.shape[1]:
        raise ValueError(f"points have dim {points.shape[1]}, centroids dim {centroids.shape[1]}; they must agree")
    if len(centroids) > MAX_CLUSTERS:
        raise ValueError(f"at most {MAX_CLUSTERS} centroids are possible (a code fits 16 bits), got {len(centroids)}")
    return _assign(points, centroids, checked_threads(threads), _path(device), _nothing)


def _nothing() -> None:
    return None


@functools.cache
def _warn_missing(reason: str) -> None:
    warnings.warn(f"k-means runs in torch, many times slower: {reason}", RuntimeWarning, stacklevel=4)


def _path(device: str) -> str:
    kind = torch.device(device).type
    if kind == "cuda":
        return "cuda"
    if kind != "cpu":
        raise ValueError(f"device must be 'cpu' or 'cuda', got {device!r}")
    if native.library() is not None:
        return "native"
    _warn_missing(native.missing_reason())
    return "torch"


def _assign(points: Floats, centroids: Floats, threads: int, path: str, tick: Callable[[], None]) -> Codes:
    if path == "native":
        if points.shape[1] == 1:
            return assign_values(points[:, 0], centroids[:, 0], threads)
        return assign_native(points, centroids, threads, tick)
    engine = _torch_engine(points, None, path, tick)
    engine.assign(centroids, exact=True)
    return engine.codes


def _torch_engine(points: Floats, weights: Floats | None, path: str, tick: Callable[[], None]) -> TorchEngine:
    device = torch.device("cuda" if path == "cuda" else "cpu")
    return TorchEngine(points, weights, device, nearest_search(device), tick)
