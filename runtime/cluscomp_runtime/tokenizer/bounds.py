"""Decide whether a `tokenizer.json` can be used in this process: its time and memory must be bounded by the text's length.

Such a file can act like a program: 20 KB of chained replacements can double a text forty times, a pattern can match forever, a
SentencePiece character map can abort the process. Accepted files have the properties of real tokenizers: every part has a known
kind, the text grows little, and patterns take time proportional to the text. Other files may be harmless, but they run in a
separate process with limited time and memory (`backend.py`).
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from cluscomp_runtime.tokenizer.pattern_cost import is_linear

__all__ = ["reason_to_isolate"]

MAX_GROWTH = 64
"""Largest accepted growth of a text in bytes, in the worst case. Llama 2 has 12, BERT 7.5, NFKC before bytes 44."""

MAX_PARTS = 64
"""Parts of a chain, each of which processes the whole text."""

MAX_TEMPLATE_TOKENS = 256
"""Special tokens that a post-processor adds."""

MAX_WORD_CHARACTERS = 200
"""Characters per word. WordPiece takes time proportional to its square per character of a long word. BERT has 100."""

MAX_AFFIX_BYTES = 64
"""Bytes of a subword prefix or suffix, which is copied for each character of a text."""

MAX_ADDED_TOKENS = 16384
"""The library takes time proportional to the square of their number. The largest known number is about 7,000."""

MAX_NESTED_PIECES = 64
MAX_PIECE_BYTES = 4096
"""Unigram looks up every piece that can begin at a character of the text."""

# Largest growth factor of a text in bytes, for each kind. Unicode's normal forms: unicode.org/faq/normalization.
_NORMALIZERS = {
    "NFC": 3.0,
    "NFD": 3.0,
    "NFKC": 11.0,
    "NFKD": 11.0,
    "Lowercase": 1.5,
    "Strip": 1.0,
    "StripAccents": 1.0,
    "Nmt": 1.0,
    # Spaces around a Chinese character (5 bytes for 3), NFD, lower case.
    "BertNormalizer": 7.5,
    # Each byte becomes a character of two bytes.
    "ByteLevel": 2.0,
}
_PRE_TOKENIZERS = {
    # As above, and a space before each word.
    "ByteLevel": 4.0,
    "BertPreTokenizer": 1.0,
    "CharDelimiterSplit": 1.0,
    "Digits": 1.0,
    "Punctuation": 1.0,
    "UnicodeScripts": 1.0,
    "Whitespace": 1.0,
    "WhitespaceSplit": 1.0,
}
_DECODERS = {
    # An invalid byte becomes U+FFFD.
    "ByteLevel": 3.0,
    "ByteFallback": 1.0,
    "Fuse": 1.0,
    "Metaspace": 1.0,
    "Strip": 1.0,
    # A space before each token.
    "WordPiece": 2.0,
}


class _SuspectError(Exception):
    """A part may be unbounded; the message says why."""


def reason_to_isolate(content: bytes) -> str | None:
    """Return why a `tokenizer.json` of these bytes must run in a separate process, None if it need not. Never raises."""
    try:
        document = json.loads(content.decode(), object_pairs_hook=_unique)
        if not isinstance(document, Mapping):
            return None
        growth = _growth(document.get("normalizer"), "normalizers", _normalizer)
        growth *= _growth(document.get("pre_tokenizer"), "pretokenizers", _pre_tokenizer)
        _growth(document.get("decoder"), "decoders", _decoder)
        if growth > MAX_GROWTH:
            return f"a text may grow {growth:.3g} times"
        _check_post_processor(document.get("post_processor"))
        _check_model(document["model"])
        if len(document.get("added_tokens") or ()) > MAX_ADDED_TOKENS:
            return "very many added tokens"
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError):
        # The library rejects such a file, too.
        return None
    except _SuspectError as reason:
        return str(reason)
    except (AttributeError, KeyError, TypeError, ValueError):
        return "a malformed part"
    return None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        # Parsers differ in which of the values they use.
        raise _SuspectError("a duplicate name")
    return value


def _growth(part: Any, members: str, growth_of: Any) -> float:
    """Return the largest growth factor of a text in the chain `part`, whose sequences have their parts in `members`."""
    growth = 1.0
    for count, simple in enumerate(_flat(part, members)):
        growth *= growth_of(simple)
        if growth > MAX_GROWTH or count >= MAX_PARTS:
            raise _SuspectError(f"a text may grow {growth:.3g} times or more" if growth > MAX_GROWTH else "a very long chain")
    return growth


def _flat(part: Any, members: str) -> Iterator[Mapping[str, Any]]:
    if part is None:
        return
    if part["type"] == "Sequence":
        for inner in part[members]:
            yield from _flat(inner, members)
    else:
        yield part


def _known(part: Mapping[str, Any], growths: Mapping[str, float]) -> float:
    if part["type"] not in growths:
        raise _SuspectError(f"a part of an unknown kind ({str(part['type'])[:40]})")
    return growths[part["type"]]


def _normalizer(part: Mapping[str, Any]) -> float:
    if part["type"] == "Replace":
        return _replacement(part)
    if part["type"] == "Prepend":
        # Prepended to the text between two special tokens, which may be a single character.
        return 1.0 + _length(part["prepend"])
    if part["type"] == "Precompiled":
        return _character_map(base64.b64decode(part["precompiled_charsmap"], validate=True))
    return _known(part, _NORMALIZERS)


def _pre_tokenizer(part: Mapping[str, Any]) -> float:
    if part["type"] == "Split":
        _pattern(part["pattern"])
        return 1.0
    if part["type"] == "Metaspace":
        # Replaces each space and is inserted before each word.
        return 2.0 * max(_length(part["replacement"]), 1)
    return _known(part, _PRE_TOKENIZERS)


def _decoder(part: Mapping[str, Any]) -> float:
    if part["type"] == "Replace":
        return _replacement(part)
    if part["type"] in ("BPEDecoder", "CTC"):
        # An empty text matches between any two characters.
        texts = [part[name] for name in ("suffix", "pad_token", "word_delimiter_token") if name in part]
        return 2.0 if all(texts) else 4.0
    return _known(part, _DECODERS)


def _length(text: str) -> int:
    return len(text.encode())


def _pattern(pattern: Mapping[str, str]) -> int:
    """Return the smallest number of bytes of a match of `pattern`. Raises _SuspectError if matching may take very long."""
    if list(pattern) == ["String"]:
        return _length(pattern["String"])
    if list(pattern) != ["Regex"] or not is_linear(pattern["Regex"]):
        raise _SuspectError(f"a pattern that may take very long ({str(pattern)[:80]})")
    return 0


def _replacement(part: Mapping[str, Any]) -> float:
    found, content = _pattern(part["pattern"]), _length(part["content"])
    # A pattern that may match the empty text matches between any two characters.
    return max(1.0, content / found) if found else 1.0 + content


def _character_map(content: bytes) -> float:
    """Return the growth factor of a SentencePiece character map. Raises _SuspectError if it refers to data outside itself.

    A map consists of the length of a trie, the trie, and texts that end in NUL. See `precompiled_charsmap` in sentencepiece's
    normalizer.cc, and darts.h for the units of the trie.
    """
    suspect = _SuspectError("an invalid character map")
    size = int.from_bytes(content[:4], "little")
    if len(content) < 4 or not 1024 <= size <= len(content) - 4 or size % 4:
        raise suspect
    units = np.frombuffer(content, "<u4", size // 4, offset=4).astype(np.int64)
    texts = content[4 + size :]
    texts.decode()
    positions = np.arange(len(units))
    leaves = (units >> 31) == 1
    children = positions ^ ((units >> 10) << ((units & 512) >> 6))
    values = units[leaves] & 0x7FFFFFFF
    if (children[~leaves] | 255 >= len(units)).any() or (values > len(texts)).any():
        raise suspect
    if not leaves[children[~leaves & (units & 256 != 0)]].all():
        raise suspect
    starts = values[values < len(texts)]
    if (np.frombuffer(texts, np.uint8)[starts] & 0xC0 == 0x80).any():
        raise suspect
    return float(max((len(text) for text in texts.split(b"\0")), default=1))


def _check_post_processor(part: Any) -> None:
    tokens = 0
    for count, simple in enumerate(_flat(part, "processors")):
        if simple["type"] == "TemplateProcessing":
            tokens += _template_tokens(simple)
        elif simple["type"] in ("BertProcessing", "RobertaProcessing"):
            tokens += 2
        elif simple["type"] != "ByteLevel":
            raise _SuspectError(f"a part of an unknown kind ({str(simple['type'])[:40]})")
        if tokens > MAX_TEMPLATE_TOKENS or count >= MAX_PARTS:
            raise _SuspectError("a post-processor that adds very many tokens")


def _template_tokens(part: Mapping[str, Any]) -> int:
    """Return the number of tokens that a template adds to a text."""
    added = {name: len(token["ids"]) for name, token in part["special_tokens"].items()}
    tokens = texts = 0
    for piece in part["single"]:
        if "Sequence" in piece:
            texts += 1
        else:
            # The library reports a missing token.
            tokens += added.get(piece["SpecialToken"]["id"], 0)
    if texts > 1:
        raise _SuspectError("a post-processor that repeats the text")
    return tokens


def _check_model(model: Mapping[str, Any]) -> None:
    # Old files do not name the type of the model, so all rules apply to every model.
    if int(model.get("max_input_chars_per_word") or 0) > MAX_WORD_CHARACTERS:
        raise _SuspectError("very long words")
    for name in ("continuing_subword_prefix", "end_of_word_suffix"):
        if _length(model.get(name) or "") > MAX_AFFIX_BYTES:
            raise _SuspectError(f"a long {name}")
    if isinstance(model["vocab"], list):
        _check_pieces([piece for piece, _ in model["vocab"]])


def _check_pieces(pieces: list[str]) -> None:
    nested: list[str] = []
    for piece in sorted(pieces):
        while nested and not piece.startswith(nested[-1]):
            nested.pop()
        nested.append(piece)
        if len(nested) > MAX_NESTED_PIECES or _length(piece) > MAX_PIECE_BYTES:
            raise _SuspectError("very long or deeply nested pieces")
