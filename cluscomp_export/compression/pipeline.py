"""Turn a plan into a clustered model whose codebooks and codes are computed when a writer asks for them.

Memory stays bounded: a codebook with row scales is fitted on a seeded sample of its tensors' vectors, and codes are made one
tensor at a time, in the order in which writers read them.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from cluscomp_export.compression.codebook_rounding import LEAST_STEP
from cluscomp_export.compression.error_feedback import ErrorFeedback, Goal, block_index
from cluscomp_export.compression.fit_encode import SCALE_RANGE, Computing, Encoding, Fit, Method
from cluscomp_export.compression.unit_order import UnitOrder, discard_void
from cluscomp_export.compression.workers.local import Job, Workers
from cluscomp_export.planning import CodebookPlan, Plan, Treatment
from cluscomp_export.progress import Progress, silent
from cluscomp_export.training.loop import Curve, Trained, curve_array, curve_entries, curve_form
from cluscomp_export.work_folder import Forms, WorkFolder
from cluscomp_formats.architectures import describe
from cluscomp_formats.errors import InvalidFileError, Problem
from cluscomp_formats.ir import AnyArray, Array, ClusteredWeight, Codebook, DenseTensor, Model, Stage, Tensor
from cluscomp_formats.parameters import codebook_name, norm_name, parameters, row_scale_name
from cluscomp_runtime.memory import trim_heap

__all__ = ["FIT_VECTORS_PER_CLUSTER", "cluster_model", "dense_as_stored", "unit_bytes"]

Floats = npt.NDArray[np.float32]

FIT_VECTORS_PER_CLUSTER = 64
"""A codebook with row scales is fitted on at most this many vectors per cluster."""

_CURVE = "curve"
"""Of a tuned block's arrays the one that is no parameter."""

WEAKEST_ROW = SCALE_RANGE[0] / LEAST_STEP
"""With a codebook of int8 no row counts as weaker: its scale, times the step, would leave the range of float16."""


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
            tensors[name] = clustering.weight(name, treatment, codebooks[treatment.codebook.name])
        else:
            tensors[name] = clustering.dense(tensor) if isinstance(tensor, DenseTensor) else tensor
    clustering.tensors.update(tensors)
    if work is not None:
        clustering.discard_void(work)
    if workers is not None:
        clustering.compute_all()
    return Model(source.config, tensors, source.files, provenance or {})


def unit_bytes(model: Model) -> dict[str, int]:
    """What the units of work of a model from `cluster_model` take on the disk, headers not counted: `codebooks`, `tensors`, and
    of these the `scales`."""
    weights = model.clustered.values()
    codes = sum(stage.codes.nbytes for weight in weights for stage in weight.stages)
    extras = sum(array.nbytes for weight in weights for _, array in weight.extra_arrays)
    return {
        "codebooks": sum(book.values.nbytes for book in model.codebooks.values()),
        "tensors": codes + extras,
        "scales": extras,
    }


