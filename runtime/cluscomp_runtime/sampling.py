"""Choose the next token from its logits."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from cluscomp_formats.errors import ClusCompError, InvalidRequestError, Problem

__all__ = ["Sampler", "probabilities"]

Logits = npt.NDArray[np.floating[Any]]

_LEAST_TEMPERATURE = float(np.finfo(np.float32).tiny)


def probabilities(
    logits: Logits, *, temperature: float, top_k: int | None = None, top_p: float | None = None
) -> npt.NDArray[np.float64]:
    """Return the distribution `[vocab_size]` to sample from, given `logits [vocab_size]`.

    The steps, in this order: divide the logits by `temperature`; keep the `top_k` largest; keep the smallest set of most likely
    tokens whose probabilities sum to at least `top_p` (nucleus sampling, Holtzman et al., arXiv 1904.09751); renormalise. Of
    equal logits, those with lower ids count as more likely.
    """
    # Subtracting the maximum first prevents overflow at a tiny temperature; one below float32's range would become 0.
    scaled = (logits.astype(np.float64) - logits.max()) / max(temperature, _LEAST_TEMPERATURE)
    kept = np.arange(len(scaled)) if top_k is None or top_k >= len(scaled) else _largest(scaled, top_k)
    distribution = np.zeros(len(scaled))
    distribution[kept] = np.exp(scaled[kept])
    distribution /= distribution.sum()
    if top_p is not None and top_p < 1:
        # All tokens below this probability sum to less than 1 - top_p, so none is needed. Few are left to sort.
        likely = np.flatnonzero(distribution >= min((1 - top_p) / len(distribution), distribution.max()))
        order = likely[np.argsort(-distribution[likely], kind="stable")]
        before = np.cumsum(distribution[order]) - distribution[order]
        # Keep the most likely token even if the sums are rounded.
        chosen = order[: max(1, int(np.searchsorted(before, top_p)))]
        nucleus = np.zeros_like(distribution)
        nucleus[chosen] = distribution[chosen] / distribution[chosen].sum()
        return nucleus
    return distribution


def _largest(values: npt.NDArray[np.float64], count: int) -> npt.NDArray[np.int64]:
    """The places of the `count` largest values; of equal ones, the first."""
    least = np.partition(values, -count)[-count]
    above = np.flatnonzero(values > least)
    return np.concatenate((above, np.flatnonzero(values == least)[: count - len(above)]))


@dataclass
class Sampler:
    """Chooses tokens: greedily at temperature 0, otherwise at random from `probabilities`.

    It has its own random generator (PCG64), so the same seed gives the same tokens regardless of other uses of random numbers
    and of the device. Raises InvalidRequestError if a setting is out of range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        problems = []
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            problems.append(_out_of_range("temperature", self.temperature, "0 (greedy) or more"))
        if self.top_k is not None and self.top_k < 1:
            problems.append(_out_of_range("top_k", self.top_k, "1 or more"))
        if self.top_p is not None and not 0 < self.top_p <= 1:
            problems.append(_out_of_range("top_p", self.top_p, "more than 0, at most 1"))
        if not 0 <= self.seed < 2**63:
            problems.append(_out_of_range("seed", self.seed, "0 to 2^63 - 1"))
        if problems:
            raise InvalidRequestError(problems)

    @cached_property
    def _random(self) -> np.random.Generator:
        # Greedy choice needs none, and numpy.random takes 7 MB of memory when it is first used.
        return np.random.Generator(np.random.PCG64(self.seed))

    def choose(self, logits: Logits) -> int:
        """Return the next token for `logits [vocab_size]`; greedy choice takes the first of equal logits.

        Raises ClusCompError if the largest logit is not finite.
        """
        # Of NaN, argmax returns the first.
        best = int(logits.argmax())
        if not math.isfinite(logits[best]):
            remedy = "run the self-test; in float16, which overflows easily, use bfloat16 or float32"
            raise ClusCompError(Problem("not_finite", "the model computed logits that are not finite", remedy=remedy))
        if self.temperature == 0:
            return best
        sums = probabilities(logits, temperature=self.temperature, top_k=self.top_k, top_p=self.top_p).cumsum()
        # The last sum is 1 only up to rounding. A token without probability adds nothing, so the first sum above the draw is
        # never its own.
        draw = min(self._random.random() * sums[-1], np.nextafter(sums[-1], 0))
        return int(np.searchsorted(sums, draw, side="right"))


def _out_of_range(name: str, found: object, expected: str) -> Problem:
    return Problem("out_of_range", f"{name} is out of range", found=str(found), expected=expected)
