"""From a plan to a compressed model: fit the codebooks, encode and tune block by block, keep every result in a store.

`compress` reads from top to bottom. Each step is a unit of work (a codebook, a matrix, a tuned block). Its arrays are saved in
a store as soon as they are computed, and loaded from there if an interrupted run has saved them. The result is a lazy model
over the store.

Memory stays bounded: a codebook with row scales is fitted on a seeded sample of its tensors' vectors, matrices are encoded one
at a time, and only one block is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from cluscomp_export.compression.error_feedback import InputTargets, OutputTargets, Streams, head_target, run_original
from cluscomp_export.compression.fit_encode import Computing
from cluscomp_export.compression.jobs import Jobs
from cluscomp_export.compression.moments import Target
from cluscomp_export.compression.unit_order import UnitOrder, discard_void
from cluscomp_export.compression.workers.base import Job, Workers
from cluscomp_export.planning import CodebookPlan, Plan, TensorScheme
from cluscomp_export.planning.planned_model import model_of_plan
from cluscomp_export.sources.linears import block_index, logits_tensor
from cluscomp_export.store import ArraySpecs, MemoryStore, Store
from cluscomp_export.training.blockwise import BlockwiseOptions, tune_block
from cluscomp_export.training.loop import Curve, curve_array, curve_entries, curve_specs
from cluscomp_formats.architectures import describe
from cluscomp_formats.ir import AnyArray, Array, Model, Tensor
from cluscomp_formats.parameters import codebook_name, parameters, with_parameters
from cluscomp_formats.progress import Progress, silent
from cluscomp_runtime.blocks import BlockRunner
from cluscomp_runtime.memory import trim_heap

__all__ = ["BlockByBlock", "Compressed", "compress"]

Floats = npt.NDArray[np.float32]

CURVE = "curve"
"""The array of a tuned block's unit that is not a parameter."""


@dataclass(frozen=True)
class BlockByBlock:
    """How blocks are compressed in order, on the activations of the model as compressed so far.

    `windows`, int64 `[windows, tokens]`, are token ids of the calibration text. With `feedback` codes are chosen with error
    feedback, else each vector gets its nearest centroid; `importance` `[out_features]` weights the rows of matrices, by name.
    `tuning` trains each block after it is encoded; None leaves that out.
    """

    windows: torch.Tensor
    feedback: bool = True
    importance: Mapping[str, Floats] = field(default_factory=dict)
    tuning: BlockwiseOptions | None = None


@dataclass(frozen=True)
class Compressed:
    """A lazy model over the store, and the loss curve of each block's tuning: empty if the block was left as it was."""

    model: Model
    curves: Mapping[int, Curve]


def compress(
    source: Model,
    plan: Plan,
    *,
    computing: Computing | None = None,
    moments: Mapping[str, Floats] | None = None,
    blocks: BlockByBlock | None = None,
    provenance: Mapping[str, Any] | None = None,
    store: Store | None = None,
    workers: Workers | None = None,
    on_progress: Progress = silent,
) -> Compressed:
    """Cluster the tensors of `plan`; all others stay dense.

    `moments` are activation second moments of input channels, `[in_features]` by tensor; without any, channels count alike.
    `blocks` has error feedback and tuning; without it every matrix is encoded by itself. `workers` run the jobs, with their own
    number of threads, else this process does; the result is the same. Units that `store` (memory, unless given) holds are not
    computed again.

    Raises InvalidFileError for weights that are not finite or do not fit float16, StorageError if the store fails,
    UnsupportedError for `blocks` of an architecture the runtime does not know, InvalidRequestError for token ids the model does
    not have, and what `Workers.run` raises.
    """
    run = _Compression(
        source, plan, computing or Computing(), moments or {}, blocks, store or MemoryStore(), workers, on_progress
    )
    run.discard_void_units()
    run.fit_codebooks()
    run.encode_matrices()
    if blocks is not None and not run.blocks_are_finished():
        run.compress_blocks(blocks)
    return run.result(provenance)


