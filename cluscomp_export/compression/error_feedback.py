"""Error feedback: the codes of a matrix chosen channel by channel, so that its output errs least on a calibration text.

What errs is `t - Q x`: Q the decoded matrix, x its inputs in the model as compressed so far, t what its output should be. In a
block of a decoder t makes up for everything before: it is what the original matrix gives in the original model and, where a
matrix adds to the residual stream, what that stream lacks by then. Over a text the squared error is, up to a constant,

    sum over rows of (w' - q) H (w' - q)^T,   H = E[x x^T] + damping,   W' = W + E[(t - W x) x^T] H^-1

so the matrix is first corrected by ridge regression, which damping keeps near W, and then encoded under H. Codes are chosen as
GPTQ does (Frantar et al., arXiv 2210.17323); among the rows that a vector crosses, errors go where they matter least to the
predictions (`row_importance.py`). That H is of the compressed model and t of the original one is in the
spirit of GPTAQ (Li et al., arXiv 2504.02692). In the reference layout a vector lies in one input channel, so GPTQ's update,
which goes from channel to channel, serves vectors as it serves numbers.

Blocks are done in order, and the head, which may be the embedding as well, after them: it is encoded under the moments of what
flows into it, uncorrected. Memory: the matrices of half a block as float32, the activations of the text between blocks in both
models and those within half a block in one (4 bytes x tokens x features), and for the input of one matrix
8 bytes x in_features x (in_features + out_features), a few times that while matrices are encoded.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from cluscomp_export.progress import Progress, silent
from cluscomp_export.sources.linears import logits_tensor
from cluscomp_export.training.blockwise import BlockwiseOptions, tune_block
from cluscomp_export.training.loop import Curve, Trained
from cluscomp_formats.ir import Model, Tensor
from cluscomp_kernels.kmeans import assign_with_feedback, feedback_factor
from cluscomp_runtime.blocks import HALVES, BlockRunner, Half
from cluscomp_runtime.memory import trim_heap

__all__ = ["BlockWork", "ErrorFeedback", "Goal", "InputMoments", "block_index"]

Floats = npt.NDArray[np.float32]

DAMPING = 0.1
"""Added to the diagonal, in units of its mean. GPTQ takes .01; more costs little on the calibration text and wins on others."""

BATCH = 4
"""Windows run at a time."""
ROWS = 512
"""Rows of moments added at a time."""
PIECE_BYTES = 32 << 20
"""Most bytes of the rows of a matrix that are encoded at a time: no row depends on another."""

_BLOCK = re.compile(r"model\.layers\.(\d+)\..*")


def block_index(name: str) -> int | None:
    """The block a tensor belongs to, if any."""
    match = _BLOCK.fullmatch(name)
    return None if match is None else int(match[1])


class InputMoments:
    """Second moments of what flows into a matrix: the mean over tokens of `x x^T`, float64 `[in_features, in_features]`.

    Tokens are scaled to one energy, of what flows in or of what is to flow out, so that all count alike: the first of a text
    can have a thousand times the energy of the others. The tensor given is taken over, and damped.
    """

    def __init__(self, moments: torch.Tensor) -> None:
        # In place: of the widest input of a 70B model one copy takes 6.6 GB.
        mean = float(moments.diagonal().mean())
        moments.diagonal().add_(DAMPING * mean if mean > 0 else 1.0)
        self.damped = moments
        # Strongest first: what they err, the many weak ones after them can still make up for.
        self._order = np.argsort(-moments.diagonal().numpy(), kind="stable")
        self._factor: Floats | None = None

    def factor(self) -> Floats:
        """What `assign_with_feedback` needs for the channels in descending order of their energy."""
        if self._factor is None:
            factor = feedback_factor(self.damped, torch.from_numpy(self._order))
            self._factor = np.ascontiguousarray(factor.numpy().astype(np.float32))
        return self._factor

    def corrections(self, lacks: Mapping[str, torch.Tensor]) -> dict[str, Floats]:
        """What to add to transposed matrices for their output to lack least, float32 `[in_features, out_features]` each.

        `lacks` float64, of that shape, is the mean of `x e^T`, with e what the output lacks: ridge regression of e on x.
        """
        # Not kept longer than this: it is as large as the moments.
        lower = torch.linalg.cholesky(self.damped)
        return {name: torch.cholesky_solve(lacking, lower).float().numpy() for name, lacking in lacks.items()}

    def encode(
        self, weights: Floats, centroids: Floats, importance: Floats, *, threads: int | None, device: str
    ) -> tuple[npt.NDArray[np.uint16], npt.NDArray[np.float64]]:
        """Codes uint16 `[in_features, groups]` for `weights` `[in_features, groups * cluster_dim]`, the first columns of which
        are rows of the matrix, of some `importance` `[out_features]`; and the factors `[out_features]` by which each row then
        errs least."""
        # Before the weights are copied: to factor takes most.
        factor, damped = self.factor(), self.damped.float()
        channels, dim, out_features = len(weights), centroids.shape[1], len(importance)
        padded = np.ones(weights.shape[1], dtype=np.float32)
        padded[:out_features] = importance
        groups = -(-out_features // dim)
        codes = np.empty((channels, groups), dtype=np.uint16)
        factors = np.empty(out_features)
        step = max(1, PIECE_BYTES // (4 * channels * dim))
        for begin in range(0, groups, step):
            piece = slice(begin, min(begin + step, groups))
            rows = slice(begin * dim, min(piece.stop * dim, out_features))
            count = rows.stop - rows.start
            ordered = assign_with_feedback(
                weights[self._order, begin * dim : piece.stop * dim],
                centroids,
                factor,
                out_features=count,
                importance=padded[begin * dim : piece.stop * dim],
                threads=threads,
                device=device,
            )
            codes[self._order, piece] = ordered
            wanted = torch.from_numpy(weights[:, rows])
            given = torch.from_numpy(centroids[codes[:, piece]].reshape(channels, -1)[:, :count])
            projected = damped @ given
            products = (wanted * projected).sum(0, dtype=torch.float64)
            energies = (given * projected).sum(0, dtype=torch.float64)
            factors[rows] = torch.where((energies > 0) & (products > 0), products / energies, 1.0).numpy()
        return codes, factors


@dataclass(frozen=True)
class Goal:
    """What codes aim at under `moments`: a transposed matrix, with a `correction` `[in_features, out_features]` if given.

    Squared errors of the outputs count by `importance` `[out_features]`, all alike if that is None.
    """

    moments: InputMoments
    correction: Floats | None = None
    importance: Floats | None = None


class BlockWork(Protocol):
    """Who keeps what has been done: the tensors of the compressed model, and how to get there."""

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """The compressed model as far as it is there, by name."""

    def take_up(self, index: int | None) -> None:
        """Take up what is finished of a block that is about to be done, or with None of what is outside of all."""

    def is_encoded(self, name: str) -> bool:
        """Whether a matrix of that block has its codes. True for what is not clustered."""

    def encode(self, goals: Mapping[str, Goal | None]) -> None:
        """Choose the codes of matrices none of which depends on another; without a goal the nearest centroids."""

    def is_tuned(self, index: int) -> bool:
        """Whether a block has been tuned."""

    def keep_tuned(self, index: int, tuned: Trained | None) -> None:
        """Take the tuned values of a block into `tensors`; None says that there are none."""

    def curve(self, index: int) -> Curve:
        """The losses of a block's tuning; empty if it was left alone."""

    def fixed_codebooks(self, index: int) -> Collection[str]:
        """The codebooks that other blocks use as well."""


