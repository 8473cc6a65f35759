"""Error feedback: the codes of a matrix chosen channel by channel, so that its output errs least on a calibration text.

What errs is `t - Q x`: Q the decoded matrix, x its inputs in the model as compressed so far, t what its output should be. In a
block of a decoder t makes up for everything before: it is what the original matrix gives in the original model and, where a
matrix adds to the residual stream, what that stream lacks by then. Over a text the squared error is, up to a constant,

    sum over rows of (w' - q) H (w' - q)^T,   H = E[x x^T] + damping,   W' = W + E[(t - W x) x^T] H^-1

so the matrix is first corrected by ridge regression, which damping keeps near W, and then encoded under H. Codes are chosen as
GPTQ does (Frantar et al., arXiv 2210.17323); that H is of the compressed model and t of the original one is in the
spirit of GPTAQ (Li et al., arXiv 2504.02692). In the reference layout a vector lies in one input channel, so GPTQ's update, which
goes from channel to channel, serves vectors as it serves numbers.

Blocks are done in order. Memory: the matrices of half a block as float32, the activations of the text in both models (8 bytes x
tokens x hidden_size), and for the input of one matrix 8 bytes x in_features x (in_features + out_features), a few times that
while matrices are encoded.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from cluscomp_export.progress import Progress, silent
from cluscomp_export.tuning.blockwise import BlockwiseOptions, tune_block
from cluscomp_export.tuning.training import Trained
from cluscomp_formats.ir import Model, Tensor
from cluscomp_kernels.kmeans import assign_with_feedback, feedback_factor
from cluscomp_runtime.blocks import BlockRunner

__all__ = ["BlockWork", "ErrorFeedback", "Goal", "InputMoments", "block_index"]

Floats = npt.NDArray[np.float32]

DAMPING = 0.1
"""Added to the diagonal, in units of its mean. GPTQ takes .01; more costs little on the calibration text and wins on others."""

BATCH = 4
"""Windows run at a time."""
ROWS = 512
"""Rows of moments added at a time."""

_BLOCK = re.compile(r"model\.layers\.(\d+)\..*")
_ADDS_TO_STREAM = ("self_attn.o_proj.weight", "mlp.down_proj.weight")


def block_index(name: str) -> int | None:
    """The block a tensor belongs to, if any."""
    match = _BLOCK.fullmatch(name)
    return None if match is None else int(match[1])


class InputMoments:
    """Second moments of what flows into a matrix: the mean over tokens of `x x^T`, float64 `[in_features, in_features]`.

    Tokens are scaled to unit mean square, so that all count alike: the first of a text can have a thousand times the energy of
    the others. The tensor given is taken over, and damped.
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

    def solver(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """What multiplies float64 `[in_features, any]` with the damped inverse: ridge regression on the inputs."""
        # Not kept longer than it is used: it is as large as the moments.
        lower = torch.linalg.cholesky(self.damped)
        return lambda products: torch.cholesky_solve(products, lower)

    def encode(
        self, weights: Floats, centroids: Floats, out_features: int, *, threads: int | None, device: str
    ) -> tuple[npt.NDArray[np.uint16], npt.NDArray[np.float64]]:
        """Codes uint16 `[in_features, groups]` for `weights` `[in_features, groups * cluster_dim]`, the first `out_features`
        columns of which are rows of the matrix, and the factors `[out_features]` by which each row then errs least."""
        # Before the weights are copied: to factor takes most.
        factor = self.factor()
        ordered = assign_with_feedback(
            weights[self._order], centroids, factor, out_features=out_features, threads=threads, device=device
        )
        codes = np.empty_like(ordered)
        codes[self._order] = ordered
        wanted = torch.from_numpy(weights[:, :out_features])
        given = torch.from_numpy(centroids[codes].reshape(weights.shape)[:, :out_features])
        projected = self.damped.float() @ given
        products = (wanted * projected).sum(0, dtype=torch.float64)
        energies = (given * projected).sum(0, dtype=torch.float64)
        factors = torch.where((energies > 0) & (products > 0), products / energies, 1.0)
        return codes, factors.numpy()


@dataclass(frozen=True)
class Goal:
    """What the codes of a matrix aim at: its transpose with `correction` `[in_features, out_features]` added, under `moments`."""

    moments: InputMoments
    correction: Floats


class BlockWork(Protocol):
    """Who keeps what has been done: the tensors of the compressed model, and how to get there."""

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """The compressed model as far as it is there, by name."""

    def take_up(self, index: int) -> None:
        """Take up what is finished of a block that is about to be done."""

    def is_encoded(self, name: str) -> bool:
        """Whether a matrix of that block has its codes. True for what is not clustered."""

    def encode(self, goals: Mapping[str, Goal]) -> None:
        """Choose the codes of matrices none of which depends on another."""

    def is_tuned(self, index: int) -> bool:
        """Whether a block has been tuned."""

    def keep_tuned(self, index: int, tuned: Trained | None) -> None:
        """Take the tuned values of a block into `tensors`; None says that there are none."""

    def fixed_codebooks(self, index: int) -> Collection[str]:
        """The codebooks that other blocks use as well."""


class _Reached(Exception):
    """The input that was looked for is there; the rest of the pass is not needed."""


class ErrorFeedback:
    """Takes a model's blocks in order, has their matrices encoded and then their parameters tuned, and goes on with the result.

    `windows` int64 `[windows, tokens]` are the calibration text; `tuning=None` leaves out the tuning. Raises UnsupportedError
    for an architecture the runtime does not know, InvalidRequestError for ids the model does not have.
    """

    def __init__(
        self,
        source: Model,
        windows: torch.Tensor,
        tuning: BlockwiseOptions | None = None,
        *,
        device: str = "cpu",
        on_progress: Progress = silent,
    ) -> None:
        self._source = source
        self._runner = BlockRunner(source)
        self._wanted = list(torch.split(self._runner.embed(windows), BATCH))
        """What flows into the next block in the original model, and in the compressed one."""
        self._given = self._wanted
        self._tuning = tuning
        self._device = device
        self._next = 0
        self._on_progress = on_progress

    @property
    def tunes(self) -> bool:
        """Whether blocks are tuned."""
        return self._tuning is not None

    def covers(self, name: str) -> bool:
        """Whether the tensor belongs to a block that is yet to be done."""
        index = block_index(name)
        return index is not None and index >= self._next

    def reach(self, name: str, work: BlockWork) -> None:
        """Do all blocks up to that of the tensor `name`, unless `work` has them already."""
        while self.covers(name):
            index = self._next
            self._on_progress("block by block", index, self._runner.num_blocks)
            # Before the work: what it reads of this block is what is there by then.
            self._next += 1
            work.take_up(index)
            before = self._given
            to_tune = self._tuning is not None and not work.is_tuned(index)
            for half in (0, 1):
                wanted = self._advance(index, half, self._source.tensors, self._wanted)
                for group in self._groups(index, half):
                    missing = [name for name in group if not work.is_encoded(name)]
                    if missing:
                        work.encode(self._goals(index, half, missing, wanted, work))
                self._given = self._advance(index, half, work.tensors, self._given)
                self._wanted = wanted
            if self._tuning is not None and to_tune:
                tuned = tune_block(
                    self._runner,
                    index,
                    work.tensors,
                    before,
                    self._wanted,
                    self._tuning,
                    fixed=work.fixed_codebooks(index),
                    original=self._source.tensors,
                    device=self._device,
                    on_progress=self._on_progress,
                )
                work.keep_tuned(index, tuned)
                self._given = before
                for half in (0, 1):
                    self._given = self._advance(index, half, work.tensors, self._given)
        self._on_progress("block by block", self._next, self._runner.num_blocks)

    def _advance(
        self, index: int, half: int, tensors: Mapping[str, Tensor], hidden: Sequence[torch.Tensor]
    ) -> list[torch.Tensor]:
        run = self._runner.half(index, half, tensors)
        return [run(batch) for batch in hidden]

    def _groups(self, index: int, half: int) -> list[list[str]]:
        """The matrices of half a block in the order of their use, those with the same input together."""
        groups: list[list[str]] = []
        last: torch.Tensor | None = None

        def observe(name: str, inputs: torch.Tensor) -> None:
            nonlocal last
            if inputs is last:
                groups[-1].append(name)
            else:
                groups.append([name])
            last = inputs

        self._runner.half(index, half, self._source.tensors, observe)(self._given[0][:1, :1])
        return groups

    def _goals(
        self, index: int, half: int, names: Sequence[str], results: Sequence[torch.Tensor], work: BlockWork
    ) -> dict[str, Goal]:
        """What the codes of the matrices `names`, which have one input, aim at; `results` is what shall flow out of the half."""
        # What has no codes yet is the original's.
        tensors = {
            name: work.tensors[name] if work.is_encoded(name) else tensor
            for name, tensor in self._source.tensors.items()
            if block_index(name) == index
        }
        inputs: list[torch.Tensor] = []

        def observe(name: str, values: torch.Tensor) -> None:
            if name == names[0]:
                inputs.append(values.flatten(0, -2))
                raise _Reached

        runs = self._runner.half(index, half, tensors, observe), self._runner.half(index, half, self._source.tensors, observe)
        to_stream = names[0].endswith(_ADDS_TO_STREAM)
        sums = _Sums()
        for given, wanted, result in zip(self._given, self._wanted, results, strict=True):
            for run, hidden in zip(runs, (given, wanted), strict=True):
                with contextlib.suppress(_Reached):
                    run(hidden)
            found, expected = inputs
            inputs.clear()
            if to_stream:
                sums.add(found, expected, result.flatten(0, -2), (wanted - given).flatten(0, -2))
            else:
                sums.add(found, expected, found)
        del runs, run
        given_moments, input_lacks, stream_lacks = sums.means()
        moments = InputMoments(given_moments)
        lacks = {}
        for name in names:
            weight = torch.from_numpy(self._source.tensors[name].decode().astype(np.float64))
            lacks[name] = input_lacks @ weight.t()
            if stream_lacks is not None:
                lacks[name] += stream_lacks
        # The solver needs the space.
        del sums, input_lacks, stream_lacks, weight
        solve = moments.solver()
        return {name: Goal(moments, solve(lacks.pop(name)).float().numpy()) for name in names}


class _Sums:
    """Sums over tokens of products with the inputs x of a matrix.

    `inputs` of `x x^T`; `lacks` of `x (x' - x)^T`, with x' the inputs in the original model; `stream` of `x (h' - h)^T`, with h the
    residual streams of both.
    """

    def __init__(self) -> None:
        self.inputs: torch.Tensor | None = None
        self.lacks: torch.Tensor | None = None
        self.stream: torch.Tensor | None = None
        self.tokens = 0

    def add(self, given: torch.Tensor, wanted: torch.Tensor, measure: torch.Tensor, lack: torch.Tensor | None = None) -> None:
        """Inputs of some tokens `[tokens, in_features]` in both models, and what the stream lacks `[tokens, hidden_size]`.

        A token counts by the inverse of the mean square of its row of `measure`.
        """
        scale = measure.square().mean(1, keepdim=True).sqrt().clamp(min=torch.finfo(given.dtype).tiny)
        scaled = (given / scale).t()
        self.inputs = _added(self.inputs, scaled @ (given / scale))
        self.lacks = _added(self.lacks, scaled @ ((wanted - given) / scale))
        if lack is not None:
            self.stream = _added(self.stream, scaled @ (lack / scale))
        self.tokens += len(given)

    def means(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """The means over tokens of `inputs`, `lacks` and `stream`, in place of the sums."""
        if self.inputs is None or self.lacks is None:
            raise ValueError("there is nothing to take the mean of")
        stream = None if self.stream is None else self.stream.div_(self.tokens)
        return self.inputs.div_(self.tokens), self.lacks.div_(self.tokens), stream


def _added(sums: torch.Tensor | None, products: torch.Tensor) -> torch.Tensor:
    """float64 sums with float32 products added, in place."""
    if sums is None:
        return products.double()
    # Rows at a time: torch makes a float64 copy of what is added.
    for start in range(0, len(products), ROWS):
        sums[start : start + ROWS] += products[start : start + ROWS]
    return sums