class _Compression:
    """The state of one `compress`: what is in the store, and the arrays that the current step needs in memory."""

    def __init__(
        self,
        source: Model,
        plan: Plan,
        computing: Computing,
        moments: Mapping[str, Floats],
        blocks: BlockByBlock | None,
        store: Store,
        workers: Workers | None,
        on_progress: Progress,
    ) -> None:
        self.source = source
        self.plan = plan
        self.computing = computing
        self.tuning = None if blocks is None else blocks.tuning
        self.units = _Units(plan, store)
        self.workers = workers
        self.on_progress = on_progress
        self.jobs = Jobs(source, plan, moments, on_progress)
        self.untuned = model_of_plan(source, plan, self.units.read)
        self.curves: dict[int, Curve] = {}
        self.in_order = _encoded_in_order(source, plan, blocks)
        self.head = next((name for name in self.in_order if block_index(name) is None), None)
        found = {index for name in source.tensors if (index := block_index(name)) is not None}
        self.block_indices = sorted(found) if blocks is not None else []

    # The steps of `compress`, in their order.

    def discard_void_units(self) -> None:
        """Delete the finished units that cannot be used, because others that they were computed from are absent."""
        schemes = self.plan.schemes
        specs = {_tensor_unit(name): _tensor_specs(scheme) for name, scheme in schemes.items()}
        steps: list[Mapping[str, ArraySpecs]] = []
        for index in self.block_indices:
            names = ([_tensor_unit(name) for name in step.weights] for step in describe(self.source.config).blocks[index].steps)
            steps += [{unit: specs[unit] for unit in step if unit in specs} for step in names]
            if self.tuning is not None:
                steps.append({_block_unit(index): self._block_specs(index)})
        if self.head is not None:
            steps.append({_tensor_unit(self.head): specs[_tensor_unit(self.head)]})
        order = UnitOrder(
            codebooks={_codebook_unit(book): _codebook_specs(book) for book in self.plan.codebooks},
            alone={unit: specs[unit] for name in schemes if name not in self.in_order and (unit := _tensor_unit(name))},
            steps=steps,
            codebook_of={_tensor_unit(name): _codebook_unit(scheme.codebook) for name, scheme in schemes.items()},
        )
        store = self.units.store
        count = discard_void(store, order, from_scratch=store.started)
        if count:
            self.on_progress(f"discarding {count} parts that were computed from missing ones", count, count)

    def fit_codebooks(self) -> None:
        """Fit every codebook that is not in the store."""
        books = {
            _codebook_unit(book): book
            for book in self.plan.codebooks
            if not self.units.store.holds(_codebook_unit(book), _codebook_specs(book))
        }
        # The largest first: the last ones keep fewer workers waiting.
        units = sorted(books, key=lambda unit: -books[unit].num_clusters * len(books[unit].members))
        self._run("fitting codebooks", units, lambda unit, how: self.jobs.fit(books[unit], how))

    def encode_matrices(self) -> None:
        """Encode the matrices that do not depend on others.

        Those of a codebook come one after the other: a search among the same centroids is set up once.
        """
        members = [name for book in self.plan.codebooks for name in book.members]
        self._encode({name: None for name in members if name not in self.in_order}, report=True)

    def blocks_are_finished(self) -> bool:
        """Whether all that is compressed in order is in the store."""
        store = self.units.store
        blocks = self.block_indices if self.tuning is not None else ()
        encoded = all(store.holds(_tensor_unit(name), _tensor_specs(self.plan.schemes[name])) for name in self.in_order)
        return encoded and all(store.holds(_block_unit(index), self._block_specs(index)) for index in blocks)

    def compress_blocks(self, blocks: BlockByBlock) -> None:
        """Encode and tune the blocks in order, then encode the head."""
        runner = BlockRunner(self.source)
        streams = Streams.start(runner, blocks.windows)
        for index in range(runner.num_blocks):
            self.on_progress("block by block", index, runner.num_blocks)
            streams = self._compress_block(runner, index, streams, blocks)
            # The heap would keep more of the many arrays of all sizes than the next block takes.
            trim_heap()
        self.on_progress("block by block", runner.num_blocks, runner.num_blocks)
        self.units.hold(())
        if self.head is not None:
            self._encode({self.head: head_target(runner, streams.compressed)}, report=True)

    def result(self, provenance: Mapping[str, Any] | None) -> Compressed:
        """The model over the store, and the curves of the blocks that were tuned."""
        self.units.hold(())
        model = Model(self.source.config, self.untuned.tensors, self.source.files, provenance or {})
        if self.tuning is None:
            return Compressed(model, {})
        arrays: dict[str, Array] = {}
        for index in self.block_indices:
            arrays |= self._tuned(index)
            if index not in self.curves:
                self.curves[index] = curve_entries(self._block_arrays(index)[CURVE])
        return Compressed(with_parameters(model, arrays), dict(sorted(self.curves.items())))

    # One block.

    def _compress_block(self, runner: BlockRunner, index: int, streams: Streams, blocks: BlockByBlock) -> Streams:
        """Encode and tune a block, unless that is done; returns the streams after it."""
        block = runner.description.blocks[index]
        names = [name for step in block.steps for name in step.weights if name in self.plan.schemes]
        self.units.hold(names)
        tensors = {name: tensor for name, tensor in self.untuned.tensors.items() if block_index(name) == index}
        tuned = blocks.tuning is not None and self.units.store.holds(_block_unit(index), self._block_specs(index))
        after = streams
        for number in range(len(block.branches)) if not tuned else ():
            after = self._compress_branch(runner, index, number, tensors, after, blocks)
        if blocks.tuning is None:
            return after
        if tuned:
            original: Sequence[torch.Tensor] = runner.past(index, self.source.tensors, streams.original, self.computing.device)
            trained = True
        else:
            original = after.original
            trained = self._tune(runner, index, tensors, streams.compressed, original, blocks.tuning)
        self.curves[index] = curve_entries(self._block_arrays(index)[CURVE])
        if not trained:
            return after
        changed = with_parameters(Model(self.source.config, tensors), self._tuned(index))
        return Streams(original, runner.past(index, changed.tensors, streams.compressed, self.computing.device))

    def _compress_branch(
        self,
        runner: BlockRunner,
        index: int,
        number: int,
        tensors: Mapping[str, Tensor],
        streams: Streams,
        blocks: BlockByBlock,
    ) -> Streams:
        """Encode the matrices of a branch of a block; returns the streams after it."""
        device, source, importance = self.computing.device, self.source.tensors, blocks.importance
        original = runner.branch(index, number, source, device)
        after, wanted = run_original(original, streams, device)
        if self._not_encoded(name for group in original.inputs for name in group):
            inputs_of = InputTargets(original, streams, source, importance, device) if blocks.feedback else None
            self._encode_groups(original.inputs, inputs_of)
            del inputs_of
        # The output projections have no codes yet: they are the original's.
        outputs = original.outputs
        del original
        compressed = runner.branch(index, number, {**tensors, **{name: source[name] for name in outputs}}, device)
        inputs = [compressed.mixed(compressed.normed(batch.to(device))).cpu() for batch in streams.compressed]
        if self._not_encoded(outputs):
            outputs_of = OutputTargets(compressed, streams, inputs, wanted, importance, device) if blocks.feedback else None
            self._encode_groups([(name,) for name in outputs], outputs_of)
            del outputs_of
        del compressed, wanted
        compressed = runner.branch(index, number, tensors, device)
        projected = (compressed.projected(x.to(device)) for x in inputs)
        pairs = zip(streams.compressed, projected, strict=True)
        return Streams(after, [compressed.added(batch.to(device), each).cpu() for batch, each in pairs])

    def _encode_groups(self, groups: Sequence[Sequence[str]], targets: InputTargets | OutputTargets | None) -> None:
        """Encode the matrices of a step; those of a group share their input, and the moments of it."""
        if targets is None:
            self._encode(dict.fromkeys(self._not_encoded(name for group in groups for name in group)))
            return
        for number, group in enumerate(groups):
            missing = self._not_encoded(group)
            if missing:
                found = targets.of(number)
                self._encode({name: found[name] for name in missing})

    def _tune(
        self,
        runner: BlockRunner,
        index: int,
        tensors: Mapping[str, Tensor],
        before: Sequence[torch.Tensor],
        after: Sequence[torch.Tensor],
        tuning: BlockwiseOptions,
    ) -> bool:
        """Train a block to give the stream `after` it for the one `before` it, and keep its parameters. Whether any changed."""
        trained = tune_block(
            runner,
            index,
            tensors,
            before,
            after,
            tuning,
            fixed=self._shared_codebooks(index),
            original=self.source.tensors,
            device=self.computing.device,
            on_progress=self.on_progress,
        )
        arrays = {name: array.read() for name, array in self._tunable(index).items()}
        if trained is not None:
            arrays |= {name: trained.values[name] for name in arrays if name in trained.values}
        arrays[CURVE] = curve_array(() if trained is None else trained.curve, tuning.most_checks)
        self.units.store.save(_block_unit(index), arrays)
        return trained is not None

    # Jobs and units.

    def _not_encoded(self, names: Iterable[str]) -> list[str]:
        schemes = self.plan.schemes
        return [name for name in names if name in schemes and not self.units.holds_in_memory(name)]

    def _encode(self, targets: Mapping[str, Target | None], *, report: bool = False) -> None:
        """Encode matrices that do not depend on each other and are not in the store.

        `report`: progress is that of the matrices; otherwise the caller reports its own.
        """
        schemes = self.plan.schemes
        names = {
            _tensor_unit(name): name
            for name in targets
            if not self.units.store.holds(_tensor_unit(name), _tensor_specs(schemes[name]))
        }

        def job(unit: str, how: Computing) -> Job:
            name = names[unit]
            return self.jobs.encoding(name, targets[name], self.units.fitted(schemes[name].codebook), how)

        self._run("encoding matrices" if report else None, list(names), job)

    def _run(self, phase: str | None, units: Sequence[str], job: Callable[[str, Computing], Job]) -> None:
        """Run the jobs of units, here or by the workers, and keep each result as it arrives; None reports no progress."""
        if phase is not None and units:
            self.on_progress(phase, 0, len(units))
        for done, (unit, arrays) in enumerate(self._results(units, job), 1):
            self.units.save(unit, arrays)
            if phase is not None:
                self.on_progress(phase, done, len(units))

    def _results(self, units: Sequence[str], job: Callable[[str, Computing], Job]) -> Iterator[tuple[str, dict[str, AnyArray]]]:
        if not units:
            return
        if self.workers is not None:
            yield from self.workers.run(units, job)
            return
        for unit in units:
            yield unit, job(unit, self.computing).run(self.on_progress)

    # What tuning changes.

    def _shared_codebooks(self, index: int) -> list[str]:
        """The codebooks of a block that other blocks use as well."""
        used = {book.name: {block_index(name) for name in book.members} for book in self.plan.codebooks}
        return [name for name, blocks in used.items() if index in blocks and len(blocks) > 1]

    def _tunable(self, index: int) -> dict[str, Array]:
        """The parameters of a block that tuning may change, by name."""
        block = {name: tensor for name, tensor in self.untuned.tensors.items() if block_index(name) == index}
        fixed = {codebook_name(name) for name in self._shared_codebooks(index)}
        found = parameters(Model(self.source.config, block))
        return {name: array for name, array in found.items() if name not in fixed}

    def _block_specs(self, index: int) -> ArraySpecs:
        rows = 0 if self.tuning is None else self.tuning.most_checks
        specs = {name: (array.dtype, array.shape) for name, array in self._tunable(index).items()}
        return {**specs, CURVE: curve_specs(rows)}

    def _block_arrays(self, index: int) -> dict[str, AnyArray]:
        return self.units.load(_block_unit(index), self._block_specs(index))

    def _tuned(self, index: int) -> dict[str, Array]:
        """The parameters of a tuned block, read when they are needed."""

        def reader(name: str) -> Callable[[], AnyArray]:
            return lambda: self._block_arrays(index)[name]

        return {name: Array(array.shape, array.dtype, reader(name)) for name, array in self._tunable(index).items()}


