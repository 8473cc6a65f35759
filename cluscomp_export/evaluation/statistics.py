"""Perplexity and divergence from the scores of tokens, as llama.cpp's `perplexity --kl-divergence` reports them.

Four numbers per token are kept, never logits. Standard errors treat tokens as independent: they are errors of the sample of
tokens, not of the choice of text.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import torch

from cluscomp_formats.errors import ClusCompError, Problem

__all__ = ["Scores", "TokenScores"]

MAX_ELEMENTS = 1 << 24
"""Logits processed at a time."""

LARGEST_EXPONENT = 700.0
"""The largest mean loss whose perplexity is a finite float."""


@dataclass(frozen=True)
class Scores:
    """Statistics over all scored tokens; divergences are in nats per token, `_error` is a standard error (None for one token).

    `kl` is the mean Kullback-Leibler divergence of the model from the reference, `kl_median`, `kl_p90`, `kl_p99` and `kl_max`
    its quantiles over tokens. `top1` is the share of tokens, 0 to 1, where both predict the same most likely token.
    `perplexity_ratio` is the model's over the reference's; its error considers that both score the same tokens. Without a
    reference, everything except `perplexity` is None.
    """

    scored_tokens: int
    perplexity: float
    perplexity_error: float | None
    reference_perplexity: float | None = None
    reference_perplexity_error: float | None = None
    perplexity_ratio: float | None = None
    perplexity_ratio_error: float | None = None
    kl: float | None = None
    kl_error: float | None = None
    kl_median: float | None = None
    kl_p90: float | None = None
    kl_p99: float | None = None
    kl_max: float | None = None
    top1: float | None = None
    top1_error: float | None = None


@dataclass
class TokenScores:
    """Collects the scores of tokens as float64 on the CPU."""

    _losses: list[torch.Tensor] = field(default_factory=list)
    _reference_losses: list[torch.Tensor] = field(default_factory=list)
    _divergences: list[torch.Tensor] = field(default_factory=list)
    _agreements: list[torch.Tensor] = field(default_factory=list)

    def add(self, logits: torch.Tensor, reference: torch.Tensor | None, targets: torch.Tensor) -> None:
        """Score logits `[tokens, vocab_size]`, with those of the reference, that predict `targets` int64 `[tokens]`."""
        rows = max(1, MAX_ELEMENTS // logits.shape[-1])
        for start in range(0, len(targets), rows):
            part = slice(start, start + rows)
            self._add(logits[part], None if reference is None else reference[part], targets[part])

    def _add(self, logits: torch.Tensor, reference: torch.Tensor | None, targets: torch.Tensor) -> None:
        scores = torch.log_softmax(logits.float(), dim=-1)
        columns = targets[:, None].to(scores.device)
        self._losses.append(_gathered(-scores.gather(1, columns)[:, 0]))
        if reference is not None:
            expected = torch.log_softmax(reference.float(), dim=-1)
            self._reference_losses.append(_gathered(-expected.gather(1, columns)[:, 0]))
            self._agreements.append(_gathered((expected.argmax(1) == scores.argmax(1)).float()))
            self._divergences.append(_gathered((expected.exp() * (expected - scores)).sum(1)))

    def statistics(self) -> Scores:
        """Statistics over all tokens so far, at least one. Raises ClusCompError if the model's outputs are not finite."""
        loss = torch.cat(self._losses)
        perplexity, error = _perplexity(loss, "the model")
        if not self._divergences:
            return Scores(loss.numel(), perplexity, error)
        reference_loss = torch.cat(self._reference_losses)
        reference_perplexity, reference_error = _perplexity(reference_loss, "the reference")
        # Both means are over the same tokens, so the error is that of the mean of the differences.
        ratio, ratio_error = _perplexity(loss - reference_loss, "the model")
        divergence, agreement = torch.cat(self._divergences), torch.cat(self._agreements)
        # Not torch.quantile, which refuses more than 2^24 values.
        median, p90, p99 = np.quantile(divergence.numpy(), (0.5, 0.9, 0.99)).tolist()
        return Scores(
            scored_tokens=loss.numel(),
            perplexity=perplexity,
            perplexity_error=error,
            reference_perplexity=reference_perplexity,
            reference_perplexity_error=reference_error,
            perplexity_ratio=ratio,
            perplexity_ratio_error=ratio_error,
            kl=float(divergence.mean()),
            kl_error=_error_of_mean(divergence),
            kl_median=median,
            kl_p90=p90,
            kl_p99=p99,
            kl_max=float(divergence.max()),
            top1=float(agreement.mean()),
            top1_error=_error_of_mean(agreement),
        )


def _gathered(values: torch.Tensor) -> torch.Tensor:
    return values.cpu().double()


def _perplexity(losses: torch.Tensor, whose: str) -> tuple[float, float | None]:
    """`exp` of the mean loss, and its standard error to first order."""
    mean = float(losses.mean())
    if not mean < LARGEST_EXPONENT:
        message = f"{whose} produced non-finite logits, or its perplexity overflowed"
        remedy = "compute in float32; inspect and verify check whether the file is valid"
        raise ClusCompError(Problem("not_finite", message, found=f"mean loss {mean}", remedy=remedy))
    error = _error_of_mean(losses)
    return math.exp(mean), None if error is None else math.exp(mean) * error


def _error_of_mean(values: torch.Tensor) -> float | None:
    return float(values.std()) / math.sqrt(values.numel()) if values.numel() > 1 else None
