"""Choose the next token from its logits."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from cluscomp_formats.errors import ClusCompError, InvalidRequestError, Problem

__all__ = ["Sampler", "probabilities"]

_LEAST_TEMPERATURE = torch.finfo(torch.float32).tiny


def probabilities(
    logits: torch.Tensor, *, temperature: float, top_k: int | None = None, top_p: float | None = None
) -> torch.Tensor:
    """Return the distribution `[vocab_size]`, float32, to sample from, given `logits [vocab_size]`.

    The steps, in this order: divide the logits by `temperature`; keep the `top_k` largest; keep the smallest set of most likely
    tokens whose probabilities sum to at least `top_p` (nucleus sampling, Holtzman et al., arXiv 1904.09751); renormalise.
    """
    # Subtracting the maximum first prevents overflow at a tiny temperature; one below float32's range would become 0.
    scaled = (logits.float() - logits.float().max()) / max(temperature, _LEAST_TEMPERATURE)
    values, order = scaled.sort(descending=True, stable=True)
    values[min(top_k or len(values), len(values)) :] = -math.inf
    ranked = values.softmax(-1)
    if top_p is not None:
        before = ranked.cumsum(-1) - ranked
        # Keep the most likely token even if the sums are rounded.
        before[0] = -1.0
        ranked = ranked.masked_fill(before >= top_p, 0.0)
        ranked = ranked / ranked.sum()
    return torch.zeros_like(ranked).scatter_(0, order, ranked)


@dataclass
class Sampler:
    """Chooses tokens: greedily at temperature 0, otherwise at random from `probabilities`.

    It has its own random generator, so the same seed gives the same tokens regardless of other uses of random numbers. Raises
    InvalidRequestError if a setting is out of range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0
    _random: torch.Generator = field(init=False, repr=False)

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
        # On the CPU, so that a seed gives the same tokens on every device.
        self._random = torch.Generator(device="cpu").manual_seed(self.seed)

    def choose(self, logits: torch.Tensor) -> int:
        """Return the next token for `logits [vocab_size]`; greedy choice takes the first of equal logits.

        Raises ClusCompError if the largest logit is not finite.
        """
        best, index = logits.max(dim=-1)
        if not math.isfinite(best.item()):
            remedy = "run the self-test; in float16, which overflows easily, use bfloat16 or float32"
            raise ClusCompError(Problem("not_finite", "the model computed logits that are not finite", remedy=remedy))
        if self.temperature == 0:
            return int(index.item())
        distribution = probabilities(logits.cpu(), temperature=self.temperature, top_k=self.top_k, top_p=self.top_p)
        return int(torch.multinomial(distribution, 1, generator=self._random).item())


def _out_of_range(name: str, found: object, expected: str) -> Problem:
    return Problem("out_of_range", f"{name} is out of range", found=str(found), expected=expected)
