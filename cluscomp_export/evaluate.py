"""Perplexity, and divergence from a reference, on a text.

The protocol is llama.cpp's `perplexity`: the text is cut into windows of `context` tokens that do not overlap, each is run by
itself, and only the predictions in its second half are scored (`context // 2` up to `context - 2` predict the next
token). Where the tokenizer adds a begin-of-sequence token, it replaces the first token of every window.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from cluscomp_export.calibration import read_text
from cluscomp_export.progress import Progress, silent
from cluscomp_export.sources import open_source
from cluscomp_formats.errors import InvalidRequestError, Problem
from cluscomp_runtime import LanguageModel

__all__ = ["Evaluation", "evaluate", "evaluate_files", "text_windows"]

BATCH_TOKENS = 1024


@dataclass(frozen=True)
class Evaluation:
    """Results over all scored tokens, with everything needed to repeat them.

    `perplexity` with its standard error; with a reference also `reference_perplexity`, `kl` (mean Kullback-Leibler divergence
    of the model from the reference, nats per token) and `top1` (share of tokens whose likeliest next token agrees, 0 to 1).
    """

    perplexity: float
    perplexity_error: float
    kl: float | None
    top1: float | None
    reference_perplexity: float | None
    windows: int
    context: int
    scored_tokens: int


def text_windows(token_ids: Sequence[int], *, context: int, windows: int | None, bos_id: int | None) -> list[list[int]]:
    """Cut tokens into the first `windows` (None: all) full windows of `context` tokens.

    Raises InvalidRequestError if there is not even one.
    """
    if context < 4:
        raise InvalidRequestError(Problem("bad_option", "--context is too small", found=str(context), expected="at least 4"))
    available = len(token_ids) // context
    if available == 0:
        found, expected = f"{len(token_ids)} tokens", f"at least {context}"
        raise InvalidRequestError(Problem("text_too_short", "the text is too short", found=found, expected=expected))
    count = available if windows is None else min(windows, available)
    cut = [list(token_ids[start * context : (start + 1) * context]) for start in range(count)]
    return cut if bos_id is None else [[bos_id, *window[1:]] for window in cut]


@torch.inference_mode()
def evaluate(
    model: LanguageModel,
    windows: Sequence[Sequence[int]],
    *,
    reference: LanguageModel | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Evaluation:
    """Score the windows (all of one length). `reference` is the model that `kl` and `top1` compare with."""
    context = len(windows[0])
    first = context // 2
    losses: list[torch.Tensor] = []
    reference_losses: list[torch.Tensor] = []
    divergences: list[torch.Tensor] = []
    agreements: list[torch.Tensor] = []
    batch = max(1, BATCH_TOKENS // context)
    for start in range(0, len(windows), batch):
        ids = torch.tensor(windows[start : start + batch])
        targets = ids[:, first + 1 :].reshape(-1, 1)
        scores = _log_probabilities(model, ids, first)
        losses.append(-scores.gather(1, targets).double())
        if reference is not None:
            expected = _log_probabilities(reference, ids, first)
            reference_losses.append(-expected.gather(1, targets).double())
            divergences.append((expected.exp() * (expected - scores)).sum(1).double())
            agreements.append((expected.argmax(1) == scores.argmax(1)).double())
        on_progress(min(start + batch, len(windows)), len(windows))
    loss = torch.cat(losses)
    perplexity = math.exp(float(loss.mean()))
    return Evaluation(
        perplexity=perplexity,
        perplexity_error=perplexity * float(loss.std()) / math.sqrt(loss.numel()) if loss.numel() > 1 else math.nan,
        kl=float(torch.cat(divergences).mean()) if divergences else None,
        top1=float(torch.cat(agreements).mean()) if agreements else None,
        reference_perplexity=math.exp(float(torch.cat(reference_losses).mean())) if reference_losses else None,
        windows=len(windows),
        context=context,
        scored_tokens=loss.numel(),
    )


def _log_probabilities(model: LanguageModel, ids: torch.Tensor, first: int) -> torch.Tensor:
    """Log probabilities float32 `[batch * scored, vocabulary]` of the positions that predict the second half."""
    logits = model.forward(ids)[:, first:-1].float().cpu()
    return torch.log_softmax(logits.reshape(-1, logits.shape[-1]), dim=-1)


def evaluate_files(
    model_path: Path,
    *,
    text: Path,
    reference: Path | None = None,
    windows: int | None = None,
    context: int = 512,
    delta: Path | None = None,
    device: str = "cpu",
    on_progress: Progress = silent,
) -> Evaluation:
    """`evaluate` on files: any artefact or source, perhaps with a delta, a UTF-8 text, and the original to compare with.

    Both models must have the same tokenizer; the text is cut with the first one's. Raises InvalidFileError,
    InvalidRequestError, UnsupportedError.
    """
    words = read_text(text)
    on_progress("loading", 0, 1)
    model = LanguageModel.from_model(open_source(model_path, delta), device=device)
    original = LanguageModel.from_model(open_source(reference), device=device) if reference else None
    on_progress("loading", 1, 1)
    token_ids = _tokenize(model, words, model_path)
    if original is not None and reference is not None and _tokenize(original, words, reference) != token_ids:
        problem = Problem("other_tokenizer", "the reference cuts the text into other tokens", str(reference))
        raise InvalidRequestError(problem)
    begins = model.tokenizer is not None and token_ids[:1] == [model.tokenizer.bos_id]
    bos_id = token_ids[0] if begins else None
    cut = text_windows(token_ids, context=context, windows=windows, bos_id=bos_id)
    return evaluate(model, cut, reference=original, on_progress=lambda done, total: on_progress("scoring", done, total))


def _tokenize(model: LanguageModel, text: str, path: Path) -> list[int]:
    if model.tokenizer is None:
        remedy = "convert from a source with tokenizer.json"
        raise InvalidRequestError(Problem("no_tokenizer", "this model has no tokenizer", str(path), remedy=remedy))
    return model.tokenizer.encode(text)
