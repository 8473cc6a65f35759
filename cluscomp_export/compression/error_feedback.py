"""Error feedback: what the matrices of a block are encoded for, so that the compressed model stays near the original.

A matrix's inputs x come from the model as compressed so far. Its output should be what the original matrix gives in the
original model; the output projections of a branch, which are added to the residual stream, should bring the compressed
stream to the original one. `moments.py` has the formulas. That x belongs to the compressed model and the wanted output to the
original one is in the spirit of GPTAQ (Li et al., arXiv 2504.02692). Among the rows that a vector of a codebook spans, error is
steered to those that affect predictions least (`calibration/row_importance.py`).

The head, which may be the embedding as well, is encoded after all blocks, uncorrected: the embedding stays the original's for
everything else.

Memory: the activations of the text between blocks in both models and within a branch in one (4 bytes x tokens x features),
and for the inputs of one matrix 8 bytes x in_features x (in_features + out_features), a few times that while it is encoded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch

from cluscomp_export.compression.moments import InputMoments, MomentSums, Target
from cluscomp_formats.ir import Tensor
from cluscomp_runtime.blocks import BlockBranch, BlockRunner
from cluscomp_runtime.decoder import Mixed, Routed

__all__ = ["InputTargets", "OutputTargets", "Streams", "head_target", "run_original"]

Floats = npt.NDArray[np.float32]

BATCH = 4
"""Windows run at a time."""


@dataclass(frozen=True)
class Streams:
    """The residual streams of both models before a block: batches `[windows, tokens, hidden_size]` on the CPU."""

    original: Sequence[torch.Tensor]
    compressed: Sequence[torch.Tensor]

    @classmethod
    def start(cls, runner: BlockRunner, windows: torch.Tensor) -> Streams:
        """The streams before the first block, for token ids int64 `[windows, tokens]`: the same for both models.

        Raises InvalidRequestError for ids the model does not have.
        """
        embedded = list(torch.split(runner.embed(windows), BATCH))
        return cls(embedded, embedded)


def run_original(original: BlockBranch, streams: Streams, device: str) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The original model's streams after a branch, and what the output projections of the compressed one should bring about.

    That is the stream after the branch as well or, where a norm stands between the projections and the stream, the input of
    that norm: what comes out of it does not depend linearly on the projections.
    """
    after, wanted = [], []
    for batch in streams.original:
        hidden = batch.to(device)
        projected = original.projected(original.mixed(original.normed(hidden)))
        after.append(original.added(hidden, projected).cpu())
        wanted.append(projected.cpu() if original.has_post_norm else after[-1])
    return after, wanted


class InputTargets:
    """Targets of a branch's input projections: the outputs that the `original` ones give for the original model's inputs.

    `weights` are the tensors of the original model by name. An expert is encoded for the tokens that the router sends to it in
    the compressed model. If these are fewer than its inputs have channels, their moments say nothing about most directions, and
    a correction would fit noise: then all tokens of the text count.
    """

    def __init__(
        self,
        original: BlockBranch,
        streams: Streams,
        weights: Mapping[str, Tensor],
        importance: Mapping[str, Floats],
        device: str,
    ) -> None:
        self._original, self._streams, self._weights = original, streams, weights
        self._importance, self._device = importance, device
        self._chosen: list[torch.Tensor] | None = None
        if original.has_experts:
            self._chosen = [original.chosen(original.normed(given.to(device))).cpu() for given in streams.compressed]

    def of(self, group: int) -> dict[str, Target]:
        """The targets of a group of projections, which share their input, by name."""
        names = self._original.inputs[group]
        if self._chosen is None:
            moments, input_residuals = self._sums(None).results()
        else:
            sums = self._sums([(chosen == group).any(-1) for chosen in self._chosen])
            few = sums.tokens < self._weights[names[0]].shape[1]
            moments, input_residuals = self._of_all_tokens if few else sums.results()
        residuals = {
            name: input_residuals @ torch.from_numpy(self._weights[name].decode().astype(np.float64)).t() for name in names
        }
        # The following needs the space.
        del input_residuals
        return _targets(moments, residuals, self._importance)

    @cached_property
    def _of_all_tokens(self) -> tuple[InputMoments, torch.Tensor]:
        return self._sums(None).results()

    def _sums(self, sent: Sequence[torch.Tensor] | None) -> MomentSums:
        """Sums over all tokens, or those of the masks `sent`, `[windows, tokens]` by batch."""
        sums, normed = MomentSums(), self._original.normed
        for number, (given, wanted) in enumerate(zip(self._streams.compressed, self._streams.original, strict=True)):
            pair = (given, wanted) if sent is None else (given[sent[number]], wanted[sent[number]])
            inputs = normed(pair[0].to(self._device))
            sums.add(inputs, normed(pair[1].to(self._device)) - inputs, inputs)
        return sums