def dense_as_stored(tensor: DenseTensor) -> DenseTensor:
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
        self.tensors: dict[str, Tensor] = {}
        self.tuned: tuple[int, dict[str, AnyArray] | None] | None = None
        self.held: dict[str, dict[str, AnyArray]] = {}
        self.shared: dict[str, dict[str, AnyArray]] = {}
        self.fitted: tuple[str, dict[str, AnyArray]] | None = None
        self.encoded: tuple[str, npt.NDArray[np.uint16], npt.NDArray[np.float16]] | None = None

    def codebook(self, book: CodebookPlan) -> Codebook:
        def load() -> AnyArray:
            if _blocks(book) == {index}:
                return self._tuned_value(codebook_name(book.name), book.members[0], lambda: self._fit(book)["centroids"])
            return self._fit(book)["centroids"]

        index = block_index(book.members[0])
        return Codebook(book.name, Array((book.num_clusters, book.cluster_dim), book.dtype, load))

    def weight(self, name: str, treatment: Treatment, codebook: Codebook) -> ClusteredWeight:
        out_features, in_features = treatment.shape
        shape = (in_features, -(-out_features // codebook.cluster_dim))
        codes = Array(shape, "uint16", lambda: self._codes(name)[0])
        scale = None
        if treatment.row_scale:
            load = lambda: self._tuned_value(row_scale_name(name), name, lambda: self._codes(name)[1])  # noqa: E731
            scale = Array((out_features,), "float16", load)
        return ClusteredWeight(name, treatment.shape, (Stage(codebook, codes),), row_scale=scale)

    def dense(self, tensor: DenseTensor) -> DenseTensor:
        stored = dense_as_stored(tensor)
        values = stored.values
        load = lambda: self._tuned_value(norm_name(tensor.name), tensor.name, values.read)  # noqa: E731
        return replace(stored, values=Array(values.shape, values.dtype, load))

    def _vectors(self, name: str) -> tuple[Floats, Floats | None]:
        """Vectors `[num_vectors, cluster_dim]` of the transposed, padded weight, and the row scales `[out_features]` that
        were divided out (root mean square of each row; 1 for a row of zeros)."""
        treatment = self.plan.treatments[name]
        weight = self.source.tensors[name].decode()
        # Quantised tensors are decoded in pieces, whose space the heap would keep while the most is needed.
        trim_heap()
        scale = None
        if treatment.row_scale:
            rms = np.sqrt(np.mean(np.square(weight, dtype=np.float64), axis=1)).astype(np.float32)
            scale = np.where(rms == 0, np.float32(1), rms).astype(np.float32)
            if treatment.codebook.dtype == "int8":
                scale = np.maximum(scale, np.float32(WEAKEST_ROW))
            if scale.min() < SCALE_RANGE[0] or scale.max() > SCALE_RANGE[1]:
                found = f"rows of root mean square {scale.min():g} to {scale.max():g}"
                expected = f"{SCALE_RANGE[0]:g} to {SCALE_RANGE[1]:g}, the range of float16"
                # Without row scales the centroids are as large as the weights.
                small = scale.max() <= SCALE_RANGE[1]
                remedy = "use --share none, which needs no row scales" if small else "no codebook holds it; get a sound copy"
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

    def discard_void(self, work: WorkFolder) -> None:
        """Delete the finished units that cannot be used, because others that they were computed from are not there."""
        forms = {_tensor_unit(name): self._forms(name) for name in self.plan.treatments}
        chained = [name for name in self.plan.treatments if self._is_fed_back(name)]
        steps: list[Mapping[str, Forms]] = []
        blocks = {index for name in self.tensors if (index := block_index(name)) is not None}
        for index in sorted(blocks) if self.feedback is not None else ():
            units = [[_tensor_unit(name) for name in step.weights] for step in describe(self.source.config).blocks[index].steps]
            steps += [{unit: forms[unit] for unit in step if unit in forms} for step in units]
            if self.feedback is not None and self.feedback.tuning is not None:
                steps.append({_block_unit(index): self._tuned_forms(index)})
        steps.append({_tensor_unit(name): forms[_tensor_unit(name)] for name in chained if block_index(name) is None})
        order = UnitOrder(
            codebooks={_codebook_unit(book): _codebook_forms(book) for book in self.plan.codebooks},
            alone={unit: forms[unit] for name in self.plan.treatments if name not in chained and (unit := _tensor_unit(name))},
            steps=steps,
            codebook_of={_tensor_unit(name): _codebook_unit(each.codebook) for name, each in self.plan.treatments.items()},
        )
        count = discard_void(work, order, from_scratch=work.started)
        if count:
            self.on_progress(f"discarding {count} parts that were computed from missing ones", count, count)

    def compute_all(self) -> None:
        """Have the workers compute every unit of work that is not there yet."""
        books = {_codebook_unit(book): book for book in self.plan.codebooks}
        units = [unit for unit, book in books.items() if self._known(unit, _codebook_forms(book)) is None]
        # The largest first: the last ones keep fewer workers waiting.
        units.sort(key=lambda unit: -books[unit].num_clusters * len(books[unit].members))
        for _ in self._arriving("fitting codebooks", units, lambda unit, how: self._fit_job(books[unit], how)):
            pass
        fed_back = [name for name in self.plan.treatments if self._is_fed_back(name)]
        members = [name for book in self.plan.codebooks for name in book.members]
        names = {_tensor_unit(name): name for name in members if name not in fed_back}
        units = [unit for unit, name in names.items() if self._known(unit, self._forms(name)) is None]
        for _ in self._arriving("encoding matrices", units, lambda unit, how: self._encoding_job(names[unit], None, how)):
            pass
        for name in fed_back:
            if self._known(_tensor_unit(name), self._forms(name)) is None or self._awaits_tuning(name):
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

    def _fit(self, book: CodebookPlan) -> dict[str, AnyArray]:
        """What a `Fit` of the codebook gives."""
        if book.name in self.shared:
            return self.shared[book.name]
        if self.fitted is None or self.fitted[0] != book.name:
            unit, forms = _codebook_unit(book), _codebook_forms(book)
            arrays = self._finished(unit, forms, lambda: self._fit_job(book, self.computing))
            self.fitted = (book.name, arrays)
            if book.shared:
                self.shared[book.name] = arrays
        return self.fitted[1]

    def _fit_job(self, book: CodebookPlan, computing: Computing) -> Fit:
        points, weights = self._sample(book)
        return Fit(book, points, weights, computing)

    def _codes(self, name: str) -> tuple[npt.NDArray[np.uint16], npt.NDArray[np.float16]]:
        if self.encoded is None or self.encoded[0] != name:
            unit, forms = _tensor_unit(name), self._forms(name)
            arrays = self._known(unit, forms)
            if arrays is None:
                self._reach(name)
                if self.work is not None and not self._is_fed_back(name):
                    self._encode_members(self.plan.treatments[name].codebook)
                arrays = self._finished(unit, forms, lambda: self._encoding_job(name, None, self.computing))
            self.encoded = (name, arrays["codes"], arrays["row_scale"])
        return self.encoded[1:]

    def _encode_members(self, book: CodebookPlan) -> None:
        """Have the matrices of a codebook encoded one after the other: a search among the same centroids is set up once."""
        members = [name for name in book.members if not self._is_fed_back(name)]
        for done, name in enumerate(members):
            self.on_progress("encoding matrices", done, len(members))
            job = functools.partial(self._encoding_job, name, None, self.computing)
            self._finished(_tensor_unit(name), self._forms(name), job)

    def _is_fed_back(self, name: str) -> bool:
        """Whether the tensor gets its codes in the order of the model."""
        return self.feedback is not None and self.feedback.serves(name)

    def _forms(self, name: str) -> Forms:
        treatment = self.plan.treatments[name]
        out_features, in_features = treatment.shape
        return {
            "codes": ("uint16", (in_features, -(-out_features // treatment.codebook.cluster_dim))),
            "row_scale": ("float16", (out_features if treatment.row_scale else 0,)),
        }

    def _encoding_job(self, name: str, goal: Goal | None, computing: Computing) -> Encoding:
        treatment = self.plan.treatments[name]
        out_features, in_features = treatment.shape
        fitted = self._fit(treatment.codebook)
        vectors, scale = self._vectors(name)
        return Encoding(vectors, scale, fitted, self._weights(name, in_features), out_features, goal, computing)

    def _reach(self, name: str) -> None:
        """Block by block: have all blocks done up to that of the tensor."""
        if self.feedback is not None and self.feedback.covers(name):
            self.feedback.reach(name, self)
            if self.work is not None and block_index(name) is None:
                # The head was the last of all.
                self.held = {}

    def take_up(self, index: int | None) -> None:
        """Take up what is finished of a block that is about to be done, or with None of what is outside of all."""
        if self.work is not None:
            self.held = {}
        for name in self.plan.treatments:
            if block_index(name) == index:
                arrays = self._known(_tensor_unit(name), self._forms(name))
                if arrays is not None:
                    self.held[_tensor_unit(name)] = arrays

    def is_encoded(self, name: str) -> bool:
        """Whether a matrix of the block has its codes."""
        return name not in self.plan.treatments or _tensor_unit(name) in self.held

    def encode(self, goals: Mapping[str, Goal | None]) -> None:
        """Choose the codes of matrices none of which depends on another."""
        names = {_tensor_unit(name): name for name in goals}
        prepare = lambda unit, how: self._encoding_job(names[unit], goals[names[unit]], how)  # noqa: E731
        if self.workers is not None:
            self.held.update(self._arriving("encoding matrices", list(names), prepare))
            return
        for unit, name in names.items():
            self.held[unit] = self._finished(unit, self._forms(name), functools.partial(prepare, unit, self.computing))

    def is_tuned(self, index: int) -> bool:
        """Whether a block has been tuned."""
        return self._tuned(index) is not None

    def keep_tuned(self, index: int, tuned: Trained | None) -> None:
        """Keep what the tuning of a block gave; what it did not train stays."""
        current = {name: array.read() for name, array in self._tunable(index).items()}
        arrays = (
            current if tuned is None else {**current, **{name: tuned.values[name] for name in current if name in tuned.values}}
        )
        arrays[_CURVE] = curve_array(() if tuned is None else tuned.curve, self._curve_rows())
        if self.work is not None:
            self.work.save(_block_unit(index), arrays)
        else:
            self.held[_block_unit(index)] = arrays
        self.tuned = (index, arrays)

    def curve(self, index: int) -> Curve:
        """The losses of a block's tuning; empty if it was left alone."""
        tuned = self._tuned(index)
        return [] if tuned is None else curve_entries(tuned[_CURVE])

    def fixed_codebooks(self, index: int) -> list[str]:
        """The codebooks of a block that other blocks use as well."""
        return [book.name for book in self.plan.codebooks if index in _blocks(book) and len(_blocks(book)) > 1]

    def _tunable(self, index: int) -> dict[str, Array]:
        """What of a block can be tuned, by the names of its parameters."""
        block = {name: tensor for name, tensor in self.tensors.items() if block_index(name) == index}
        fixed = {codebook_name(name) for name in self.fixed_codebooks(index)}
        found = parameters(Model(self.source.config, block))
        return {name: array for name, array in found.items() if name not in fixed}

    def _tuned(self, index: int) -> dict[str, AnyArray] | None:
        if self.tuned is None or self.tuned[0] != index or self.tuned[1] is None:
            self.tuned = (index, self._known(_block_unit(index), self._tuned_forms(index)))
        return self.tuned[1]

    def _tuned_forms(self, index: int) -> Forms:
        forms = {name: (array.dtype, array.shape) for name, array in self._tunable(index).items()}
        forms[_CURVE] = curve_form(self._curve_rows())
        return forms

    def _curve_rows(self) -> int:
        return 0 if self.feedback is None or self.feedback.tuning is None else self.feedback.tuning.most_checks

    def _tuned_value(self, parameter: str, tensor: str, before: Callable[[], AnyArray]) -> AnyArray:
        """A parameter of the block that `tensor` belongs to: as tuned if that has been done, else as `before`."""
        index = block_index(tensor)
        if self.feedback is None or self.feedback.tuning is None or index is None:
            return before()
        if self._awaits_tuning(tensor):
            self._reach(tensor)
        tuned = self._tuned(index)
        return before() if tuned is None or parameter not in tuned else tuned[parameter]

    def _awaits_tuning(self, name: str) -> bool:
        """Whether the block of a tensor is yet to be tuned."""
        index = block_index(name)
        tunes = self.feedback is not None and self.feedback.tuning is not None
        return tunes and index is not None and self._tuned(index) is None


def _blocks(book: CodebookPlan) -> set[int | None]:
    """The blocks that use a codebook; None stands for what is outside of all."""
    return {block_index(name) for name in book.members}


def _block_unit(index: int) -> str:
    return f"block {index}"


def _codebook_unit(book: CodebookPlan) -> str:
    return f"codebook {book.name}"


def _codebook_forms(book: CodebookPlan) -> Forms:
    return {"centroids": (book.dtype, (book.num_clusters, book.cluster_dim)), "step": ("float32", (1,))}


def _tensor_unit(name: str) -> str:
    return f"tensor {name}"