class ErrorFeedback:
    """Takes a model's blocks in order, has their matrices encoded and then their parameters tuned, and goes on with the result.

    `windows` int64 `[windows, tokens]` are the calibration text; `tuning=None` leaves out the tuning, and with `feedback=False`
    every vector takes its nearest centroid. `importance` is that of the rows of matrices (`row_importance`). `curves` takes the
    losses of blocks that are tuned, as "block 0" and so on.

    Raises UnsupportedError for an architecture the runtime does not know, InvalidRequestError for ids the model does not have.
    """

    def __init__(
        self,
        source: Model,
        windows: torch.Tensor,
        tuning: BlockwiseOptions | None = None,
        *,
        feedback: bool = True,
        importance: Mapping[str, Floats] | None = None,
        curves: dict[str, Curve] | None = None,
        device: str = "cpu",
        on_progress: Progress = silent,
    ) -> None:
        self._source = source
        self._runner = BlockRunner(source)
        self._wanted = list(torch.split(self._runner.embed(windows), BATCH))
        """What flows into the next block in the original model, and in the compressed one."""
        self._given = self._wanted
        self.tuning = tuning
        self._curves = {} if curves is None else curves
        self._feedback = feedback
        self._importance = {} if importance is None else importance
        self._device = device
        self._next = 0
        self._head = logits_tensor(source) if feedback else None
        self._head_done = False
        self._on_progress = on_progress

    def serves(self, name: str) -> bool:
        """Whether the tensor belongs to a block or is the head, if that gets its codes here."""
        return name == self._head or block_index(name) is not None

    def covers(self, name: str) -> bool:
        """Whether the tensor is yet to be done, with its block or as the head."""
        if name == self._head:
            return not self._head_done
        index = block_index(name)
        return index is not None and index >= self._next

    def reach(self, name: str, work: BlockWork) -> None:
        """Do all blocks up to that of the tensor `name`, unless `work` has them already; for the head all, and then it."""
        while self.covers(name) and self._next < self._runner.num_blocks:
            index = self._next
            self._on_progress("block by block", index, self._runner.num_blocks)
            # Before the work: what it reads of this block is what is there by then.
            self._next += 1
            self._do_block(index, work)
            # Of many arrays of all sizes the heap would keep more than what comes next takes.
            trim_heap()
        self._on_progress("block by block", self._next, self._runner.num_blocks)
        if self.covers(name):
            # All blocks are done, so this is the head.
            self._head_done = True
            work.take_up(None)
            self._encode((name,), lambda: {name: self._head_goal()}, work)

    def _do_block(self, index: int, work: BlockWork) -> None:
        work.take_up(index)
        before = self._given
        to_tune = self.tuning is not None and not work.is_tuned(index)
        for half in HALVES:
            self._compress(index, half, work)
        if self.tuning is not None and to_tune:
            tuned = tune_block(
                self._runner,
                index,
                work.tensors,
                before,
                self._wanted,
                self.tuning,
                fixed=work.fixed_codebooks(index),
                original=self._source.tensors,
                device=self._device,
                on_progress=self._on_progress,
            )
            work.keep_tuned(index, tuned)
            if tuned is not None:
                self._given = self._runner.past(index, work.tensors, before, self._device)
        if self.tuning is not None:
            self._curves[f"block {index}"] = work.curve(index)

    def _compress(self, index: int, half: str, work: BlockWork) -> None:
        """Encode half a block, and take the activations of both models past it."""
        original = self._runner.half(index, half, self._source.tensors, self._device)
        behind = [original(batch.to(self._device)).cpu() for batch in self._wanted]
        self._encode(original.readers, lambda: self._reader_goals(original), work)
        # The writer has no codes yet: it is the original's.
        tensors = {**work.tensors, original.writer: self._source.tensors[original.writer]}
        compressed = self._runner.half(index, half, tensors, self._device)
        mixed = [compressed.mixed(compressed.normed(batch.to(self._device))).cpu() for batch in self._given]
        del compressed
        self._encode((original.writer,), lambda: self._writer_goal(original, mixed, behind), work)
        compressed = self._runner.half(index, half, work.tensors, self._device)
        pairs = zip(self._given, mixed, strict=True)
        self._given = [compressed.written(batch.to(self._device), inputs.to(self._device)).cpu() for batch, inputs in pairs]
        self._wanted = behind

    def _encode(self, names: Sequence[str], goals: Callable[[], Mapping[str, Goal]], work: BlockWork) -> None:
        missing = [name for name in names if not work.is_encoded(name)]
        if missing:
            found = goals() if self._feedback else {}
            work.encode({name: found.get(name) for name in missing})

    def _reader_goals(self, original: Half) -> dict[str, Goal]:
        """Readers are to give for the compressed model's input what the original ones give for the original's."""
        sums = _Sums()
        for given, wanted in zip(self._given, self._wanted, strict=True):
            inputs = original.normed(given.to(self._device))
            sums.add(inputs, original.normed(wanted.to(self._device)) - inputs, inputs)
        moments, input_lacks = sums.results()
        lacks = {
            name: input_lacks @ torch.from_numpy(self._source.tensors[name].decode().astype(np.float64)).t()
            for name in original.readers
        }
        # What follows needs the space.
        del sums, input_lacks
        return self._goals(moments, lacks)

    def _writer_goal(self, original: Half, mixed: Sequence[torch.Tensor], behind: Sequence[torch.Tensor]) -> dict[str, Goal]:
        """The writer is to bring the compressed model's residual stream to the original's, `behind`."""
        sums = _Sums()
        for given, inputs, wanted in zip(self._given, mixed, behind, strict=True):
            stream, features, target = (values.to(self._device) for values in (given, inputs, wanted))
            sums.add(features, target - original.written(stream, features), target)
        moments, lacks = sums.results()
        del sums
        return self._goals(moments, {original.writer: lacks})

    def _goals(self, moments: InputMoments, lacks: Mapping[str, torch.Tensor]) -> dict[str, Goal]:
        corrections = moments.corrections(lacks)
        return {name: Goal(moments, correction, self._importance.get(name)) for name, correction in corrections.items()}

    def _head_goal(self) -> Goal:
        """The head is not corrected: the embedding, which may be the same matrix, is what it was for all that is compressed."""
        sums = _Sums()
        for given in self._given:
            inputs = self._runner.normed(given)
            sums.add(inputs, None, inputs)
        return Goal(sums.moments())


