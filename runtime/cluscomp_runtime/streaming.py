"""Token ids to text, as the tokens come."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cluscomp_runtime.tokenizer import Tokenizer

__all__ = ["StreamDecoder"]

# A UTF-8 character is at most four bytes, hence at most four byte tokens: more pending tokens are not one unfinished character.
MAX_PENDING_TOKENS = 8
CONTEXT_TOKENS = 8
REPLACEMENT = "\ufffd"


class StreamDecoder:
    """Turns tokens into text as they come: never half a character, and spaces as the prompt's continuation has them.

    A token's text depends on its neighbours, so each piece is the difference between two decoded runs of the last tokens.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        self.tokenizer = tokenizer
        self.ids = list(prompt[-CONTEXT_TOKENS:])
        # Where the prompt ends in an unfinished character, the first piece brings the whole of it.
        self.done = len(self._text(len(self.ids)).rstrip(REPLACEMENT))
        self.read = len(self.ids)

    def push(self, token: int) -> str:
        """Add a token; the text that is now certain, perhaps empty."""
        self.ids.append(token)
        text = self._text(len(self.ids))
        if text.endswith(REPLACEMENT) and len(self.ids) - self.read < MAX_PENDING_TOKENS:
            return ""
        return self._emit(text)

    def flush(self) -> str:
        """What is left at the end, unfinished characters as U+FFFD."""
        return self._emit(self._text(len(self.ids))) if self.read < len(self.ids) else ""

    def _text(self, end: int) -> str:
        return self.tokenizer.decode(self.ids[:end])

    def _emit(self, text: str) -> str:
        piece = text[self.done :]
        self.ids = self.ids[-CONTEXT_TOKENS:]
        self.read = len(self.ids)
        self.done = len(self._text(self.read))
        return piece
