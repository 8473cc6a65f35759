"""Decode a stream of token ids to text incrementally.

The text of a token depends on its neighbours: a decoder strips the space before the first word, inserts spaces between words,
and combines several byte tokens into one character. A piece of text is therefore the difference between two decodings of the
last tokens. It is emitted as soon as no later token can change it:

- With decoders that map bytes (`ByteLevel`), everything is final except an unfinished character at the end, of at most three
  tokens.
- `ByteFallback` treats a run of byte tokens as a unit: if any byte is invalid, the whole run becomes U+FFFD. A run is neither
  decoded nor emitted before it ends.
- Decoders that treat the text as a unit, such as a `Replace` after `Fuse`, emit all of it at the end.

Each token is thus decoded a bounded number of times, in runs of bounded length; a token of a run of bytes is decoded once more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

__all__ = ["StreamDecoder"]

CONTEXT_TOKENS = 8
"""Tokens before a piece that are decoded with it: more than the three of an unfinished character plus the first of a text."""

REPLACEMENT = "\ufffd"

_LOCAL_DECODERS = frozenset({"BPEDecoder", "ByteFallback", "CTC", "Metaspace", "Replace", "Strip", "WordPiece"})
"""Decoders that map a token by itself, or by itself and the previous token."""

_APPENDING_DECODERS = frozenset({"Fuse", "Metaspace", "Strip"})
"""Decoders that, after all tokens have been fused, only append to the text when a token is added."""


class Decoder(Protocol):
    """The methods of `Tokenizer` that a stream uses."""

    @property
    def special_ids(self) -> frozenset[int]: ...
    @property
    def decoder(self) -> Any: ...
    def token_text(self, token: int) -> str | None: ...
    def decode(self, ids: Sequence[int]) -> str: ...


class StreamDecoder:
    """Decodes the tokens after a prompt one at a time, to pieces of whole characters.

    The joined pieces are what `Tokenizer.decode` returns for prompt and tokens, minus what it returns for the prompt. If the
    tokens complete a character at the end of the prompt, the pieces begin with that character.
    """

    def __init__(self, tokenizer: Decoder, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._special = tokenizer.special_ids
        self._decoders = _flat(tokenizer.decoder)
        self._is_local = _is_local(self._decoders)
        kinds = {part.get("type") for part in self._decoders}
        self._has_byte_tokens, self._has_byte_letters = "ByteFallback" in kinds, "ByteLevel" in kinds
        self._tokens, run = self._last_of(prompt)
        """Tokens whose text is not final, and a few before them."""
        text = self._text()
        self._done = len(text)
        """Number of characters of their text that were emitted or belong to the prompt."""
        self._open = text[len(text) - self._unfinished(text, run) :]
        """Decoded text of an unfinished character at the end of the prompt."""

    def push(self, token: int) -> str:
        """Add a token. Return the text that has become final, possibly empty."""
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
        """Return the remaining text at the end of the stream, with unfinished characters as U+FFFD."""
        text = self._text()
        return self._emit(text, len(text))

    def _emit(self, text: str, final: int) -> str:
        """Return the characters among the first `final` of `text` that have not been emitted."""
        if final == len(text) or final >= self._done:
            if not text.startswith(self._open, self._done - len(self._open)):
                self._done -= len(self._open)
            self._open = ""
        piece, self._done = text[self._done : final], max(final, self._done)
        return piece

    def _text(self) -> str:
        return self._tokenizer.decode(self._tokens)

    def _spelling(self, token: int) -> str | None:
        """Return a token's text in the vocabulary; None for a token that decoding skips."""
        return None if token in self._special else self._tokenizer.token_text(token)

    def _last_of(self, prompt: Sequence[int]) -> tuple[list[int], bytes]:
        """Return the last tokens of the prompt that affect the next text, and the bytes of a run of byte tokens at its end."""
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
        """Return the number of characters at the end of the prompt's `text` that stand for an unfinished character."""
        if run:
            # Each byte of an invalid run was decoded to one character.
            return len(run) if _ends_early(run) else 0
        if not (self._has_byte_letters and text.endswith(REPLACEMENT)):
            return 0
        last = b"".join(_letters(self._tokenizer.token_text(token) or "") for token in self._tokens[-CONTEXT_TOKENS:])
        return int(any(_ends_early(last[-count:]) for count in (1, 2, 3)))


def _flat(decoder: Any) -> list[Mapping[str, Any]]:
    """Return the parts of a decoder in order, with sequences flattened."""
    if not isinstance(decoder, Mapping):
        return []
    if decoder.get("type") != "Sequence":
        return [decoder]
    return [part for inner in decoder.get("decoders", ()) for part in _flat(inner)]


def _is_local(decoders: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether later tokens leave the text of earlier tokens unchanged, except for unfinished characters."""
    fused = False
    for part in decoders:
        kind = part.get("type")
        if kind == "Strip" and part.get("start", 0) >= CONTEXT_TOKENS // 2:
            return False
        if fused:
            # A replacement of single characters does not depend on their position.
            single = kind == "Replace" and len(part["pattern"].get("String", "")) == 1
            if kind not in _APPENDING_DECODERS and not single:
                return False
        elif kind in ("ByteLevel", "Fuse"):
            fused = True
        elif kind not in _LOCAL_DECODERS:
            return False
    return True


def _byte(text: str) -> int | None:
    """Return the value of a byte token such as `<0xE4>`, None for other tokens."""
    if len(text) != 6 or not (text.startswith("<0x") and text.endswith(">")):
        return None
    try:
        return int(text[3:5], 16)
    except ValueError:
        return None


def _ends_early(content: bytes) -> bool:
    """Return whether the bytes are valid UTF-8 except for an unfinished character at the end."""
    try:
        content.decode()
    except UnicodeDecodeError as error:
        return error.reason == "unexpected end of data"
    return False


def _byte_letters() -> dict[str, int]:
    """Map each character of GPT-2's byte vocabulary to its byte: printable bytes to themselves, others to 256 and up."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = (byte for byte in range(256) if byte not in printable)
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}


_BYTE_OF = _byte_letters()


def _letters(text: str) -> bytes:
    """Return the bytes of a token of a byte vocabulary; a token with other characters is encoded as UTF-8."""
    if all(character in _BYTE_OF for character in text):
        return bytes(_BYTE_OF[character] for character in text)
    return text.encode()
