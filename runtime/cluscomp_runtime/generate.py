"""Text generation: prefill, then one token at a time until an end token or a limit."""

from __future__ import annotations

import operator
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from cluscomp_formats.errors import InvalidRequestError, Problem
from cluscomp_runtime.engine import Engine
from cluscomp_runtime.memory import memory_faults
from cluscomp_runtime.sampling import Sampler
from cluscomp_runtime.tokenizer import Tokenizer

__all__ = ["Generation", "GenerationStream", "StopReason"]

StopReason = Literal["end_token", "max_new_tokens", "context"]


@dataclass(frozen=True)
class Generation:
    """The result of a generation.

    `text` is the continuation without the prompt; it is empty if the model has no tokenizer. `token_ids` are the new tokens,
    including an end token. Times are wall-clock seconds, without the time of the stream's consumer: `prefill_seconds` for the
    first token, `decode_seconds` for all others.
    """

    text: str
    token_ids: tuple[int, ...]
    prompt_tokens: int
    prefill_seconds: float
    decode_seconds: float
    stop_reason: StopReason

    @property
    def new_tokens(self) -> int:
        """Number of new tokens."""
        return len(self.token_ids)

    @property
    def seconds(self) -> float:
        """Total wall-clock seconds."""
        return self.prefill_seconds + self.decode_seconds

    @property
    def tokens_per_second(self) -> float:
        """Speed of decoding without the first token; 0 if there is only one token."""
        return (self.new_tokens - 1) / self.decode_seconds if self.new_tokens > 1 else 0.0


class GenerationStream:
    """An iterator over the text pieces of a generation; `result` is set when the iteration ends.

    A piece consists of whole characters, so not every token gives one. The stream can be iterated once. If the iteration is
    stopped early, `result` stays None.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer | None,
        prompt: Sequence[int],
        sampler: Sampler,
        *,
        context: int,
        max_new_tokens: int,
        end_tokens: frozenset[int],
        on_token: Callable[[int], None] | None = None,
    ) -> None:
        check_prompt(prompt, engine.description.vocab_size, context)
        if isinstance(max_new_tokens, bool) or not hasattr(max_new_tokens, "__index__") or max_new_tokens < 1:
            problem = Problem("out_of_range", "max_new_tokens is out of range", found=str(max_new_tokens), expected="1 or more")
            raise InvalidRequestError(problem)
        self.result: Generation | None = None
        self._engine = engine
        self._text = tokenizer.stream(prompt) if tokenizer else None
        self._prompt = prompt
        self._sampler = sampler
        self._context = context
        self._max_new_tokens = operator.index(max_new_tokens)
        self._end_tokens = end_tokens
        self._on_token = on_token
        self._pieces = self._run()

    def __iter__(self) -> Iterator[str]:
        return self._pieces

    def finish(self) -> Generation:
        """Run to the end and return the result."""
        for _ in self._pieces:
            pass
        if self.result is None:
            raise InvalidRequestError(Problem("stream_broken_off", "the stream was stopped before its end"))
        return self.result

    def _run(self) -> Iterator[str]:
        # The last token is not fed back, so the cache needs one position less than the number of tokens.
        capacity = min(self._context, len(self._prompt) + self._max_new_tokens - 1)
        room = self._context + 1 - len(self._prompt)
        limit = min(room, self._max_new_tokens)
        with memory_faults():
            cache = self._engine.cache(capacity)
        step = np.array(self._prompt, dtype=np.int32)
        tokens: list[int] = []
        pieces: list[str] = []
        stop_reason: StopReason = "context" if room < self._max_new_tokens else "max_new_tokens"
        seconds: list[float] = []
        while len(tokens) < limit:
            start = time.perf_counter()
            with memory_faults():
                token = self._sampler.choose(self._engine.logits(step, cache, last_only=True)[-1])
            seconds.append(time.perf_counter() - start)
            tokens.append(token)
            if self._on_token is not None:
                self._on_token(token)
            if token in self._end_tokens:
                stop_reason = "end_token"
                break
            if self._text is not None and (piece := self._text.push(token)):
                pieces.append(piece)
                yield piece
            step = np.array([token], dtype=np.int32)
        if self._text is not None and (piece := self._text.flush()):
            pieces.append(piece)
            yield piece
        self.result = Generation("".join(pieces), tuple(tokens), len(self._prompt), seconds[0], sum(seconds[1:]), stop_reason)


def check_prompt(prompt: Sequence[int], vocab_size: int, limit: int) -> None:
    """Raise InvalidRequestError if a prompt is empty, is longer than `limit`, or has ids outside the vocabulary."""
    if not prompt:
        remedy = "pass at least one token"
        raise InvalidRequestError(Problem("empty_prompt", "the prompt is empty", remedy=remedy))
    wrong = [token for token in prompt if not 0 <= token < vocab_size]
    if wrong:
        expected = f"0 to {vocab_size - 1}"
        raise InvalidRequestError(
            Problem(
                "token_out_of_range",
                "the prompt has token ids outside the vocabulary",
                found=str(wrong[:5])[:200],
                expected=expected,
            )
        )
    if len(prompt) > limit:
        found, expected = f"{len(prompt)} tokens", f"at most {limit} tokens"
        remedy = "shorten the prompt, or load the model with a larger context"
        raise InvalidRequestError(
            Problem("prompt_too_long", "the prompt does not fit the context", None, None, found, expected, remedy)
        )
