"""Error feedback: the codes of a matrix chosen channel by channel, so that its output errs least on a calibration text.

What errs is `(W - Q) x`. Over a text its squared length is the sum over rows of `(w - q) H (w - q)^T`, with H the second
moments of the matrix's inputs (the Hessian of GPTQ, Frantar et al., arXiv 2210.17323). In the reference layout a vector lies in
one input channel, so GPTQ's update, which goes from channel to channel, serves vectors as it serves numbers.

Blocks are done in order, and inputs are those of the model as compressed so far, so every block makes up for those before it.
Memory: a block's matrices as float32, the activations of the text (4 bytes x tokens x hidden_size), and for the distinct inputs
of one block 8 bytes x in_features^2 each, a few times that for the largest while its matrices are encoded.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt
import torch

from cluscomp_export.progress import Progress, silent
from cluscomp_formats.ir import Model, Tensor
from cluscomp_kernels.kmeans import assign_with_feedback, feedback_factor
from cluscomp_runtime.blocks import BlockRunner

__all__ = ["ErrorFeedback", "InputMoments"]

Floats = npt.NDArray[np.float32]

DAMPING = 0.1
"""Added to the diagonal, in units of its mean. GPTQ takes .01; more costs little on the calibration text and wins on others."""

ROWS = 512
"""Rows of moments added at a time."""

_BLOCK = re.compile(r"model\.layers\.(\d+)\..*")


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


class _Observer:
    """Sums up the moments of every distinct input of a block."""

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}
        self._tokens: dict[str, int] = {}
        self._input_of: dict[str, str] = {}
        self._last: tuple[str, torch.Tensor] | None = None

    def __call__(self, name: str, inputs: torch.Tensor) -> None:
        if self._last is not None and self._last[1] is inputs:
            self._input_of[name] = self._last[0]
            return
        self._last = (name, inputs)
        self._input_of[name] = name
        flat = inputs.flatten(0, -2)
        flat = flat / flat.square().mean(1, keepdim=True).sqrt().clamp(min=torch.finfo(flat.dtype).tiny)
        moments = flat.t() @ flat
        if name in self._sums:
            # Rows at a time: torch makes a float64 copy of what is added.
            for start in range(0, len(moments), ROWS):
                self._sums[name][start : start + ROWS] += moments[start : start + ROWS]
        else:
            self._sums[name] = moments.double()
        self._tokens[name] = self._tokens.get(name, 0) + len(flat)

    def results(self) -> dict[str, InputMoments]:
        """Moments by name of the matrix, one object for all matrices with the same input."""
        self._last = None
        # The sums were made in this mode, and nowhere else may they be changed.
        with torch.inference_mode():
            distinct = {name: InputMoments(self._sums.pop(name).div_(count)) for name, count in self._tokens.items()}
        return {name: distinct[source] for name, source in self._input_of.items()}


class ErrorFeedback:
    """Takes a model's blocks in order, shows how each of their matrices is to be encoded, and goes on with the result.

    `windows` int64 `[windows, tokens]` are the calibration text. Raises UnsupportedError for an architecture the runtime does
    not know, InvalidRequestError for ids the model does not have.
    """

    def __init__(self, source: Model, windows: torch.Tensor, on_progress: Progress = silent) -> None:
        self._source = source
        self._runner = BlockRunner(source)
        self._hidden = self._runner.embed(windows)
        self._next = 0
        self._on_progress = on_progress

    def covers(self, name: str) -> bool:
        """Whether the matrix belongs to a block that is yet to be done."""
        match = _BLOCK.fullmatch(name)
        return match is not None and int(match[1]) >= self._next

    def reach(
        self,
        name: str,
        clustered: Mapping[str, Tensor],
        finished: Callable[[str], bool],
        encode: Callable[[str, InputMoments], object],
    ) -> None:
        """Do all blocks up to that of matrix `name`.

        `encode` is called for every matrix among `clustered` that is not yet `finished`; afterwards `clustered` decodes it.
        """
        while self.covers(name):
            index = self._next
            prefix = f"model.layers.{index}."
            self._on_progress("choosing codes with error feedback", index, self._runner.num_blocks)
            if not all(finished(matrix) for matrix in clustered if matrix.startswith(prefix)):
                observer = _Observer()
                self._runner.run(index, self._source.tensors, self._hidden, observer)
                results = observer.results()
                for matrix in list(results):
                    # Taken out, so that moments are let go of as soon as the last matrix of their input is encoded.
                    moments = results.pop(matrix)
                    if matrix in clustered:
                        encode(matrix, moments)
            self._next += 1
            if self._next < self._runner.num_blocks:
                self._hidden = self._runner.run(index, {**self._source.tensors, **clustered}, self._hidden)
        self._on_progress("choosing codes with error feedback", self._next, self._runner.num_blocks)
