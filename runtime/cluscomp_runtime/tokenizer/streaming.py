"""Token ids to text, as the tokens come.

The text of a token depends on its neighbours: a decoder strips the space before the first word, puts spaces between words,
makes a character of several byte tokens. A piece is therefore the difference of two decoded runs of the last tokens, given out
once no token to come can change it:

- Of decoders that map bytes (`ByteLevel`) all is certain but an unfinished character at the end, at most three tokens.
- `ByteFallback` looks at a run of byte tokens as a whole: is there a fault anywhere in it, all of it becomes U+FFFD. Nothing of
  a run is given out, nor looked at, before it ends.
- Decoders that look at the text as a whole, such as a replacement behind `Fuse`, give all of it at the end.

So each token is decoded in a bounded number of runs of bounded length, and those of a run of bytes once more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

__all__ = ["StreamDecoder"]

CONTEXT_TOKENS = 8
"""Tokens before a piece that it is decoded with: more than three of an unfinished character and one that begins a text."""

REPLACEMENT = "\ufffd"

_OF_EACH_TOKEN = frozenset({"BPEDecoder", "ByteFallback", "CTC", "Metaspace", "Replace", "Strip", "WordPiece"})
"""Decoders that look at a token and perhaps at the one before it."""

_OF_THE_WHOLE = frozenset({"Fuse", "Metaspace", "Strip"})
"""Decoders for which a text grows at its end only, where all tokens have become one text."""


class Decoder(Protocol):
    """What a stream needs of a `Tokenizer`."""

    @property
    def special_ids(self) -> frozenset[int]: ...
    @property
    def decoder(self) -> Any: ...
    def token_text(self, token: int) -> str | None: ...
    def decode(self, ids: Sequence[int]) -> str: ...


class StreamDecoder:
    """Turns tokens into text as they come: never half a character, and spaces as the prompt's continuation has them.

    The pieces join to what `Tokenizer.decode` gives for prompt and tokens, without what it gives for the prompt. Where the
    tokens finish a character that the prompt ends in, the pieces begin with that character.
    """

    def __init__(self, tokenizer: Decoder, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._special = tokenizer.special_ids
        self._decoders = _flat(tokenizer.decoder)
        self._is_local = _is_local(self._decoders)
        kinds = {part.get("type") for part in self._decoders}
        self._has_byte_tokens, self._has_byte_letters = "ByteFallback" in kinds, "ByteLevel" in kinds
        self._tokens, run = self._last_of(prompt)
        """Tokens of which text may still come, and some before them."""
        text = self._text()
        self._done = len(text)
        """Characters of their text that are given out, or are the prompt's."""
        self._open = text[len(text) - self._unfinished(text, run) :]
        """What the prompt's end is decoded to as long as nothing finishes it."""

    def push(self, token: int) -> str:
        """Add a token; the text that is now certain, perhaps empty."""
        spelling = self._spelling(token)
        if spelling is None:
            return ""
        self._tokens.append(token)
        if not self._is_local or (self._has_byte_tokens and _byte(spelling) is not None):
            return ""
        text = self._text()
        piece = self._emit(text, len(text) - (self._has_byte_letters and text.endswith(REPLACEMENT)))
        if len(self._tokens) > 2 * CONTEXT_TOKENS:
            self._tokens = self._tokens[-CONTEXT_TOKENS:]
            self._done += len(self._text()) - len(text)
        return piece

    def flush(self) -> str:
        """What is left at the end, unfinished characters as U+FFFD."""
        text = self._text()
        return self._emit(text, len(text))

    def _emit(self, text: str, certain: int) -> str:
        """Give out what is new of the first `certain` characters of `text`."""
        if certain == len(text) or certain >= self._done:
            if not text.startswith(self._open, self._done - len(self._open)):
                self._done -= len(self._open)
            self._open = ""
        piece, self._done = text[self._done : certain], max(certain, self._done)
        return piece

    def _text(self) -> str:
        return self._tokenizer.decode(self._tokens)

    def _spelling(self, token: int) -> str | None:
        """How the vocabulary spells a token; None for one that decoding leaves out."""
        return None if token in self._special else self._tokenizer.token_text(token)

    def _last_of(self, prompt: Sequence[int]) -> tuple[list[int], bytes]:
        """As many tokens from the prompt's end as the text after it needs, and the bytes of the byte tokens among the last."""
        tokens: list[int] = []
        run = bytearray()
        in_run = self._has_byte_tokens
        for token in reversed(prompt):
            spelling = self._spelling(token)
            if spelling is None:
                continue
            byte = _byte(spelling) if in_run else None
            in_run = byte is not None
            if byte is not None:
                run.append(byte)
            tokens.append(token)
            if self._is_local and len(tokens) >= len(run) + CONTEXT_TOKENS:
                break
        return tokens[::-1], bytes(run[::-1])

    def _unfinished(self, text: str, run: bytes) -> int:
        """How many characters at the end of the prompt's `text` stand for a character that is not finished."""
        if run:
            # Each byte of a run that is no text has become a character.
            return len(run) if _ends_early(run) else 0
        if not (self._has_byte_letters and text.endswith(REPLACEMENT)):
            return 0
        last = b"".join(_letters(self._tokenizer.token_text(token) or "") for token in self._tokens[-CONTEXT_TOKENS:])
        return int(any(_ends_early(last[-count:]) for count in (1, 2, 3)))


def _flat(decoder: Any) -> list[Mapping[str, Any]]:
    """The parts of a decoder in order, sequences taken apart."""
    if not isinstance(decoder, Mapping):
        return []
    if decoder.get("type") != "Sequence":
        return [decoder]
    return [part for inner in decoder.get("decoders", ()) for part in _flat(inner)]


def _is_local(decoders: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the text of some tokens stays as it is, but for unfinished characters, when others follow."""
    fused = False
    for part in decoders:
        kind = part.get("type")
        if kind == "Strip" and part.get("start", 0) >= CONTEXT_TOKENS // 2:
            return False
        if fused:
            # One character for one, wherever it is.
            single = kind == "Replace" and len(part["pattern"].get("String", "")) == 1
            if kind not in _OF_THE_WHOLE and not single:
                return False
        elif kind in ("ByteLevel", "Fuse"):
            fused = True
        elif kind not in _OF_EACH_TOKEN:
            return False
    return True


def _byte(text: str) -> int | None:
    """The value of a byte token such as `<0xE4>`, None for other tokens."""
    if len(text) != 6 or not (text.startswith("<0x") and text.endswith(">")):
        return None
    try:
        return int(text[3:5], 16)
    except ValueError:
        return None


def _ends_early(content: bytes) -> bool:
    """Whether these bytes are text but for an unfinished character at the end."""
    try:
        content.decode()
    except UnicodeDecodeError as error:
        return error.reason == "unexpected end of data"
    return False


def _byte_letters() -> dict[str, int]:
    """The printable character that stands for each byte in GPT-2's vocabulary: itself where printable, else 256 and up."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = (byte for byte in range(256) if byte not in printable)
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}


_BYTE_OF = _byte_letters()


def _letters(text: str) -> bytes:
    """The bytes of a token of a vocabulary of bytes; a token with other characters stands for itself."""
    if all(character in _BYTE_OF for character in text):
        return bytes(_BYTE_OF[character] for character in text)
    return text.encode()