class _Units:
    """Reads units of a plan from the store.

    Keeps in memory: shared codebooks, the matrices of the current block, and the last unit read of each kind.
    """

    def __init__(self, plan: Plan, store: Store) -> None:
        self.store = store
        self._specs = {_codebook_unit(book): _codebook_specs(book) for book in plan.codebooks}
        self._specs |= {_tensor_unit(name): _tensor_specs(scheme) for name, scheme in plan.schemes.items()}
        self._shared = {_codebook_unit(book) for book in plan.codebooks if book.shared}
        self._kept: dict[str, dict[str, AnyArray]] = {}
        self._block: dict[str, dict[str, AnyArray]] = {}
        self._block_units: set[str] = set()
        self._last: dict[str, tuple[str, dict[str, AnyArray]]] = {}

    def hold(self, names: Sequence[str]) -> None:
        """Keep the matrices of these names in memory, those in the store at once, others when they are saved; no others."""
        self._block = {}
        self._block_units = {_tensor_unit(name) for name in names}
        for unit in self._block_units:
            arrays = self.store.load(unit, self._specs[unit])
            if arrays is not None:
                self._block[unit] = arrays

    def holds_in_memory(self, name: str) -> bool:
        """Whether a matrix named in `hold` is encoded."""
        return _tensor_unit(name) in self._block

    def save(self, unit: str, arrays: dict[str, AnyArray]) -> None:
        """Keep a finished unit."""
        self.store.save(unit, arrays)
        if unit in self._block_units:
            self._block[unit] = arrays

    def read(self, item: CodebookPlan | str, array: str) -> AnyArray:
        """An array of a codebook, or of the matrix of a name."""
        unit = _tensor_unit(item) if isinstance(item, str) else _codebook_unit(item)
        return self.load(unit, self._specs[unit])[array]

    def fitted(self, book: CodebookPlan) -> dict[str, AnyArray]:
        """The arrays of a codebook's unit."""
        unit = _codebook_unit(book)
        return self.load(unit, self._specs[unit])

    def load(self, unit: str, specs: ArraySpecs) -> dict[str, AnyArray]:
        """The arrays of a unit that has been computed."""
        found = self._kept.get(unit) or self._block.get(unit)
        if found is not None:
            return found
        kind = unit.partition(" ")[0]
        if kind in self._last and self._last[kind][0] == unit:
            return self._last[kind][1]
        arrays = self.store.load(unit, specs)
        if arrays is None:
            raise RuntimeError(f"{unit} is read before it was computed")
        if unit in self._shared:
            self._kept[unit] = arrays
        else:
            self._last[kind] = (unit, arrays)
        return arrays


def _encoded_in_order(source: Model, plan: Plan, blocks: BlockByBlock | None) -> list[str]:
    """The matrices that depend on those before them in the model: of blocks and, with error feedback, the head."""
    if blocks is None:
        return []
    head = logits_tensor(source) if blocks.feedback else None
    return [name for name in plan.schemes if block_index(name) is not None or name == head]


def _codebook_unit(book: CodebookPlan) -> str:
    return f"codebook {book.name}"


def _codebook_specs(book: CodebookPlan) -> ArraySpecs:
    return {"centroids": (book.dtype, (book.num_clusters, book.cluster_dim)), "step": ("float32", (1,))}


def _tensor_unit(name: str) -> str:
    return f"tensor {name}"


def _tensor_specs(scheme: TensorScheme) -> ArraySpecs:
    out_features, in_features = scheme.shape
    codes = (in_features, -(-out_features // scheme.codebook.cluster_dim))
    return {"codes": ("uint16", codes), "row_scale": ("float16", (out_features if scheme.row_scale else 0,))}


def _block_unit(index: int) -> str:
    return f"block {index}"
