"""Makes the jobs of a compression from the source: vectors of matrices, samples of vectors, weights of vectors."""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from cluscomp_export.codebook_rounding import LEAST_STEP
from cluscomp_export.compression.fit_encode import SCALE_RANGE, Computing, Encoding, Fit
from cluscomp_export.compression.moments import Target
from cluscomp_export.planning import CodebookPlan, Plan
from cluscomp_formats.errors import InvalidFileError, Problem
from cluscomp_formats.ir import AnyArray, Model
from cluscomp_formats.progress import Progress, silent
from cluscomp_runtime.memory import trim_heap

__all__ = ["Jobs", "fitted_vectors"]

Floats = npt.NDArray[np.float32]

FIT_VECTORS = 1 << 20
FIT_VECTORS_PER_CLUSTER = 64
"""A codebook with row scales is fitted on at most so many vectors, or so many per cluster if that is more. Activations weight a
few channels a thousand times as much as others, so what counts is a small part of a sample."""

WEAKEST_ROW = SCALE_RANGE[0] / LEAST_STEP
"""Least row scale with a codebook of int8: times the step, a smaller one would leave the range of float16."""


def fitted_vectors(num_clusters: int, num_vectors: int) -> int:
    """How many of the vectors of its matrices a codebook with row scales is fitted on."""
    return min(num_vectors, max(FIT_VECTORS, FIT_VECTORS_PER_CLUSTER * num_clusters))


class Jobs:
    """Makes jobs for the matrices of `plan`; reads one matrix at a time.

    `moments` are the activation second moments of input channels, `[in_features]` by tensor; without any, channels count alike.
    """

    def __init__(self, source: Model, plan: Plan, moments: Mapping[str, Floats], on_progress: Progress = silent) -> None:
        self._source = source
        self._plan = plan
        self._moments = moments
        self._on_progress = on_progress

    def fit(self, book: CodebookPlan, computing: Computing) -> Fit:
        """The job that fits a codebook. Raises InvalidFileError for rows that float16 scales cannot hold."""
        points, weights = self._sample(book, computing.seed)
        return Fit(book, points, weights, computing)

    def encoding(self, name: str, target: Target | None, fitted: Mapping[str, AnyArray], computing: Computing) -> Encoding:
        """The job that encodes a matrix with what the `Fit` of its codebook gave. Raises what `fit` does."""
        out_features, in_features = self._plan.schemes[name].shape
        vectors, scale = self._vectors(name)
        return Encoding(vectors, scale, fitted, self._weights(name, in_features), out_features, target, computing)

    def _vectors(self, name: str) -> tuple[Floats, Floats | None]:
        """Vectors `[num_vectors, cluster_dim]` of the transposed, padded matrix, and the row scales `[out_features]` that were
        divided out (root mean square of each row; 1 for a row of zeros)."""
        scheme = self._plan.schemes[name]
        weight = self._source.tensors[name].decode()
        # Quantised tensors are decoded in pieces, whose memory the heap would keep while most is needed.
        trim_heap()
        scale = None
        if scheme.row_scale:
            rms = np.sqrt(np.mean(np.square(weight, dtype=np.float64), axis=1)).astype(np.float32)
            scale = np.where(rms == 0, np.float32(1), rms).astype(np.float32)
            if scheme.codebook.dtype == "int8":
                scale = np.maximum(scale, np.float32(WEAKEST_ROW))
            if scale.min() < SCALE_RANGE[0] or scale.max() > SCALE_RANGE[1]:
                found = f"rows of root mean square {scale.min():g} to {scale.max():g}"
                expected = f"{SCALE_RANGE[0]:g} to {SCALE_RANGE[1]:g}, the range of float16"
                # Without row scales the centroids are as large as the weights.
                small = scale.max() <= SCALE_RANGE[1]
                remedy = "use `share='none'`, which needs no row scales" if small else "no codebook stores it; get a valid copy"
                raise InvalidFileError(Problem("out_of_range", "row scales do not fit", None, name, found, expected, remedy))
            weight = np.divide(weight, scale[:, None], dtype=np.float32)
        dim = scheme.codebook.cluster_dim
        padded = np.zeros((weight.shape[1], -(-weight.shape[0] // dim) * dim), dtype=np.float32)
        padded[:, : weight.shape[0]] = weight.T
        return padded.reshape(-1, dim), scale

    def _weights(self, name: str, num_vectors: int) -> Floats:
        """One weight per vector `[num_vectors]`: the second moment of its input channel, 1 where that is not known."""
        moments = self._moments.get(name)
        if moments is None:
            return np.ones(num_vectors, dtype=np.float32)
        return np.repeat(moments, num_vectors // len(moments))

    def _sample(self, book: CodebookPlan, seed: int) -> tuple[Floats, Floats | None]:
        """The vectors that a codebook is fitted on, and their weights if any second moments are known.

        All vectors of a matrix without row scales (the paper's setting), else a sample.
        """
        shapes = {name: self._plan.schemes[name].shape for name in book.members}
        counts = {name: shape[1] * -(-shape[0] // book.cluster_dim) for name, shape in shapes.items()}
        total = sum(counts.values())
        share = fitted_vectors(book.num_clusters, total) / total
        samples, weights = [], []
        for done, name in enumerate(book.members):
            self._on_progress(f"reading {book.name}", done, len(book.members))
            vectors, scale = self._vectors(name)
            weight = self._weights(name, len(vectors))
            if scale is not None and share < 1:
                # Seeded by name as well: the sample of a tensor does not depend on the order of the tensors.
                generator = np.random.default_rng([seed, zlib.crc32(name.encode())])
                size = max(1, round(share * len(vectors)))
                chosen = np.sort(generator.choice(len(vectors), size, replace=False, shuffle=False))
                vectors, weight = vectors[chosen], weight[chosen]
            samples.append(vectors)
            weights.append(weight)
        weighted = any(name in self._moments for name in book.members)
        return np.concatenate(samples), np.concatenate(weights) if weighted else None
