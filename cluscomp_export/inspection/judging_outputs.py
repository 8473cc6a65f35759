"""Are an artefact's outputs closer to its source's than chance? Judged on sequences that this module chooses.

Chance is the best divergence of a model that ignores its input. Of all fixed predictions, the mean of the source's own
predictions over the same positions has the least divergence from them; the uniform distribution has more. An artefact that is
not below that bound may be honest and have too few bits, but it computes too little of its source to be called correct.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from cluscomp_runtime import LanguageModel

__all__ = ["OutputComparison", "chosen_sequences", "compare_outputs"]

SENTENCES = (
    "One day, Tom and his sister went to the park. They saw a big red ball under a tree and wanted to play with it.",
    "The committee decided, after a long debate, that 3 of the 47 proposals should be sent back to their authors.",
    "Why do birds sing in the morning? Nobody knows for certain, but there are many good guesses about it.",
)
RANDOM_SEQUENCES = 2
TOKENS = 32
SEED = 20250313

LEAST_CHANCE = 0.01
"""Nats per token. A source whose predictions vary by less hardly depends on its input: its outputs show nothing."""


@dataclass(frozen=True)
class OutputComparison:
    """B compared with A: the mean divergence in nats per token, and that of `chance` and of `uniform` predictions; the share of
    positions with the same most likely token; the largest difference of a logit; the number of positions."""

    kl: float
    chance: float
    uniform: float
    top1: float
    max_difference: float
    positions: int

    @property
    def tells(self) -> bool:
        """Whether the source depends on its input enough for its outputs to show anything."""
        return self.chance >= LEAST_CHANCE

    @property
    def beats_chance(self) -> bool:
        """Whether B is closer to A than any model that ignores its input. NaN is not."""
        return self.kl < self.chance


def chosen_sequences(model: LanguageModel) -> list[list[int]]:
    """Token ids of sentences, if the model has a tokenizer, and random ids; the same at every call."""
    longest, vocab_size = min(TOKENS, model.description.max_position_embeddings), model.description.vocab_size
    texts = [] if model.tokenizer is None else [model.tokenizer.encode(text)[:longest] for text in SENTENCES]
    sequences = [ids for ids in texts if ids and max(ids) < vocab_size]
    count = RANDOM_SEQUENCES if sequences else RANDOM_SEQUENCES + len(SENTENCES)
    random: list[list[int]] = np.random.default_rng(SEED).integers(0, vocab_size, (count, longest)).tolist()
    return [*sequences, *random]


@torch.inference_mode()
def compare_outputs(model_a: LanguageModel, model_b: LanguageModel, sequences: Sequence[Sequence[int]]) -> OutputComparison:
    """Both models' predictions on `sequences`. Each is called once: a call may read the whole model."""
    longest = max(len(sequence) for sequence in sequences)
    # Padding after a sequence does not affect its logits.
    ids = [[*sequence, *[0] * (longest - len(sequence))] for sequence in sequences]
    logits_a, logits_b = (torch.from_numpy(model.forward(ids)) for model in (model_a, model_b))
    positions = sum(len(sequence) for sequence in sequences)
    vocab_size = logits_a.shape[-1]
    total = torch.zeros(vocab_size, dtype=torch.float64)
    kl = negative_entropy = agreements = largest = 0.0
    for index, sequence in enumerate(sequences):
        first, second = (logits[index, : len(sequence)].double() for logits in (logits_a, logits_b))
        expected, scores = torch.log_softmax(first, -1), torch.log_softmax(second, -1)
        probabilities = expected.exp()
        kl += float((probabilities * (expected - scores)).sum())
        negative_entropy += float((probabilities * expected).sum()) / positions
        total += probabilities.sum(0)
        agreements += int((first.argmax(-1) == second.argmax(-1)).sum())
        largest = max(largest, float((first - second).abs().max()))
    mean = total / positions
    return OutputComparison(
        kl=kl / positions,
        # The mean over positions of sum p (log p - log mean).
        chance=negative_entropy - float(torch.xlogy(mean, mean).sum()),
        uniform=negative_entropy + math.log(vocab_size),
        top1=agreements / positions,
        max_difference=largest,
        positions=positions,
    )
