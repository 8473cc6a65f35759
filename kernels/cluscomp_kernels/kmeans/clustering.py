"""`kmeans` and `assign`: argument checks, choice of the compute path, and initial centroids."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from cluscomp_kernels import native
from cluscomp_kernels.kmeans.engine import Engine, run_lloyd
from cluscomp_kernels.kmeans.groups import group
from cluscomp_kernels.kmeans.native_engine import NativeEngine, SearchSpace, assign_native, spatial_order
from cluscomp_kernels.kmeans.one_dim import assign_values, cluster_values
from cluscomp_kernels.kmeans.torch_engine import TorchEngine, nearest_search
from cluscomp_kernels.kmeans.tree import build_tree
from cluscomp_kernels.kmeans.validation import MAX_CLUSTERS, checked_threads, checked_vectors, checked_weights

__all__ = ["KMeansResult", "assign", "kmeans"]

Floats = npt.NDArray[np.float32]
Codes = npt.NDArray[np.uint16]
Progress = Callable[[str, int, int], None]
"""As `cluscomp_formats.progress.Progress`, which this package does not import."""
Method = Literal["fast", "lloyd"]

LLOYD_ITERATIONS = 20
"""As in the ClusComp paper (arXiv 2503.13089)."""
VALUE_ITERATIONS = 300
"""Iterations in one dimension, where they cost almost nothing."""


@dataclass(frozen=True)
class KMeansResult:
    """A clustering of points `[n, dim]`.

    `centroids` float32 `[k, dim]`; `codes` uint16 `[n]`, the nearest centroid of each point (the lowest index among equally
    near ones); `error`, the sum over points of weight times squared distance; `iterations`, the number made; `method` as given;
    `path`, the implementation used: `native`, `torch` (no C library) or `cuda`.
    """

    centroids: Floats
    codes: Codes
    error: float
    iterations: int
    method: str
    path: str


def default_iterations(dim: int, method: Method) -> int:
    """Return the default number of iterations; docs/lab-notes.md has the measurements behind those of `fast`."""
    if method == "lloyd":
        return LLOYD_ITERATIONS
    if dim == 1:
        return VALUE_ITERATIONS
    return 8 if dim <= 6 else 10


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

    `method="fast"` starts from a greedy tree and makes a few over-relaxed iterations that assign by neighbour lists.
    `method="lloyd"` is plain k-means as in the ClusComp paper (arXiv 2503.13089): it starts from a random sample of the points
    and makes `iterations` rounds of exact assignment and means. In both methods, an empty cluster is revived by splitting the
    cluster with the largest error: its centroid moves to that cluster's farthest point. Both stop early once no centroid moves.

    `weights` float32 `[n]`, not negative, scale each point's squared error. Weights that are all zero give the same centroids
    as no weights, with error 0. The result has `num_clusters` centroids, or one per point if there are fewer points. If there
    are no more distinct points than centroids, some centroids repeat. The result depends on the seed, but not on the number
    of threads or the CPU. `on_progress("clustering", done, total)` is called at least about once a second.

    Raises TypeError if an argument has the wrong type; ValueError if a value is out of range, naming the first bad point.
    """
    points = checked_vectors(points, "points")
    if not 1 <= num_clusters <= MAX_CLUSTERS:
        raise ValueError(f"num_clusters must be 1 to {MAX_CLUSTERS} (a code fits 16 bits), got {num_clusters}")
    if method not in ("fast", "lloyd"):
        raise ValueError(f"method must be 'fast' or 'lloyd', got {method!r}")
    # Free its memory: clustering needs the space.
    SearchSpace.clear_cache()
    count, dim = points.shape
    rounds = default_iterations(dim, method) if iterations is None else iterations
    if rounds < 0:
        raise ValueError(f"iterations must not be negative, got {iterations}")
    scales = checked_weights(weights, count)
    where = (compute_path(device), torch.device(device))
    job = _Job(points, scales, num_clusters, method, rounds, seed, checked_threads(threads), *where, on_progress)
    if count <= num_clusters:
        result = job.lossless()
    elif dim == 1 and method == "fast":
        result = job.values()
    else:
        result = job.lloyd()
    if weights is not None and scales is None:
        result = replace(result, error=0.0)
    job.finish()
    return result


def assign(points: Floats, centroids: Floats, *, threads: int | None = None, device: str = "cpu") -> Codes:
    """Return the index of the exact nearest centroid of each point, uint16 `[n]`; the lowest index among equally near ones.

    `points` are float32 `[n, dim]`, `centroids` float32 `[k, dim]`. `reference.py` defines the distances.

    Raises TypeError if an argument has the wrong type; ValueError if a value is out of range, naming the first bad row.
    """
    points, centroids = checked_vectors(points, "points"), checked_vectors(centroids, "centroids")
    if points.shape[1] != centroids.shape[1]:
        raise ValueError(f"points have dim {points.shape[1]}, centroids dim {centroids.shape[1]}; they must agree")
    if len(centroids) > MAX_CLUSTERS:
        raise ValueError(f"at most {MAX_CLUSTERS} centroids are possible (a code fits 16 bits), got {len(centroids)}")
    return _assign(points, centroids, checked_threads(threads), compute_path(device), torch.device(device), _nothing)