class OutputTargets:
    """Targets of a branch's output projections: to bring about what is `wanted` (`run_original`).

    `compressed` is the branch with its input projections compressed and the original output projections; `inputs` are the
    inputs of these. Experts share the residual of a token in proportion to the squares of the router's weights: the least
    change of their outputs that makes up for it. An expert with fewer tokens than its output projection has input channels is
    encoded for the inputs that all tokens would give it, uncorrected.
    """

    def __init__(
        self,
        compressed: BlockBranch,
        streams: Streams,
        inputs: Sequence[Mixed],
        wanted: Sequence[torch.Tensor],
        importance: Mapping[str, Floats],
        device: str,
    ) -> None:
        self._compressed, self._streams, self._inputs, self._wanted = compressed, streams, inputs, wanted
        self._importance, self._device = importance, device

    def of(self, number: int) -> dict[str, Target]:
        """The target of an output projection, by its name."""
        name, sums = self._compressed.outputs[number], MomentSums()
        for batch, x in enumerate(self._inputs):
            wanted = self._wanted[batch].to(self._device)
            if isinstance(x, Routed):
                here = x.chosen == number
                sent, weights = here.any(-1), x.weights.square()
                share = (weights[here] / weights.sum(-1)[sent]).unsqueeze(-1)
                residual = share * self._residuals[batch][sent]
                sums.add(x.features[here].to(self._device), residual.to(self._device), wanted[sent.to(self._device)])
            else:
                sums.add(x.to(self._device), self._residual(batch), wanted)
        if self._compressed.has_experts and sums.tokens < sums.features:
            return {name: Target(self._of_all_tokens(number), importance=self._importance.get(name))}
        moments, residuals = sums.results()
        del sums
        return _targets(moments, {name: residuals}, self._importance)

    def _residual(self, batch: int) -> torch.Tensor:
        hidden = self._streams.compressed[batch].to(self._device)
        projected = self._compressed.projected(self._inputs[batch].to(self._device))
        reached = projected if self._compressed.has_post_norm else self._compressed.added(hidden, projected)
        return self._wanted[batch].to(self._device) - reached

    @cached_property
    def _residuals(self) -> list[torch.Tensor]:
        """Those of all batches, on the CPU: every expert needs them."""
        return [self._residual(batch).cpu() for batch in range(len(self._inputs))]

    def _of_all_tokens(self, number: int) -> InputMoments:
        sums = MomentSums()
        for given, wanted in zip(self._streams.compressed, self._wanted, strict=True):
            inputs = self._compressed.mixed_by(number, self._compressed.normed(given.to(self._device)))
            sums.add(inputs, None, wanted.to(self._device))
        return sums.moments()


def head_target(runner: BlockRunner, compressed: Sequence[torch.Tensor]) -> Target:
    """Target of the head: itself, under the moments of the `compressed` stream after the last block."""
    sums = MomentSums()
    for given in compressed:
        inputs = runner.normed(given)
        sums.add(inputs, None, inputs)
    return Target(sums.moments())


def _targets(
    moments: InputMoments, residuals: Mapping[str, torch.Tensor], importance: Mapping[str, Floats]
) -> dict[str, Target]:
    corrections = moments.corrections(residuals)
    return {name: Target(moments, correction, importance.get(name)) for name, correction in corrections.items()}
