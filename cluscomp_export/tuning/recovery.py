"""Recovery: codebooks, row scales and norms trained so that the compressed model predicts what the original does.

The last level of ClusComp (Liao et al., arXiv 2503.13089, recovery training): end to end, the Kullback-Leibler divergence from
the original's predictions on a calibration text as loss, codes fixed. AdamW, its rate falling to 0 by half a cosine, in float32
on master copies. A tenth of the text is held out; what it is divergent by decides which state is kept.

Memory: the original as float32 (a large one is read matrix by matrix at every pass), the compressed model's codes, the
activations between blocks (gradient checkpointing: each block is computed again in the backward pass) and one window's logits
a few times over. Given the same machine and number of threads, the result is the same bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from cluscomp_export.progress import Progress, silent
from cluscomp_export.tuning.parameters import TrainableModel
from cluscomp_formats.errors import InvalidRequestError, Problem
from cluscomp_formats.ir import AnyArray, Model
from cluscomp_runtime.decoder import Decoder
from cluscomp_runtime.language_model import LanguageModel

__all__ = ["Recovery", "RecoveryOptions", "recover", "teacher_kernel"]

HELD_OUT = 0.1
"""Share of the text that is not trained on."""
MAX_HELD_OUT_WINDOWS = 4
KEPT_TEACHER_BYTES = 4 << 30
"""An original of no more than this as float32 is kept in memory."""
CLIP = 1.0
"""Largest norm of the gradient: keeps one odd window from undoing many steps."""


@dataclass(frozen=True)
class RecoveryOptions:
    """`steps` of `batch` windows of `context` tokens, drawn from the text at random; `rate` is relative to a parameter's size.

    `checks` evaluations on held-out windows are spread over the training; it stops when `patience` of them in a row
    bring no progress.
    """

    steps: int = 48
    batch: int = 4
    context: int = 512
    rate: float = 1e-3
    checks: int = 8
    patience: int = 3
    seed: int = 0


@dataclass(frozen=True)
class Recovery:
    """A trained model, and how it came about.

    `values` are the trained codebooks, row scales and norms as they are stored, by the names of `TrainableModel`. `curve` has
    one entry per check: the step, the mean loss of the steps before it, the divergence on the held-out windows (nats per
    token). `stopped` says why the training ended before its last step, if it did.
    """

    model: Model
    values: Mapping[str, AnyArray]
    curve: Sequence[Mapping[str, float]]
    stopped: str | None

    def record(self) -> dict[str, Any]:
        """The curve as JSON for the provenance."""
        return {"curve": [dict(entry) for entry in self.curve], "stopped": self.stopped}


def recover(
    trainable: TrainableModel,
    source: Model,
    token_ids: Sequence[int],
    options: RecoveryOptions,
    on_progress: Progress = silent,
) -> Recovery:
    """Train a clustered model towards its source on a text of `token_ids`; its codes stay as they are.

    A loss that is not finite ends the training, and the best state so far is kept. Raises UnsupportedError for an architecture
    the runtime does not know, InvalidRequestError for a text of fewer than 20 tokens.
    """
    training = _Training(trainable, source, token_ids, options, on_progress)
    return training.run()


def teacher_kernel(source: Model) -> str:
    """How the runtime is to hold the original: decoded once, if it is small enough, or anew at every pass.

    The latter costs little: a pass multiplies every weight with thousands of tokens. The results are the same bit for bit.
    """
    decoded = sum(4 * tensor.num_weights for tensor in source.tensors.values())
    return "dense" if decoded <= KEPT_TEACHER_BYTES else "reference"


@dataclass
class _Best:
    divergence: float
    values: dict[str, torch.Tensor] = field(repr=False)


class _Training:
    def __init__(
        self, student: TrainableModel, source: Model, token_ids: Sequence[int], options: RecoveryOptions, on_progress: Progress
    ) -> None:
        self.student = student
        self.teacher = LanguageModel.from_model(source, kernel=teacher_kernel(source)).decoder
        self.options = options
        self.on_progress = on_progress
        ids = torch.tensor(token_ids, dtype=torch.int64)
        reserved = max(2, round(HELD_OUT * len(ids)))
        self.context = min(options.context, reserved)
        if len(ids) < 20:
            problem = Problem("text_too_short", "the text is too short to train on", found=f"{len(ids)} tokens", expected="20")
            raise InvalidRequestError(problem)
        self.text = ids[:-reserved]
        count = min(MAX_HELD_OUT_WINDOWS, reserved // self.context)
        self.held_out = ids[-reserved:][: count * self.context].reshape(count, self.context)
        self.generator = np.random.default_rng(options.seed)
        parameters = student.parameters.values()
        # Adam moves every value by about the rate: relative to the parameter's size, one rate serves all.
        groups = [{"params": [values], "lr": options.rate * _size(values)} for values in parameters]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0)
        steps = options.steps
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * min(step, steps) / max(1, steps)))
        )

    def run(self) -> Recovery:
        options = self.options
        every = max(1, options.steps // max(1, options.checks))
        curve: list[dict[str, float]] = [{"step": 0, "held_out": self.divergence()}]
        best = _Best(curve[0]["held_out"], self.snapshot())
        losses: list[float] = []
        stopped, failures = None, 0
        for step in range(1, options.steps + 1):
            loss = self.step()
            if not math.isfinite(loss):
                stopped = f"the loss was not finite at step {step}; kept the best state before"
                break
            losses.append(loss)
            self.on_progress(f"recovery, loss {loss:.3f}", step, options.steps)
            if step % every and step != options.steps:
                continue
            held_out = self.divergence()
            curve.append({"step": step, "train": sum(losses) / len(losses), "held_out": held_out})
            losses = []
            if held_out < best.divergence:
                best, failures = _Best(held_out, self.snapshot()), 0
                continue
            failures += 1
            if failures == options.patience or not math.isfinite(held_out):
                stopped = f"no progress on held-out text since {failures} checks, at step {step}"
                break
        with torch.no_grad():
            for name, values in self.student.parameters.items():
                values.copy_(best.values[name])
        stored = self.student.stored()
        return Recovery(self.student.with_values(stored), stored, curve, stopped)

    def snapshot(self) -> dict[str, torch.Tensor]:
        return {name: values.detach().clone() for name, values in self.student.parameters.items()}

    def step(self) -> float:
        """One step of AdamW on a batch; the loss before it, in nats per token. Changes nothing if that is not finite."""
        length = min(self.context, len(self.text))
        starts = self.generator.integers(0, len(self.text) - length + 1, self.options.batch)
        windows = torch.stack([self.text[start : start + length] for start in starts.tolist()])
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss(windows)
        loss.backward()  # type: ignore[no-untyped-call]
        parameters = list(self.student.parameters.values())
        norm = torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        if not (math.isfinite(loss.item()) and math.isfinite(norm.item())):
            return math.nan
        self.optimizer.step()
        self.schedule.step()
        return loss.item()

    def divergence(self) -> float:
        """Mean divergence on the held-out windows, nats per token."""
        with torch.no_grad():
            return sum(self.loss(window[None]).item() for window in self.held_out) / len(self.held_out)

    def loss(self, windows: torch.Tensor) -> torch.Tensor:
        """Mean divergence of the student's predictions from the teacher's, nats per token, over ids `[windows, tokens]`."""
        with torch.no_grad():
            expected = _hidden(self.teacher, windows)
        hidden = _hidden(self.student.decoder, windows)
        losses = [
            checkpoint(self.window_loss, *pair, use_reentrant=False, preserve_rng_state=False)
            for pair in zip(hidden, expected, strict=True)
        ]
        return torch.stack(losses).sum() / windows.numel()

    def window_loss(self, hidden: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
        """Sum of the divergences of one window, from what flows into the heads, `[tokens, hidden_size]`."""
        with torch.no_grad():
            wanted = torch.log_softmax(self.teacher.head(expected), dim=-1)
        found = torch.log_softmax(self.student.decoder.head(hidden), dim=-1)
        return F.kl_div(found, wanted, reduction="sum", log_target=True)


def _size(values: torch.Tensor) -> float:
    """Root mean square."""
    return float(values.detach().square().mean().sqrt())


def _hidden(decoder: Decoder, windows: torch.Tensor) -> torch.Tensor:
    """What flows into the head, `[windows, tokens, hidden_size]`; in training only what flows between blocks is kept."""
    positions = decoder.positions(0, windows.shape[1])
    x = decoder.embedding.embedding(windows)
    for layer in decoder.layers:
        x = checkpoint(layer, x, positions, None, use_reentrant=False, preserve_rng_state=False)
    return decoder.norm(x)