@dataclass
class _Job:
    """One call of `kmeans`, with checked arguments."""

    points: Floats
    weights: Floats | None
    num_clusters: int
    method: Method
    iterations: int
    seed: int
    threads: int
    path: str
    device: torch.device
    on_progress: Progress | None
    done: int = field(default=0, init=False)

    def tick(self) -> None:
        """Report progress. The start, each iteration and the final assignment count as one unit each."""
        if self.on_progress is not None:
            self.on_progress("clustering", self.done, self.iterations + 2)

    def finish(self) -> None:
        self.done = self.iterations + 2
        self.tick()

    def after_iteration(self, done: int) -> None:
        self.done = done + 1
        self.tick()

    def result(self, centroids: Floats, codes: Codes, error: float, iterations: int) -> KMeansResult:
        return KMeansResult(centroids, codes, error, iterations, self.method, self.path)

    def assigned(self, centroids: Floats) -> Codes:
        return _assign(self.points, centroids, self.threads, self.path, self.device, self.tick)

    def lossless(self) -> KMeansResult:
        """Use the points as centroids, if there are no more points than clusters."""
        centroids = self.points.copy()
        return self.result(centroids, self.assigned(centroids), 0.0, 0)

    def values(self) -> KMeansResult:
        """Cluster points of one dimension."""
        values = self.points[:, 0]
        centroids, done = cluster_values(values, self.weights, self.num_clusters, self.iterations)
        self.after_iteration(done)
        codes = self.assigned(centroids[:, None])
        squares = np.square(values - centroids[codes])
        total = squares.sum(dtype=np.float64) if self.weights is None else np.dot(squares, self.weights.astype(np.float64))
        return self.result(centroids[:, None], codes, float(total), done)

    def lloyd(self) -> KMeansResult:
        """Run Lloyd iterations from a tree or from a sample."""
        self.tick()
        starts_from_tree = self.method == "fast" and native.library() is not None
        if self.path != "native":
            centroids = self.tree_start()[0] if starts_from_tree else self.sample()
            self.after_iteration(0)
            return self.result(*self.run(_torch_engine(self.points, self.weights, self.device, self.tick), centroids))
        if starts_from_tree:
            centroids, points, weights, codes, order = self.tree_start()
        else:
            centroids = self.sample()
            centroids = np.ascontiguousarray(centroids[spatial_order(centroids, self.threads)])
            near = self.near_codes(centroids)
            order = group(near, len(centroids)).order
            points, codes = self.points[order], near[order]
            weights = None if self.weights is None else self.weights[order]
        self.after_iteration(0)
        engine = NativeEngine(points, weights, codes, self.num_clusters, threads=self.threads, tick=self.tick)
        centroids, moved_codes, error, done = self.run(engine, centroids)
        codes = np.empty_like(moved_codes)
        codes[order] = moved_codes
        return self.result(centroids, codes, error, done)

    def near_codes(self, centroids: Floats) -> Codes:
        """Return a near centroid of each point, uint16 `[n]`. The search space is not cached: clustering needs the memory."""
        space = SearchSpace.build(centroids, self.threads, self.tick)
        return assign_native(self.points, space, self.threads, self.tick, exact=False)

    def run(self, engine: Engine, centroids: Floats) -> tuple[Floats, Codes, float, int]:
        plain = self.method == "lloyd"
        centroids, error, done = run_lloyd(
            engine, centroids, self.iterations, plain=plain, after_iteration=self.after_iteration
        )
        return centroids, engine.codes, error, done

    def sample(self) -> Floats:
        """Return a random sample of the points, without repetition."""
        rows = np.random.default_rng(self.seed).choice(len(self.points), self.num_clusters, replace=False)
        return self.points[rows]

    def tree_start(self) -> tuple[Floats, Floats, Floats | None, Codes, npt.NDArray[np.int32]]:
        """Return `(centroids, points, weights, codes, order)` of a greedy tree; points, weights and codes are in tree order.

        If the tree runs out of distinct points, the last centroid is repeated.
        """
        order = np.arange(len(self.points), dtype=np.int32)
        points = self.points.copy()
        weights = None if self.weights is None else self.weights.copy()
        tree = build_tree(points, weights, order, self.num_clusters, self.threads)
        missing = self.num_clusters - len(tree.means)
        centroids = np.concatenate((tree.means, np.repeat(tree.means[-1:], missing, axis=0)))
        return centroids, points, weights, tree.codes(), order


def _nothing() -> None:
    return None


@functools.cache
def _warn_missing(reason: str) -> None:
    warnings.warn(f"k-means runs in torch and is many times slower: {reason}", RuntimeWarning, stacklevel=4)


def compute_path(device: str) -> str:
    kind = torch.device(device).type
    if kind == "cuda":
        return "cuda"
    if kind != "cpu":
        raise ValueError(f"device must be 'cpu' or 'cuda', got {device!r}")
    if native.library() is not None:
        return "native"
    _warn_missing(native.missing_reason())
    return "torch"


def _assign(
    points: Floats, centroids: Floats, threads: int, path: str, device: torch.device, tick: Callable[[], None]
) -> Codes:
    if path == "native":
        if points.shape[1] == 1:
            return assign_values(points[:, 0], centroids[:, 0], threads)
        return assign_native(points, SearchSpace.cached(centroids, threads, tick), threads, tick)
    engine = _torch_engine(points, None, device, tick)
    engine.assign(centroids, exact=True)
    return engine.codes


def _torch_engine(points: Floats, weights: Floats | None, device: torch.device, tick: Callable[[], None]) -> TorchEngine:
    return TorchEngine(points, weights, device, nearest_search(device), tick)
