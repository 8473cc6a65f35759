"""Error feedback: what the matrices of a block are encoded for, so that the compressed model stays near the original.

A matrix's inputs x come from the model as compressed so far. Its output should be what the original matrix gives in the
original model; the output projection of a half block, which is added to the residual stream, should bring the compressed stream
to the original one. `moments.py` has the formulas. That x belongs to the compressed model and the wanted output to the original
one is in the spirit of GPTAQ (Li et al., arXiv 2504.02692). Among the rows that a vector of a codebook spans, error is steered
to those that affect predictions least (`calibration/row_importance.py`).

The head, which may be the embedding as well, is encoded after all blocks, uncorrected: the embedding stays the original's for
everything else.

Memory: the activations of the text between blocks in both models and within half a block in one (4 bytes x tokens x features),
and for the inputs of one matrix 8 bytes x in_features x (in_features + out_features), a few times that while it is encoded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from cluscomp_export.compression.moments import InputMoments, MomentSums, Target
from cluscomp_formats.ir import Tensor
from cluscomp_runtime.blocks import BlockRunner, Half

__all__ = ["Streams", "head_target", "input_targets", "output_targets"]

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


def input_targets(
    original: Half, streams: Streams, weights: Mapping[str, Tensor], importance: Mapping[str, Floats], device: str
) -> dict[str, Target]:
    """Targets of the input projections: the outputs that the `original` ones give for the original model's inputs.

    `weights` are the tensors of the original model by name.
    """
    sums = MomentSums()
    for given, wanted in zip(streams.compressed, streams.original, strict=True):
        inputs = original.normed(given.to(device))
        sums.add(inputs, original.normed(wanted.to(device)) - inputs, inputs)
    moments, input_residuals = sums.results()
    residuals = {
        name: input_residuals @ torch.from_numpy(weights[name].decode().astype(np.float64)).t() for name in original.readers
    }
    # The following needs the space.
    del sums, input_residuals
    return _targets(moments, residuals, importance)


def output_targets(
    original: Half,
    streams: Streams,
    inputs: Sequence[torch.Tensor],
    after: Sequence[torch.Tensor],
    importance: Mapping[str, Floats],
    device: str,
) -> dict[str, Target]:
    """Target of the output projection: the original model's residual stream `after` the half block.

    `inputs` are the projection's inputs in the compressed model, batches `[windows, tokens, in_features]`.
    """
    sums = MomentSums()
    for given, features, wanted in zip(streams.compressed, inputs, after, strict=True):
        stream, x, target = (values.to(device) for values in (given, features, wanted))
        sums.add(x, target - original.written(stream, x), target)
    moments, residuals = sums.results()
    del sums
    return _targets(moments, {original.writer: residuals}, importance)


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
