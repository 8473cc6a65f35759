"""Losses: prediction of the next token of a text, and divergence from the predictions of another model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from cluscomp_runtime.decoder import Decoder

__all__ = ["Batch", "PredictionLoss"]


@dataclass(frozen=True)
class Batch:
    """Token ids int64 `[windows, tokens]`, and a bool of the same shape: is the prediction of the next token scored?"""

    ids: torch.Tensor
    scored: torch.Tensor

    @property
    def count(self) -> int:
        """Number of scored predictions."""
        return int(self.scored.sum())


class PredictionLoss:
    """`task` times the negative log-likelihood of the next token plus `kl` times the divergence from `teacher`.

    It is the mean over the scored predictions, in nats per token. The divergence is the Kullback-Leibler divergence of the
    student from the teacher. If `task` is not zero, the last token of a window must not be scored: no token follows it.
    """

    def __init__(self, student: Decoder, teacher: Decoder | None = None, *, task: float, kl: float) -> None:
        self.student = student
        self.teacher = teacher
        self.task = task
        self.kl = kl

    def __call__(self, batch: Batch) -> torch.Tensor:
        ids, scored = batch.ids.to(self.student.device), batch.scored.to(self.student.device)
        targets = F.pad(ids[:, 1:], (0, 1))
        expected = None
        if self.teacher is not None:
            with torch.no_grad():
                expected = _hidden(self.teacher, ids)
        hidden = _hidden(self.student, ids)
        losses = []
        for index, counts in enumerate(scored):
            wanted = None if expected is None else expected[index][counts]
            # One window at a time: the logits of a whole batch would be by far the largest tensor.
            losses.append(self._window(hidden[index][counts], targets[index][counts], wanted))
        return torch.stack(losses).sum() / batch.count

    def _window(self, hidden: torch.Tensor, targets: torch.Tensor, expected: torch.Tensor | None) -> torch.Tensor:
        """`window_loss` with its gradient computed immediately, so that no logits are kept or computed again."""
        if not hidden.requires_grad:
            return self.window_loss(hidden, targets, expected)
        at = hidden.detach().requires_grad_()
        loss = self.window_loss(at, targets, expected)
        (gradient,) = torch.autograd.grad(loss, at)
        # Has the value of the loss and its gradient.
        return loss.detach() + (gradient * (hidden - hidden.detach())).sum()

    def window_loss(self, hidden: torch.Tensor, targets: torch.Tensor, expected: torch.Tensor | None) -> torch.Tensor:
        """Sum of the losses of one window, from the inputs of the heads, `[predictions, hidden_size]`."""
        found = torch.log_softmax(self.student.head(hidden).float(), dim=-1)
        loss = found.new_zeros(())
        if self.task:
            loss = loss + self.task * F.nll_loss(found, targets, reduction="sum")
        if self.teacher is not None and expected is not None:
            with torch.no_grad():
                wanted = torch.log_softmax(self.teacher.head(expected).float(), dim=-1)
            loss = loss + self.kl * F.kl_div(found, wanted, reduction="sum", log_target=True)
        return loss


def _hidden(decoder: Decoder, windows: torch.Tensor) -> torch.Tensor:
    """Inputs of the head, `[windows, tokens, hidden_size]`. In training, only activations between blocks are kept."""
    positions = decoder.positions(0, windows.shape[1])
    x = decoder.embed(windows)
    for layer in decoder.layers:
        x = checkpoint(layer, x, positions, None, use_reentrant=False, preserve_rng_state=False)
    return decoder.norm(x)
