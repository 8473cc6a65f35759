"""Block-wise tuning: the parameters of one block trained so that it gives what the original block gives.

The second level of ClusComp (Liao et al., arXiv 2503.13089): codes stay as they are; codebooks, and here row scales and norms
too, are trained. The loss is the squared error of what flows out of the block in the compressed model, for what flows into it
there, against what flows out of the block in the original model; the paper's second loss is against what the original block
makes of the same input. A block whose codebooks other blocks use as well is left alone: scales and norms by themselves gain
nothing after error feedback.

Errors count relative to each token's energy: the first token of a text can have a thousand times that of the others. Some
windows are held out, and decide which state is kept, the one before the training included.

One block is on the device at a time: its codes, float32 master values of its parameters with their gradients and both moments
of Adam, and the activations of a batch. What flows between blocks stays in the memory of the host.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from cluscomp_export.training.loop import Precision, Schedule, Trained, Training, TrainingOptions
from cluscomp_export.training.parameters import TrainableBlock
from cluscomp_formats.ir import Tensor
from cluscomp_formats.parameters import kind_of
from cluscomp_formats.progress import Progress, silent
from cluscomp_runtime.blocks import HALVES, BlockRunner

__all__ = ["BlockwiseOptions", "relative_error", "tune_block"]


@dataclass(frozen=True)
class BlockwiseOptions:
    """`epochs` over the windows that are not held out, in batches of `batch`; `rate` is relative to a parameter's size.

    `same_input` weighs the second loss; 0 leaves it out. `held_out` is a share of the windows; `patience` epochs in a row
    without progress on them end the training of a block. `precision` is that of `TrainingOptions`.
    """

    epochs: int = 2
    batch: int = 2
    rate: float = 2e-3
    schedule: Schedule = "cosine"
    same_input: float = 0.0
    held_out: float = 0.125
    patience: int = 2
    precision: Precision = "float32"
    seed: int = 0

    @property
    def most_checks(self) -> int:
        """Entries of the longest curve there can be: one before the training, one at the end of every epoch."""
        return self.epochs + 1


@dataclass(frozen=True)
class _Windows:
    """What flows into a block and what shall flow out, `[windows, tokens, hidden_size]`, one such for each loss."""

    given: torch.Tensor
    wanted: tuple[torch.Tensor, ...]

    @property
    def count(self) -> int:
        """How many windows; all have the same number of tokens."""
        return len(self.given)

    def take(self, chosen: torch.Tensor) -> _Windows:
        return _Windows(self.given[chosen], tuple(wanted[chosen] for wanted in self.wanted))


def tune_block(
    runner: BlockRunner,
    index: int,
    tensors: Mapping[str, Tensor],
    given: Sequence[torch.Tensor],
    wanted: Sequence[torch.Tensor],
    options: BlockwiseOptions,
    *,
    fixed: Collection[str] = (),
    original: Mapping[str, Tensor] | None = None,
    device: str = "cpu",
    on_progress: Progress = silent,
) -> Trained | None:
    """Train block `index` of a model with these `tensors`; None if no codebook is its own, or there is too little to train on.

    `given` is what flows into it and `wanted` what shall flow out, batches `[windows, tokens, hidden_size]`; `fixed` names the
    codebooks to leave alone. `original` holds the tensors of the original model, for `same_input`. A loss that is not finite
    ends the training; the best state before it is kept.
    """
    count = sum(len(batch) for batch in given)
    held_out = max(1, round(options.held_out * count))
    if held_out >= count:
        return None
    with torch.inference_mode(False):
        place = torch.device(device)
        block = TrainableBlock(runner, index, tensors, fixed, device=place)
        # Before the activations are copied.
        if not any(kind_of(name) == "codebook" for name in block.parameters):
            return None
        wanteds = [wanted]
        if options.same_input > 0 and original is not None:
            attention, feed_forward = (runner.half(index, half, original, device) for half in HALVES)
            wanteds.append([feed_forward(attention(batch.to(device))).cpu() for batch in given])
        # Tensors made in inference mode cannot take part in a training: copies can.
        windows = _Windows(torch.cat(list(given)).clone(), tuple(torch.cat(list(batches)).clone() for batches in wanteds))
        per_epoch = -(-(count - held_out) // options.batch)

        def batch(step: int) -> _Windows:
            epoch, position = divmod(step, per_epoch)
            order = np.random.default_rng((options.seed, index, epoch)).permutation(count - held_out)
            return windows.take(torch.from_numpy(order[position * options.batch :][: options.batch]))

        def loss(batch: _Windows) -> torch.Tensor:
            found = block(batch.given.to(place))
            weights = (1.0, options.same_input)
            errors = [
                weight * relative_error(found, target.to(place)) for weight, target in zip(weights, batch.wanted, strict=False)
            ]
            return torch.stack(errors).sum()

        training = TrainingOptions(
            steps=options.epochs * per_epoch,
            batch=options.batch,
            rate=options.rate,
            schedule=options.schedule,
            checks=options.epochs,
            patience=options.patience,
            precision=options.precision,
            seed=options.seed,
        )
        kept = [windows.take(chosen) for chosen in torch.split(torch.arange(count - held_out, count), options.batch)]
        return Training(block, loss, batch, kept, training, name=f"tuning block {index}", on_progress=on_progress).run()


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Mean over tokens of the squared error over the energy of what is wanted, both `[..., tokens, features]`."""
    energy = wanted.square().sum(-1).clamp(min=torch.finfo(wanted.dtype).tiny)
    return ((found - wanted).square().sum(-1) / energy).mean()
