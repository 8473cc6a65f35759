"""Training examples: rows of tokens with the predictions that are scored, and batches of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from cluscomp_export.training.losses import Batch
from cluscomp_runtime.tokenizer import Tokenizer

__all__ = ["Example", "cut", "make_batch", "shuffled_batches", "split", "text_examples"]


@dataclass(frozen=True)
class Example:
    """Token ids, and for each whether the prediction of the next token is scored there; never at the last."""

    ids: tuple[int, ...]
    scored: tuple[bool, ...]


def text_examples(tokenizer: Tokenizer, text: str, context: int) -> list[Example]:
    """A text cut into windows of `context` tokens, the last one possibly shorter; every prediction is scored.

    If the tokenizer adds a begin token, it replaces the first token of each window, as in `eval`.
    """
    ids = tokenizer.encode(text)
    begin = ids[:1] if ids[:1] == [tokenizer.bos_id] else []
    windows = [ids[start : start + context] for start in range(0, len(ids), context)]
    windows = [[*(begin or window[:1]), *window[1:]] for window in windows if len(window) > 1]
    return [Example(tuple(window), (*(True,) * (len(window) - 1), False)) for window in windows]


def cut(examples: Sequence[Example], context: int) -> list[Example]:
    """The examples cut to `context` tokens, without those that have no scored prediction left."""
    parts = [
        Example(example.ids[:context], (*example.scored[: context - 1], False)[: len(example.ids)]) for example in examples
    ]
    return [part for part in parts if any(part.scored)]


def split(examples: Sequence[Example], share: float, seed: int | None) -> tuple[list[Example], list[Example]]:
    """Split into examples to train on and a share, at least one, that is held out: the last, or with `seed` random ones."""
    order = np.arange(len(examples)) if seed is None else np.random.default_rng(seed).permutation(len(examples))
    count = min(len(examples) - 1, max(1, round(share * len(examples))))
    kept, held_out = np.split(order, [len(examples) - count])
    return [examples[index] for index in kept], [examples[index] for index in held_out]


def shuffled_batches(examples: Sequence[Example], size: int, seed: int) -> Callable[[int], Batch]:
    """Batches by number. Each epoch has all examples in another random order."""

    def batch(step: int) -> Batch:
        chosen = []
        for position in range(step * size, (step + 1) * size):
            epoch, index = divmod(position, len(examples))
            chosen.append(examples[np.random.default_rng((seed, epoch)).permutation(len(examples))[index]])
        return make_batch(chosen)

    return batch


def make_batch(examples: Sequence[Example]) -> Batch:
    """Examples as one batch, short ones padded at the end. Attention is causal, so padding has no effect."""
    longest = max(len(example.ids) for example in examples)
    ids = torch.zeros((len(examples), longest), dtype=torch.int64)
    scored = torch.zeros((len(examples), longest), dtype=torch.bool)
    for row, example in enumerate(examples):
        ids[row, : len(example.ids)] = torch.tensor(example.ids)
        scored[row, : len(example.scored)] = torch.tensor(example.scored)
    return Batch(ids, scored)
