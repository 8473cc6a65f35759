"""Block-wise tuning: the parameters of one block trained so that it gives what the original block gives.

The second level of ClusComp (Liao et al., arXiv 2503.13089): codes stay as they are; codebooks, and here row scales and norms
too, are trained by AdamW. The loss is the squared error of what flows out of the block in the compressed model, on what flows
into it there, against what flows out of the original block in the original model; `same_input` adds the paper's second loss,
against what the original block makes of the same input. A codebook that other blocks use as well stays as it is.

Errors count relative to each token's energy: the first token of a text can have a thousand times that of the others. Some
windows are held out, and decide which state is kept, the one before the training included.

One block is on the device at a time: its codes, float32 master values of its parameters with gradients and both moments of
Adam, and the activations of a batch. What flows between blocks stays in the memory of the host.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from cluscomp_export.tuning.parameters import TrainableBlock, relative_size
from cluscomp_export.tuning.schedule import rate_factor
from cluscomp_formats.ir import AnyArray, Tensor
from cluscomp_runtime.blocks import BlockRunner

__all__ = ["BlockTuning", "BlockwiseOptions", "tune_block"]

Schedule = Literal["cosine", "constant"]
Precision = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class BlockwiseOptions:
    """`epochs` over the windows that are not held out, in batches of `batch`; `rate` is relative to a parameter's size.

    `same_input` weighs the second loss; 0 leaves it out. `patience` epochs in a row without progress end a block. `precision`
    is that of the activations; parameters and their updates are float32.
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
    device: str = "cpu"

    def recorded(self) -> dict[str, Any]:
        """What determines the result."""
        return {name: value for name, value in asdict(self).items() if name not in ("seed", "device")}


@dataclass(frozen=True)
class BlockTuning:
    """The parameters of a block as they are to be stored, by the names of `TrainableBlock`, and how they came about.

    `curve` has an entry per epoch: mean loss of its steps and on the held-out windows, the first before any step. `stopped`
    says why the training ended early, if it did.
    """

    values: Mapping[str, AnyArray]
    curve: Sequence[Mapping[str, float]]
    stopped: str | None

    def record(self) -> dict[str, Any]:
        """The curve as JSON."""
        return {"curve": [dict(entry) for entry in self.curve], "stopped": self.stopped}


def tune_block(
    runner: BlockRunner,
    index: int,
    tensors: Mapping[str, Tensor],
    given: Sequence[torch.Tensor],
    wanted: Sequence[torch.Tensor],
    options: BlockwiseOptions,
    *,
    shared: frozenset[str] = frozenset(),
    original: Mapping[str, Tensor] | None = None,
) -> BlockTuning:
    """Train block `index` of a model with these `tensors`.

    `given` is what flows into it and `wanted` what shall flow out, batches `[windows, tokens, hidden_size]`; `shared` names the
    codebooks to leave alone. `original` holds the tensors of the original model, for `same_input`. A loss that is not finite
    ends the training; the best state before it is kept.
    """
    with torch.inference_mode(False):
        return _Training(runner, index, tensors, given, wanted, options, shared, original).run()


class _Training:
    def __init__(
        self,
        runner: BlockRunner,
        index: int,
        tensors: Mapping[str, Tensor],
        given: Sequence[torch.Tensor],
        wanted: Sequence[torch.Tensor],
        options: BlockwiseOptions,
        shared: frozenset[str],
        original: Mapping[str, Tensor] | None,
    ) -> None:
        self.options = options
        dtype = torch.bfloat16 if options.precision == "bfloat16" else torch.float32
        block = {name: tensor for name, tensor in tensors.items() if name.startswith(f"model.layers.{index}.")}
        self.block = TrainableBlock(runner, index, block, frozen_codebooks=shared, dtype=dtype, device=options.device)
        # Tensors made in inference mode cannot take part in a training.
        self.given, self.wanted = (torch.cat(list(batches)).clone() for batches in (given, wanted))
        self.same_input = None
        if options.same_input > 0 and original is not None:
            runs = [runner.half(index, half, original) for half in (0, 1)]
            self.same_input = torch.cat([runs[1](runs[0](batch)) for batch in given]).clone()
        count = len(self.given)
        held_out = max(1, round(options.held_out * count)) if count > 1 else 0
        self.text, self.held_out = torch.arange(count - held_out), torch.arange(count - held_out, count)
        self.generator = torch.Generator().manual_seed(options.seed * 1_000_003 + index)

    def run(self) -> BlockTuning:
        options = self.options
        parameters = list(self.block.parameters.values())
        before = self.block.stored()
        if not parameters or not len(self.held_out):
            return BlockTuning(before, (), "nothing to train" if not parameters else "one window is too few")
        groups = [{"params": [values], "lr": options.rate * relative_size(values)} for values in parameters]
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0)
        steps = options.epochs * -(-len(self.text) // options.batch)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_factor(step, steps, options.schedule))
        best = self.error()
        curve: list[dict[str, float]] = [{"epoch": 0, "held_out": best}]
        values, failures, stopped = before, 0, None
        for epoch in range(1, options.epochs + 1):
            losses = []
            for chosen in torch.split(self.text[torch.randperm(len(self.text), generator=self.generator)], options.batch):
                optimizer.zero_grad(set_to_none=True)
                loss = self.loss(chosen)
                loss.backward()  # type: ignore[no-untyped-call]
                norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
                if not (math.isfinite(loss.item()) and math.isfinite(norm.item())):
                    stopped = f"the loss was not finite in epoch {epoch}; kept the best state before"
                    return BlockTuning(values, curve, stopped)
                optimizer.step()
                schedule.step()
                losses.append(loss.item())
            held_out = self.error()
            curve.append({"epoch": epoch, "train": sum(losses) / len(losses), "held_out": held_out})
            if held_out < best:
                best, values, failures = held_out, self.block.stored(), 0
                continue
            failures += 1
            if failures == options.patience and epoch < options.epochs:
                stopped = f"no progress on held-out windows in {failures} epochs"
                break
        return BlockTuning(values, curve, stopped)

    def error(self) -> float:
        """Mean loss on the held-out windows."""
        with torch.no_grad():
            return sum(self.loss(chosen).item() for chosen in torch.split(self.held_out, 1)) / len(self.held_out)

    def loss(self, chosen: torch.Tensor) -> torch.Tensor:
        """Mean over the tokens of the chosen windows of the squared error over the energy of what is wanted."""
        device = self.options.device
        found = self.block(self.given[chosen]).float()
        loss = _relative_error(found, self.wanted[chosen].to(device))
        if self.same_input is not None:
            loss = loss + self.options.same_input * _relative_error(found, self.same_input[chosen].to(device))
        return loss


def _relative_error(found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    energy = wanted.square().sum(-1).clamp(min=torch.finfo(wanted.dtype).tiny)
    return ((found - wanted).square().sum(-1) / energy).mean()
