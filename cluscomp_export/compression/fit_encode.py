"""The two kinds of jobs of a clustering: fit a codebook, encode a matrix.

A job has all arrays that it needs and computes the arrays of one unit of work. It can be pickled, so it may run anywhere, and
it gives the same arrays wherever it runs and with any number of threads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from cluscomp_export.codebook_rounding import round_centroids
from cluscomp_export.compression.moments import Target
from cluscomp_export.planning import CodebookPlan
from cluscomp_formats.errors import InvalidFileError, Problem
from cluscomp_formats.ir import AnyArray
from cluscomp_formats.progress import Progress, silent
from cluscomp_kernels.kmeans import assign, kmeans

__all__ = ["SCALE_RANGE", "Computing", "Encoding", "Fit", "Method"]

Floats = npt.NDArray[np.float32]
Method = Literal["fast", "lloyd"]

SCALE_RANGE = (2.0**-24, 65504.0)
"""The magnitudes that float16 can store."""

LEAST_IMPORTANCE = 0.05
"""Added to the importance of every row, in units of the mean."""


@dataclass(frozen=True)
class Computing:
    """How to compute. `threads` and `device` do not change the result."""

    method: Method = "fast"
    seed: int = 0
    threads: int | None = None
    device: str = "cpu"


@dataclass(frozen=True)
class Fit:
    """Fits the centroids of `book` to `points` `[num_points, cluster_dim]`, weighted by `weights` `[num_points]` if given."""

    book: CodebookPlan
    points: Floats
    weights: Floats | None
    computing: Computing

    def run(self, on_progress: Progress = silent) -> dict[str, AnyArray]:
        """`centroids` `[num_clusters, cluster_dim]` as they are stored, and the `step` float32 `[1]` to multiply them with.

        Raises InvalidFileError if they do not fit float16.
        """
        book, how = self.book, self.computing
        result = kmeans(
            self.points,
            book.num_clusters,
            weights=self.weights,
            method=how.method,
            seed=how.seed,
            threads=how.threads,
            device=how.device,
            on_progress=lambda phase, done, total: on_progress(f"{phase} {book.name}", done, total),
        )
        found_clusters = len(result.centroids)
        centroids = np.zeros((book.num_clusters, book.cluster_dim), dtype=book.dtype)
        step = np.float32(1)
        if book.dtype == "int8":
            sizes = np.bincount(result.codes, self.weights, found_clusters).astype(np.float64)
            centroids[:found_clusters], step = round_centroids(result.centroids, sizes)
        else:
            with np.errstate(over="ignore"):
                centroids[:found_clusters] = result.centroids
        if not np.isfinite(centroids).all():
            found = f"a centroid of {np.abs(result.centroids).max():g}"
            expected = f"up to {SCALE_RANGE[1]:g}, the range of float16"
            remedy = "use `share='kind'`, which scales the rows"
            problem = Problem("out_of_range", "centroids do not fit float16", None, book.name, found, expected, remedy)
            raise InvalidFileError(problem)
        return {"centroids": centroids, "step": np.array([step])}


@dataclass(frozen=True)
class Encoding:
    """Encodes a matrix of `out_features` rows.

    `vectors` `[in_features * groups, cluster_dim]` are those of the transposed, padded matrix, its rows divided by `scale`
    `[out_features]` if that is given; `fitted` is what the `Fit` of its codebook gave. With a `target`, codes are chosen with
    error feedback. Otherwise each vector gets its nearest centroid; `second_moments` `[in_features]` then weights the
    input channels when scales are fitted again.
    """

    vectors: Floats
    scale: Floats | None
    fitted: Mapping[str, AnyArray]
    second_moments: Floats
    out_features: int
    target: Target | None
    computing: Computing

    def run(self, on_progress: Progress = silent) -> dict[str, AnyArray]:
        """`codes` uint16 `[in_features, groups]` and `row_scale` float16 `[out_features]`, or `[0]` without scales."""
        threads, device, out_features = self.computing.threads, self.computing.device, self.out_features
        step = self.fitted["step"]
        centroids = self.fitted["centroids"].astype(np.float32) * step
        factors = np.ones(out_features)
        if self.target is None:
            codes = assign(self.vectors, centroids, threads=threads, device=device).reshape(len(self.second_moments), -1)
            if self.scale is not None:
                factors = _scale_factors(self.vectors, centroids[codes], self.second_moments, out_features)
        else:
            weights, correction = self.vectors.reshape(len(self.second_moments), -1), self.target.correction
            if correction is not None:
                weights = weights.copy()
                weights[:, :out_features] += correction if self.scale is None else correction / self.scale
            importance = _importance(self.target.importance, self.scale, out_features)
            codes, factors = self.target.moments.encode(weights, centroids, importance, threads=threads, device=device)
        row_scale = np.empty(0) if self.scale is None else np.clip(self.scale * factors * step, *SCALE_RANGE)
        return {"codes": codes, "row_scale": row_scale.astype(np.float16)}


def _importance(importance: Floats | None, scale: Floats | None, out_features: int) -> Floats:
    """Weight of a squared error in each row of the vectors, `[out_features]`: more for a row that was scaled down."""
    if importance is None:
        return np.ones(out_features, dtype=np.float32)
    counts = importance.astype(np.float64) * (1.0 if scale is None else np.square(scale, dtype=np.float64))
    mean = counts.mean()
    # A row that is unimportant on one text may be important on another.
    counts = counts / mean + LEAST_IMPORTANCE if mean > 0 else np.ones_like(counts)
    return np.asarray(counts, dtype=np.float32)


def _scale_factors(vectors: Floats, decoded: Floats, second_moments: Floats, out_features: int) -> npt.NDArray[np.float64]:
    """Factor of each row, `[out_features]`, for the least squared error with these codes.

    `<w, q> / <q, q>` per row, the products weighted by `second_moments` `[in_features]`.
    """
    wanted, given = (values.reshape(len(second_moments), -1)[:, :out_features] for values in (vectors, decoded))
    products = np.einsum("i,ir,ir->r", second_moments, wanted, given, dtype=np.float64)
    squares = np.einsum("i,ir,ir->r", second_moments, given, given, dtype=np.float64)
    factors: npt.NDArray[np.float64] = np.divide(
        products, squares, out=np.ones(out_features), where=(squares > 0) & (products > 0)
    )
    return factors
