"""Read SentencePiece's `tokenizer.model`: pieces with scores and types, and the normalisation of text.

The file is a protocol buffer message (`sentencepiece_model.proto` of SentencePiece), whose fields have a number, a wire type
and a value. Only the fields that affect tokenization are read.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from cluscomp_formats.tokens.unsupported import UnsupportedTokenizer

__all__ = ["BPE", "BYTE", "CONTROL", "NORMAL", "UNIGRAM", "UNKNOWN", "UNUSED", "USER_DEFINED", "Piece", "SentencePieceModel"]

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Types of pieces."""

UNIGRAM, BPE = 1, 2
"""Kinds of models."""

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_MAX_VARINT = 10
"""Largest number of bytes of an integer."""

_MAX_PIECES = 1 << 20
"""Largest number of pieces; Gemma has a quarter of that."""

_PIECE, _TRAINER, _NORMALIZER = 1, 2, 3
_KIND, _SUFFIX, _FALLBACK, _UNK_ID, _BOS_ID, _EOS_ID, _PAD_ID = 3, 24, 35, 40, 41, 42, 43
_CHARACTER_MAP, _PREFIX, _REMOVE_SPACES, _ESCAPE = 2, 3, 4, 5


@dataclass(frozen=True, slots=True)
class Piece:
    text: str
    score: float
    kind: int


@dataclass(frozen=True)
class SentencePieceModel:
    """A stored model. Ids are positions in `pieces`; `ids` has those of special pieces by name (`bos`, ...)."""

    pieces: tuple[Piece, ...]
    kind: int
    byte_fallback: bool
    ids: dict[str, int]
    character_map: bytes
    add_prefix: bool
    remove_spaces: bool

    @classmethod
    def parse(cls, content: bytes) -> SentencePieceModel:
        """Parse the bytes of a file. Raises UnsupportedTokenizer, with the reason, if they are not a supported model."""
        pieces: list[Piece] = []
        trainer: dict[int, int | bytes] = {}
        normalizer: dict[int, int | bytes] = {}
        for number, value in _fields(content):
            if isinstance(value, bytes) and number == _PIECE:
                pieces.append(_piece(value))
                if len(pieces) > _MAX_PIECES:
                    raise UnsupportedTokenizer(f"the SentencePiece model has more than {_MAX_PIECES} pieces")
            elif isinstance(value, bytes) and number == _TRAINER:
                trainer |= dict(_fields(value))
            elif isinstance(value, bytes) and number == _NORMALIZER:
                normalizer |= dict(_fields(value))
        if not pieces:
            raise UnsupportedTokenizer("the file is not a SentencePiece model")
        if len({piece.text for piece in pieces}) < len(pieces) or not all(piece.text for piece in pieces):
            raise UnsupportedTokenizer("two pieces of the SentencePiece model have the same text, or one has none")
        if trainer.get(_SUFFIX, 0) or not normalizer.get(_ESCAPE, 1):
            raise UnsupportedTokenizer("the SentencePiece model does not put spaces before words")
        kind = trainer.get(_KIND, UNIGRAM)
        if kind not in (UNIGRAM, BPE):
            raise UnsupportedTokenizer(f"the SentencePiece model is of kind {kind!a}, not Unigram (1) or BPE (2)")
        defaults = {"unk": (_UNK_ID, 0), "bos": (_BOS_ID, 1), "eos": (_EOS_ID, 2), "pad": (_PAD_ID, -1)}
        ids = {name: _signed(trainer.get(number, default)) for name, (number, default) in defaults.items()}
        character_map = normalizer.get(_CHARACTER_MAP, b"")
        return cls(
            pieces=tuple(pieces),
            kind=int(kind),
            byte_fallback=bool(trainer.get(_FALLBACK, 0)),
            ids={name: number for name, number in ids.items() if 0 <= number < len(pieces)},
            character_map=character_map if isinstance(character_map, bytes) else b"",
            add_prefix=bool(normalizer.get(_PREFIX, 1)),
            remove_spaces=bool(normalizer.get(_REMOVE_SPACES, 1)),
        )


def _piece(message: bytes) -> Piece:
    text, score, kind = b"", 0.0, NORMAL
    for number, value in _fields(message):
        if number == 1 and isinstance(value, bytes):
            text = value
        elif number == 2 and isinstance(value, bytes) and len(value) == 4:
            score = struct.unpack("<f", value)[0]
        elif number == 3 and isinstance(value, int):
            kind = value
    if not math.isfinite(score):
        raise UnsupportedTokenizer("a piece of the SentencePiece model has no finite score")
    try:
        return Piece(text.decode("utf-8"), score, kind)
    except UnicodeDecodeError as error:
        raise UnsupportedTokenizer("a piece of the SentencePiece model is not valid UTF-8") from error


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yield the fields of a message; fixed-width values are bytes. Raises UnsupportedTokenizer if it is not a valid message."""
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        number, kind = tag >> 3, tag & 7
        if kind == _VARINT:
            value, at = _varint(message, at)
            yield number, value
            continue
        length = {_FIXED64: 8, _FIXED32: 4}.get(kind, -1)
        if kind == _BYTES:
            length, at = _varint(message, at)
        if length < 0 or length > len(message) - at or not number:
            raise UnsupportedTokenizer("the file is not a SentencePiece model")
        yield number, message[at : at + length]
        at += length


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """Return the integer at position `at` and the position after it."""
    value = 0
    for count, byte in enumerate(message[at : at + _MAX_VARINT]):
        value |= (byte & 127) << (7 * count)
        if byte < 128:
            return value, at + count + 1
    raise UnsupportedTokenizer("the file is not a SentencePiece model")


def _signed(value: int | bytes) -> int:
    """Return a stored id as a signed number; negative ids are stored as 64-bit integers."""
    return -1 if isinstance(value, bytes) or value >= 1 << 31 else value
