"""Turn a plan into a clustered model whose codebooks and codes are computed when a writer asks for them.

Memory stays bounded: a codebook with row scales is fitted on a seeded sample of its tensors' vectors, and codes are made one
tensor at a time, in the order in which writers read them.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from cluscomp_export.error_feedback import ErrorFeedback, InputMoments
from cluscomp_export.planning import CodebookPlan, Plan, Treatment
from cluscomp_export.progress import Progress, silent
from cluscomp_export.work_folder import Forms, WorkFolder
from cluscomp_formats.errors import InvalidFileError, Problem
from cluscomp_formats.ir import AnyArray, Array, ClusteredWeight, Codebook, DenseTensor, Model, Stage, Tensor
from cluscomp_kernels.kmeans import assign, kmeans

__all__ = ["FIT_VECTORS_PER_CLUSTER", "Method", "cluster_model", "unit_bytes"]

Floats = npt.NDArray[np.float32]
Method = Literal["fast", "lloyd"]

FIT_VECTORS_PER_CLUSTER = 64
"""A codebook with row scales is fitted on at most this many vectors per cluster."""

SCALE_RANGE = (2.0**-24, 65504.0)
"""The magnitudes float16 can hold."""


def cluster_model(
    source: Model,
    plan: Plan,
    *,
    method: Method = "fast",
    seed: int = 0,
    threads: int | None = None,
    device: str = "cpu",
    energies: Mapping[str, Floats] | None = None,
    feedback: ErrorFeedback | None = None,
    provenance: Mapping[str, Any] | None = None,
    work: WorkFolder | None = None,
    on_progress: Progress = silent,
) -> Model:
    """A lazy model with the plan's tensors clustered and all others dense; nothing is computed yet.

    Shapes and sizes are known at once, so the result also serves to predict sizes. Reading a codebook fits it (once); reading
    codes or scales encodes that tensor (the last one is kept), so reading in the order of `Model.payloads()` does each tensor
    once; with `feedback` it encodes all blocks up to that tensor's, and keeps them in `work` or, without that, in memory. What
    `work` holds already is not done again, and what is done is kept there. Raises InvalidFileError, on reading, for weights
    that are not finite or out of float16's range, StorageError if `work` cannot be written.
    """
    worker = _Worker(source, plan, energies or {}, method, seed, threads, device, feedback, work, on_progress)
    codebooks = {book.name: worker.codebook(book) for book in plan.codebooks}
    tensors: dict[str, Tensor] = {}
    for name, tensor in source.tensors.items():
        treatment = plan.treatments.get(name)
        if treatment is not None:
            tensors[name] = worker.clustered[name] = worker.weight(name, treatment, codebooks[treatment.codebook.name])
        else:
            tensors[name] = _dense(tensor) if isinstance(tensor, DenseTensor) else tensor
    return Model(source.config, tensors, source.files, provenance or {})


def unit_bytes(model: Model) -> dict[str, int]:
    """What the units of work of a model from `cluster_model` take on the disk, headers not counted: `codebooks`, `tensors`."""
    weights = model.clustered.values()
    codes = sum(stage.codes.nbytes for weight in weights for stage in weight.stages)
    extras = sum(array.nbytes for weight in weights for _, array in weight.extra_arrays)
    return {"codebooks": sum(book.values.nbytes for book in model.codebooks.values()), "tensors": codes + extras}


def _dense(tensor: DenseTensor) -> DenseTensor:
    """The tensor as it is stored: matrices of float32 and float64 as float16, everything else as it was."""
    if tensor.values.dtype not in ("float32", "float64") or len(tensor.shape) < 2:
        return tensor

    def load() -> npt.NDArray[np.float16]:
        values = tensor.decode()
        with np.errstate(over="ignore"):
            narrow = values.astype(np.float16)
        if not np.isfinite(narrow).all():
            found, expected = f"{np.abs(values).max():g}", f"finite values up to {SCALE_RANGE[1]:g}"
            raise InvalidFileError(Problem("out_of_range", "does not fit float16", None, tensor.name, found, expected))
        return narrow

    return DenseTensor(tensor.name, Array(tensor.shape, "float16", load))


class _Worker:
    """Does the work behind the lazy arrays. Keeps the shared codebooks, the last of the others and the last tensor encoded."""

    def __init__(
        self,
        source: Model,
        plan: Plan,
        energies: Mapping[str, Floats],
        method: Method,
        seed: int,
        threads: int | None,
        device: str,
        feedback: ErrorFeedback | None,
        work: WorkFolder | None,
        on_progress: Progress,
    ) -> None:
        self.source = source
        self.plan = plan
        self.energies = energies
        self.method: Method = method
        self.seed = seed
        self.threads = threads
        self.device = device
        self.feedback = feedback
        self.work = work
        self.on_progress = on_progress
        self.clustered: dict[str, ClusteredWeight] = {}
        self.kept: dict[str, dict[str, AnyArray]] = {}
        self.shared: dict[str, npt.NDArray[np.float16]] = {}
        self.fitted: tuple[str, npt.NDArray[np.float16]] | None = None
        self.encoded: tuple[str, npt.NDArray[np.uint16], npt.NDArray[np.float16]] | None = None

    def codebook(self, book: CodebookPlan) -> Codebook:
        return Codebook(book.name, Array((book.num_clusters, book.cluster_dim), "float16", lambda: self._fit(book)))

    def weight(self, name: str, treatment: Treatment, codebook: Codebook) -> ClusteredWeight:
        out_features, in_features = treatment.shape
        shape = (in_features, -(-out_features // codebook.cluster_dim))
        codes = Array(shape, "uint16", lambda: self._encode(name)[0])
        scale = Array((out_features,), "float16", lambda: self._encode(name)[1]) if treatment.row_scale else None
        return ClusteredWeight(name, treatment.shape, (Stage(codebook, codes),), row_scale=scale)

    def _vectors(self, name: str) -> tuple[Floats, Floats | None]:
        """Vectors `[num_vectors, cluster_dim]` of the transposed, padded weight, and the row scales `[out_features]` that
        were divided out (root mean square of each row; 1 for a row of zeros)."""
        treatment = self.plan.treatments[name]
        weight = self.source.tensors[name].decode()
        scale = None
        if treatment.row_scale:
            rms = np.sqrt(np.mean(np.square(weight, dtype=np.float64), axis=1)).astype(np.float32)
            scale = np.where(rms == 0, np.float32(1), rms).astype(np.float32)
            if scale.min() < SCALE_RANGE[0] or scale.max() > SCALE_RANGE[1]:
                found = f"rows of root mean square {scale.min():g} to {scale.max():g}"
                expected = f"{SCALE_RANGE[0]:g} to {SCALE_RANGE[1]:g}, the range of float16"
                remedy = "use --share none, which needs no row scales"
                raise InvalidFileError(Problem("out_of_range", "row scales do not fit", None, name, found, expected, remedy))
            weight = np.divide(weight, scale[:, None], dtype=np.float32)
        dim = treatment.codebook.cluster_dim
        padded = np.zeros((weight.shape[1], -(-weight.shape[0] // dim) * dim), dtype=np.float32)
        padded[:, : weight.shape[0]] = weight.T
        return padded.reshape(-1, dim), scale

    def _weights(self, name: str, num_vectors: int) -> Floats:
        """One weight per vector `[num_vectors]`: the energy of its input channel, 1 where that is not known."""
        energy = self.energies.get(name)
        if energy is None:
            return np.ones(num_vectors, dtype=np.float32)
        return np.repeat(energy, num_vectors // len(energy))

    def _sample(self, book: CodebookPlan) -> tuple[Floats, Floats | None]:
        """The vectors a codebook is fitted on, and their weights if there are any energies.

        All vectors of a matrix without row scales (the paper's setting), else a sample.
        """
        limit = FIT_VECTORS_PER_CLUSTER * book.num_clusters
        shapes = {name: self.plan.treatments[name].shape for name in book.members}
        counts = {name: shape[1] * -(-shape[0] // book.cluster_dim) for name, shape in shapes.items()}
        share = min(1.0, limit / sum(counts.values()))
        samples, weights = [], []
        for done, name in enumerate(book.members):
            self.on_progress(f"reading {book.name}", done, len(book.members))
            vectors, scale = self._vectors(name)
            weight = self._weights(name, len(vectors))
            if scale is not None and share < 1:
                # Seeded by name as well: the sample of a tensor does not depend on the order of the tensors.
                generator = np.random.default_rng([self.seed, zlib.crc32(name.encode())])
                size = max(1, round(share * len(vectors)))
                chosen = np.sort(generator.choice(len(vectors), size, replace=False, shuffle=False))
                vectors, weight = vectors[chosen], weight[chosen]
            samples.append(vectors)
            weights.append(weight)
        weighted = any(name in self.energies for name in book.members)
        return np.concatenate(samples), np.concatenate(weights) if weighted else None

    def _known(self, name: str, forms: Forms) -> dict[str, AnyArray] | None:
        """The arrays of a finished unit of work."""
        return self.kept.get(name) if self.work is None else self.work.load(name, forms)

    def _finished(self, name: str, forms: Forms, compute: Callable[[], dict[str, AnyArray]]) -> dict[str, AnyArray]:
        """The arrays of a unit of work, computed unless they were before."""
        arrays = self._known(name, forms)
        if arrays is None:
            arrays = compute()
            if self.work is not None:
                self.work.save(name, arrays)
            elif self.feedback is not None:
                self.kept[name] = arrays
        return arrays

    def _fit(self, book: CodebookPlan) -> npt.NDArray[np.float16]:
        if book.name in self.shared:
            return self.shared[book.name]
        if self.fitted is None or self.fitted[0] != book.name:
            forms = {"centroids": ("float16", (book.num_clusters, book.cluster_dim))}
            arrays = self._finished(f"codebook {book.name}", forms, lambda: {"centroids": self._centroids(book)})
            self.fitted = (book.name, arrays["centroids"])
            if book.shared:
                self.shared[book.name] = arrays["centroids"]
        return self.fitted[1]

    def _centroids(self, book: CodebookPlan) -> npt.NDArray[np.float16]:
        points, weights = self._sample(book)
        result = kmeans(
            points,
            book.num_clusters,
            weights=weights,
            method=self.method,
            seed=self.seed,
            threads=self.threads,
            device=self.device,
            on_progress=lambda done, total: self.on_progress(f"clustering {book.name}", done, total),
        )
        centroids = np.zeros((book.num_clusters, book.cluster_dim), dtype=np.float16)
        with np.errstate(over="ignore"):
            centroids[: len(result.centroids)] = result.centroids
        if not np.isfinite(centroids).all():
            found = f"a centroid of {np.abs(result.centroids).max():g}"
            expected = f"up to {SCALE_RANGE[1]:g}, the range of float16"
            remedy = "use --share kind, which scales the rows"
            problem = Problem("out_of_range", "centroids do not fit float16", None, book.name, found, expected, remedy)
            raise InvalidFileError(problem)
        return centroids

    def _encode(self, name: str) -> tuple[npt.NDArray[np.uint16], npt.NDArray[np.float16]]:
        if self.encoded is None or self.encoded[0] != name:
            if self.feedback is not None and self.feedback.covers(name):
                self.feedback.reach(name, self.clustered, self._is_encoded, self._encoded)
            arrays = self._encoded(name)
            self.encoded = (name, arrays["codes"], arrays["row_scale"])
        return self.encoded[1:]

    def _forms(self, name: str) -> Forms:
        treatment = self.plan.treatments[name]
        out_features, in_features = treatment.shape
        return {
            "codes": ("uint16", (in_features, -(-out_features // treatment.codebook.cluster_dim))),
            "row_scale": ("float16", (out_features if treatment.row_scale else 0,)),
        }

    def _is_encoded(self, name: str) -> bool:
        return self._known(f"tensor {name}", self._forms(name)) is not None

    def _encoded(self, name: str, moments: InputMoments | None = None) -> dict[str, AnyArray]:
        return self._finished(f"tensor {name}", self._forms(name), lambda: self._codes(name, moments))

    def _codes(self, name: str, moments: InputMoments | None) -> dict[str, AnyArray]:
        treatment = self.plan.treatments[name]
        out_features, in_features = treatment.shape
        centroids = self._fit(treatment.codebook).astype(np.float32)
        vectors, scale = self._vectors(name)
        factors = np.ones(out_features)
        if moments is None:
            codes = assign(vectors, centroids, threads=self.threads, device=self.device).reshape(in_features, -1)
            if scale is not None:
                factors = _scale_factors(vectors, centroids[codes], self._weights(name, in_features), out_features)
        else:
            weights = vectors.reshape(in_features, -1)
            codes, factors = moments.encode(weights, centroids, out_features, threads=self.threads, device=self.device)
        row_scale = np.empty(0) if scale is None else np.clip(scale * factors, *SCALE_RANGE)
        return {"codes": codes, "row_scale": row_scale.astype(np.float16)}


def _scale_factors(vectors: Floats, decoded: Floats, energy: Floats, out_features: int) -> npt.NDArray[np.float64]:
    """What to multiply each row with, `[out_features]`, for the least squared error with these codes.

    `<w, q> / <q, q>` per row, the products weighted by `energy` `[in_features]`.
    """
    wanted, given = (values.reshape(len(energy), -1)[:, :out_features] for values in (vectors, decoded))
    products = np.einsum("i,ir,ir->r", energy, wanted, given, dtype=np.float64)
    energies = np.einsum("i,ir,ir->r", energy, given, given, dtype=np.float64)
    factors: npt.NDArray[np.float64] = np.divide(
        products, energies, out=np.ones(out_features), where=(energies > 0) & (products > 0)
    )
    return factors
