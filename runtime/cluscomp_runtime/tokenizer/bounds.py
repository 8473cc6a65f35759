"""Whether a `tokenizer.json` can be trusted with this process: what it makes of a text is then bounded by the text.

The file is as good as a program: a chain of replacements of 20 KB doubles a text forty times over, a pattern matches without
end, a character map of SentencePiece aborts the process. What is looked for here is what real tokenizers have: every part of
a known kind, a text that grows little on its way, patterns whose time is in proportion to the text. A file with anything else
may be harmless; it is read in a process of its own, whose time and memory are bounded (`backend.py`).
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
"""Times the bytes of a text may grow in all, at worst. Llama 2 has 12, BERT 7.5, NFKC before bytes 44."""

MAX_PARTS = 64
"""Parts of a chain, each of which goes through the text."""

MAX_TEMPLATE_TOKENS = 256
"""Special tokens a post-processor adds."""

MAX_WORD_CHARACTERS = 200
"""WordPiece takes time in proportion to the square of this for each character of a long word; BERT has 100."""

MAX_AFFIX_BYTES = 64
"""A prefix or suffix of subwords is copied for each character of a text."""

MAX_ADDED_TOKENS = 16384
"""The library takes time in proportion to the square of their number; the most that is known is about 7,000."""

MAX_NESTED_PIECES = 64
MAX_PIECE_BYTES = 4096
"""Unigram looks up every piece that begins at a character of the text."""

# The most that a text of one byte, or a longer one per byte, becomes. Unicode's normal forms: unicode.org/faq/normalization.
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
    # A character of two bytes for a byte.
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
    # A byte that is no text becomes U+FFFD.
    "ByteLevel": 3.0,
    "ByteFallback": 1.0,
    "Fuse": 1.0,
    "Metaspace": 1.0,
    "Strip": 1.0,
    # A space before each token.
    "WordPiece": 2.0,
}


class _SuspectError(Exception):
    """A part that is not known to be bounded; its text says why."""


def reason_to_isolate(content: bytes) -> str | None:
    """Why a `tokenizer.json` of these bytes must not be read in this process, None if it may. Never raises."""
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
        # The library refuses it, too.
        return None
    except _SuspectError as reason:
        return str(reason)
    except (AttributeError, KeyError, TypeError, ValueError):
        return "a malformed part"
    return None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        # Which one counts is for each reader to say.
        raise _SuspectError("a name that is given twice")
    return value


def _growth(part: Any, members: str, growth_of: Any) -> float:
    """How much longer a text may become in the chain `part`, whose sequences keep their parts in `members`."""
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
        # To what lies between two special tokens, which may be one character.
        return 1.0 + _length(part["prepend"])
    if part["type"] == "Precompiled":
        return _character_map(base64.b64decode(part["precompiled_charsmap"], validate=True))
    return _known(part, _NORMALIZERS)


def _pre_tokenizer(part: Mapping[str, Any]) -> float:
    if part["type"] == "Split":
        _pattern(part["pattern"])
        return 1.0
    if part["type"] == "Metaspace":
        # In the place of a space and before each word.
        return 2.0 * max(_length(part["replacement"]), 1)
    return _known(part, _PRE_TOKENIZERS)


def _decoder(part: Mapping[str, Any]) -> float:
    if part["type"] == "Replace":
        return _replacement(part)
    if part["type"] in ("BPEDecoder", "CTC"):
        # An empty text is found between any two characters.
        texts = [part[name] for name in ("suffix", "pad_token", "word_delimiter_token") if name in part]
        return 2.0 if all(texts) else 4.0
    return _known(part, _DECODERS)


def _length(text: str) -> int:
    return len(text.encode())


def _pattern(pattern: Mapping[str, str]) -> int:
    """The least bytes that a match of `pattern` has. Raises _SuspectError for one that takes long."""
    if list(pattern) == ["String"]:
        return _length(pattern["String"])
    if list(pattern) != ["Regex"] or not is_linear(pattern["Regex"]):
        raise _SuspectError(f"a pattern that may take very long ({str(pattern)[:80]})")
    return 0


def _replacement(part: Mapping[str, Any]) -> float:
    found, content = _pattern(part["pattern"]), _length(part["content"])
    # What may match nothing matches between any two characters.
    return max(1.0, content / found) if found else 1.0 + content


def _character_map(content: bytes) -> float:
    """The growth of a character map of SentencePiece. Raises _SuspectError for one that leads outside itself.

    A map is the length of a trie, the trie, and texts that end in NUL: `precompiled_charsmap` in sentencepiece's normalizer.cc,
    the units of the trie in its darts.h.
    """
    suspect = _SuspectError("a character map that is not sound")
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
    """How many tokens a template adds to a text."""
    added = {name: len(token["ids"]) for name, token in part["special_tokens"].items()}
    tokens = texts = 0
    for piece in part["single"]:
        if "Sequence" in piece:
            texts += 1
        else:
            # A token that is not there is for the library to complain about.
            tokens += added.get(piece["SpecialToken"]["id"], 0)
    if texts > 1:
        raise _SuspectError("a post-processor that repeats the text")
    return tokens


def _check_model(model: Mapping[str, Any]) -> None:
    # Old files do not say which model it is: each is held to all rules.
    if int(model.get("max_input_chars_per_word") or 0) > MAX_WORD_CHARACTERS:
        raise _SuspectError("words of very many characters")
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
            raise _SuspectError("very long pieces of text")
