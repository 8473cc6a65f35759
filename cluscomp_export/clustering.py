"""Turn a plan into a clustered model whose codebooks and codes are computed when a writer asks for them.

Memory stays bounded: a codebook with row scales is fitted on a seeded sample of its tensors' vectors, and codes are made one
tensor at a time, in the order in which writers read them.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from cluscomp_export.error_feedback import ErrorFeedback, InputMoments
from cluscomp_export.jobs import SCALE_RANGE, Computing, Encoding, Fit, Method
from cluscomp_export.planning import CodebookPlan, Plan, Treatment
from cluscomp_export.progress import Progress, silent
from cluscomp_export.work_folder import Forms, WorkFolder
from cluscomp_export.workers import Job, Workers
from cluscomp_formats.errors import InvalidFileError, Problem
from cluscomp_formats.ir import AnyArray, Array, ClusteredWeight, Codebook, DenseTensor, Model, Stage, Tensor

__all__ = ["cluster_model", "work_bytes"]

Floats = npt.NDArray[np.float32]

FIT_VECTORS_PER_CLUSTER = 64
"""A codebook with row scales is fitted on at most this many vectors per cluster."""


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
    workers: Workers | None = None,
    on_progress: Progress = silent,
) -> Model:
    """A lazy model with the plan's tensors clustered and all others dense; without `workers` nothing is computed yet.

    Shapes and sizes are known at once, so the result also serves to predict sizes. Reading a codebook fits it (once); reading
    codes or scales encodes that tensor (the last one is kept), so reading in the order of `Model.payloads()` does each tensor
    once; with `feedback` it encodes all blocks up to that tensor's, and keeps them in `work` or, without that, in memory. What
    `work` holds already is not done again, and what is done is kept there. Raises InvalidFileError, on reading, for weights
    that are not finite or out of float16's range, StorageError if `work` cannot be written.

    `workers`, which need a `work`, compute everything at once, with their own number of threads; reading then takes it from
    there. The result is the same. Raises what `Workers.run` does, too.
    """
    computing = Computing(method, seed, threads, device)
    clustering = _Clustering(source, plan, energies or {}, computing, feedback, work, workers, on_progress)
    codebooks = {book.name: clustering.codebook(book) for book in plan.codebooks}
    tensors: dict[str, Tensor] = {}
    for name, tensor in source.tensors.items():
        treatment = plan.treatments.get(name)
        if treatment is not None:
            weight = clustering.weight(name, treatment, codebooks[treatment.codebook.name])
            tensors[name] = clustering.clustered[name] = weight
        else:
            tensors[name] = _dense(tensor) if isinstance(tensor, DenseTensor) else tensor
    if workers is not None:
        clustering.compute_all()
    return Model(source.config, tensors, source.files, provenance or {})


def work_bytes(model: Model) -> int:
    """What all units of work of a model from `cluster_model` take on the disk, in bytes, headers not counted."""
    arrays = [book.values for book in model.codebooks.values()]
    for weight in model.clustered.values():
        arrays += [*(stage.codes for stage in weight.stages), *(array for _, array in weight.extra_arrays)]
    return sum(array.nbytes for array in arrays)


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


class _Clustering:
    """Does the work behind the lazy arrays. Keeps the shared codebooks, the last of the others and the last tensor encoded,
    with error feedback also what belongs to the block that is being done."""

    def __init__(
        self,
        source: Model,
        plan: Plan,
        energies: Mapping[str, Floats],
        computing: Computing,
        feedback: ErrorFeedback | None,
        work: WorkFolder | None,
        workers: Workers | None,
        on_progress: Progress,
    ) -> None:
        self.source = source
        self.plan = plan
        self.energies = energies
        self.computing = computing
        self.feedback = feedback
        self.work = work
        self.workers = workers
        self.on_progress = on_progress
        self.clustered: dict[str, ClusteredWeight] = {}
        self.held: dict[str, dict[str, AnyArray]] = {}
        self.shared: dict[str, npt.NDArray[np.float16]] = {}
        self.fitted: tuple[str, npt.NDArray[np.float16]] | None = None
        self.encoded: tuple[str, npt.NDArray[np.uint16], npt.NDArray[np.float16]] | None = None

    def codebook(self, book: CodebookPlan) -> Codebook:
        return Codebook(book.name, Array((book.num_clusters, book.cluster_dim), "float16", lambda: self._fit(book)))

    def weight(self, name: str, treatment: Treatment, codebook: Codebook) -> ClusteredWeight:
        out_features, in_features = treatment.shape
        shape = (in_features, -(-out_features // codebook.cluster_dim))
        codes = Array(shape, "uint16", lambda: self._codes(name)[0])
        scale = Array((out_features,), "float16", lambda: self._codes(name)[1]) if treatment.row_scale else None
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
                generator = np.random.default_rng([self.computing.seed, zlib.crc32(name.encode())])
                size = max(1, round(share * len(vectors)))
                chosen = np.sort(generator.choice(len(vectors), size, replace=False, shuffle=False))
                vectors, weight = vectors[chosen], weight[chosen]
            samples.append(vectors)
            weights.append(weight)
        weighted = any(name in self.energies for name in book.members)
        return np.concatenate(samples), np.concatenate(weights) if weighted else None

    def compute_all(self) -> None:
        """Have the workers compute every unit of work that is not there yet."""
        books = {_codebook_unit(book): book for book in self.plan.codebooks}
        units = [unit for unit, book in books.items() if self._known(unit, _codebook_forms(book)) is None]
        # The largest first: the last ones keep fewer workers waiting.
        units.sort(key=lambda unit: -books[unit].num_clusters * len(books[unit].members))
        for _ in self._arriving("fitting codebooks", units, lambda unit, how: self._fit_job(books[unit], how)):
            pass
        fed_back = [name for name in self.clustered if self.feedback is not None and self.feedback.covers(name)]
        names = {_tensor_unit(name): name for name in self.clustered if name not in fed_back}
        units = [unit for unit, name in names.items() if self._known(unit, self._forms(name)) is None]
        for _ in self._arriving("encoding matrices", units, lambda unit, how: self._encoding_job(names[unit], None, how)):
            pass
        for name in fed_back:
            self._reach(name)

    def _arriving(
        self, stage: str, units: Sequence[str], prepare: Callable[[str, Computing], Job]
    ) -> Iterator[tuple[str, dict[str, AnyArray]]]:
        """What the workers make of these units, each kept as it arrives."""
        if self.workers is None or self.work is None:
            raise ValueError("workers need a work folder to keep their results in")
        self.on_progress(stage, 0, len(units))
        for done, (unit, arrays) in enumerate(self.workers.run(units, prepare), 1):
            self.work.save(unit, arrays)
            self.on_progress(stage, done, len(units))
            yield unit, arrays

    def _known(self, unit: str, forms: Forms) -> dict[str, AnyArray] | None:
        """The arrays of a finished unit of work."""
        found = self.held.get(unit)
        return found if found is not None or self.work is None else self.work.load(unit, forms)

    def _finished(self, unit: str, forms: Forms, prepare: Callable[[], Job]) -> dict[str, AnyArray]:
        """The arrays of a unit of work, computed unless they were before."""
        arrays = self._known(unit, forms)
        if arrays is None:
            arrays = prepare().run(self.on_progress)
            if self.work is not None:
                self.work.save(unit, arrays)
            elif self.feedback is not None:
                self.held[unit] = arrays
        return arrays

    def _fit(self, book: CodebookPlan) -> npt.NDArray[np.float16]:
        if book.name in self.shared:
            return self.shared[book.name]
        if self.fitted is None or self.fitted[0] != book.name:
            unit, forms = _codebook_unit(book), _codebook_forms(book)
            arrays = self._finished(unit, forms, lambda: self._fit_job(book, self.computing))
            self.fitted = (book.name, arrays["centroids"])
            if book.shared:
                self.shared[book.name] = arrays["centroids"]
        return self.fitted[1]

    def _fit_job(self, book: CodebookPlan, computing: Computing) -> Fit:
        points, weights = self._sample(book)
        return Fit(book, points, weights, computing)

    def _codes(self, name: str) -> tuple[npt.NDArray[np.uint16], npt.NDArray[np.float16]]:
        if self.encoded is None or self.encoded[0] != name:
            self._reach(name)
            prepare = lambda: self._encoding_job(name, None, self.computing)  # noqa: E731
            arrays = self._finished(_tensor_unit(name), self._forms(name), prepare)
            self.encoded = (name, arrays["codes"], arrays["row_scale"])
        return self.encoded[1:]

    def _forms(self, name: str) -> Forms:
        treatment = self.plan.treatments[name]
        out_features, in_features = treatment.shape
        return {
            "codes": ("uint16", (in_features, -(-out_features // treatment.codebook.cluster_dim))),
            "row_scale": ("float16", (out_features if treatment.row_scale else 0,)),
        }

    def _encoding_job(self, name: str, moments: InputMoments | None, computing: Computing) -> Encoding:
        treatment = self.plan.treatments[name]
        out_features, in_features = treatment.shape
        centroids = self._fit(treatment.codebook)
        vectors, scale = self._vectors(name)
        return Encoding(vectors, scale, centroids, self._weights(name, in_features), out_features, moments, computing)

    def _reach(self, name: str) -> None:
        """With error feedback: encode all blocks up to that of the tensor."""
        if self.feedback is not None and self.feedback.covers(name):
            self.feedback.reach(name, self.clustered, self._hold_block, self._encode_block)

    def _hold_block(self, names: Sequence[str]) -> bool:
        """Take up what is finished of the next block. Whether that is all: only then is it certain to be used."""
        if self.work is not None:
            self.held = {}
        found = {_tensor_unit(name): self._known(_tensor_unit(name), self._forms(name)) for name in names}
        self.held.update({unit: arrays for unit, arrays in found.items() if arrays is not None})
        return all(unit in self.held for unit in found)

    def _encode_block(self, moments: Mapping[str, InputMoments]) -> None:
        """Encode those of a block's matrices that are not finished; none depends on another."""
        names = {_tensor_unit(name): name for name in moments if _tensor_unit(name) not in self.held}
        prepare = lambda unit, how: self._encoding_job(names[unit], moments[names[unit]], how)  # noqa: E731
        if self.workers is not None:
            self.held.update(self._arriving("encoding a block", list(names), prepare))
            return
        for unit, name in names.items():
            arrays = self._finished(unit, self._forms(name), functools.partial(prepare, unit, self.computing))
            self.held[unit] = arrays


def _codebook_unit(book: CodebookPlan) -> str:
    return f"codebook {book.name}"


def _codebook_forms(book: CodebookPlan) -> Forms:
    return {"centroids": ("float16", (book.num_clusters, book.cluster_dim))}


def _tensor_unit(name: str) -> str:
    return f"tensor {name}"
