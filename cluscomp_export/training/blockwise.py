"""Block-wise tuning: train the parameters of one block so that its output is that of the original block.

This is the second phase of ClusComp (Liao et al., arXiv 2503.13089). Codes are fixed; codebooks, and here also row scales and
norms, are trained. The loss is the squared error of the block's output in the compressed model, with its inputs there, compared
with the block's output in the original model. The paper's second loss compares with the output of the original block for the
same input. A block that shares all its codebooks with other blocks is skipped: scales and norms alone gain nothing after error
feedback.

Errors are relative to each token's sum of squares: the first token of a text can have a thousand times that of the others. Some
windows are held out and decide which state is kept; the state before the training is one of them.

One block is on the device at a time: its codes, float32 master values of its parameters with gradients and both moments of
Adam, and the activations of a batch. Activations between blocks stay in host memory.
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
from cluscomp_runtime.blocks import BlockRunner

__all__ = ["BlockwiseOptions", "relative_error", "tune_block"]


@dataclass(frozen=True)
class BlockwiseOptions:
    """`epochs` over the windows that are not held out, in batches of `batch`; `rate` is relative to each parameter's magnitude.

    `same_input` is the weight of the second loss; 0 disables it. `held_out` is a share of the windows; `patience` epochs
    without improvement on them end the training of a block. `precision` is that of `TrainingOptions`.
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
        """Most entries that a curve can have: one before the training, one at the end of every epoch."""
        return self.epochs + 1


@dataclass(frozen=True)
class _Windows:
    """Inputs of a block, and target outputs for each loss; all `[windows, tokens, hidden_size]`."""

    given: torch.Tensor
    targets: tuple[torch.Tensor, ...]

    @property
    def count(self) -> int:
        """Number of windows; all have the same number of tokens."""
        return len(self.given)

    def take(self, chosen: torch.Tensor) -> _Windows:
        return _Windows(self.given[chosen], tuple(target[chosen] for target in self.targets))


def tune_block(
    runner: BlockRunner,
    index: int,
    tensors: Mapping[str, Tensor],
    given: Sequence[torch.Tensor],
    targets: Sequence[torch.Tensor],
    options: BlockwiseOptions,
    *,
    fixed: Collection[str] = (),
    original: Mapping[str, Tensor] | None = None,
    device: str = "cpu",
    on_progress: Progress = silent,
) -> Trained | None:
    """Train block `index` of a model with these `tensors`; None if it has no codebook of its own, or too few windows.

    `given` are its inputs and `targets` the outputs to reach, batches `[windows, tokens, hidden_size]`. `fixed` names codebooks
    that are not trained. `original` has the tensors of the original model, for `same_input`. A loss that is not finite ends the
    training with the best state before it.
    """
    count = sum(len(batch) for batch in given)
    held_out = max(1, round(options.held_out * count))
    if held_out >= count:
        return None
    with torch.inference_mode(False):
        place = torch.device(device)
        block = TrainableBlock(runner, index, tensors, fixed, device=place)
        # Checked before the activations are copied.
        if not any(kind_of(name) == "codebook" for name in block.parameters):
            return None
        all_targets = [targets]
        if options.same_input > 0 and original is not None:
            all_targets.append(runner.past(index, original, given, device))
        # Tensors made in inference mode cannot be trained with; copies can.
        windows = _Windows(torch.cat(list(given)).clone(), tuple(torch.cat(list(batches)).clone() for batches in all_targets))
        per_epoch = -(-(count - held_out) // options.batch)

        def batch(step: int) -> _Windows:
            epoch, position = divmod(step, per_epoch)
            order = np.random.default_rng((options.seed, index, epoch)).permutation(count - held_out)
            return windows.take(torch.from_numpy(order[position * options.batch :][: options.batch]))

        def loss(batch: _Windows) -> torch.Tensor:
            found = block(batch.given.to(place))
            weights = (1.0, options.same_input)
            errors = [
                weight * relative_error(found, target.to(place)) for weight, target in zip(weights, batch.targets, strict=False)
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


def relative_error(found: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean over tokens of the squared error divided by the target's sum of squares, both `[..., tokens, features]`."""
    squares = target.square().sum(-1).clamp(min=torch.finfo(target.dtype).tiny)
    return ((found - target).square().sum(-1) / squares).mean()