class _Sums:
    """Sums over tokens of `x x^T` and, if wanted, `x e^T`, with x the inputs of a matrix and e what is lacking."""

    def __init__(self) -> None:
        self._inputs: torch.Tensor | None = None
        self._lacks: torch.Tensor | None = None
        self._tokens = 0

    def add(self, inputs: torch.Tensor, lacks: torch.Tensor | None, measure: torch.Tensor) -> None:
        """Some windows' `inputs` `[windows, tokens, in_features]` and `lacks` `[windows, tokens, any]`.

        Each token counts by the inverse of the mean square of `measure` `[windows, tokens, any]`.
        """
        scale = measure.square().mean(-1, keepdim=True).sqrt().clamp(min=torch.finfo(measure.dtype).tiny)
        scaled = (inputs / scale).flatten(0, -2)
        self._inputs = _added(self._inputs, scaled.t() @ scaled)
        if lacks is not None:
            self._lacks = _added(self._lacks, scaled.t() @ (lacks / scale).flatten(0, -2))
        self._tokens += len(scaled)

    def moments(self) -> InputMoments:
        """The moments of the inputs, in place of their sums."""
        if self._inputs is None:
            raise ValueError("there is nothing to take the mean of")
        return InputMoments(self._inputs.cpu().div_(self._tokens))

    def results(self) -> tuple[InputMoments, torch.Tensor]:
        """The moments of the inputs, and the mean of `x e^T`, float64 `[in_features, any]`, in place of the sums."""
        if self._lacks is None:
            raise ValueError("there is nothing to take the mean of")
        return self.moments(), self._lacks.cpu().div_(self._tokens)


def _added(sums: torch.Tensor | None, products: torch.Tensor) -> torch.Tensor:
    """float64 sums with float32 products added, in place."""
    if sums is None:
        return products.double()
    # Rows at a time: torch makes a float64 copy of what is added.
    for start in range(0, len(products), ROWS):
        sums[start : start + ROWS] += products[start : start + ROWS]
    return sums
