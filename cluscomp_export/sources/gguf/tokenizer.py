"""The tokenizer of a GGUF file as `tokenizer.json`, `tokenizer_config.json` and `generation_config.json`.

Two of llama.cpp's tokenizer models are rebuilt:

- `gpt2`: byte-level BPE with the merges of the file. How text is cut into words before merging is not stored; only the name
  of a scheme is (`tokenizer.ggml.pre`), see `cluscomp_formats.tokens.word_schemes`.
- `llama`: SentencePiece BPE. It repeatedly merges the neighbours whose union has the best score. The `tokenizers` library needs
  a ranked list of merges instead, which is recovered from the scores.

For any other model, an unknown scheme or inconsistent data, there is no tokenizer, and a note says why. Generation ends at the
same tokens as in llama.cpp, see `cluscomp_formats.gguf.end_of_generation`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cluscomp_formats.gguf.end_of_generation import KEYS, ends_generation, types_in_use
from cluscomp_formats.strict_json import is_unicode
from cluscomp_formats.tokens.chat_templates import DEFAULT
from cluscomp_formats.tokens.merges import merges_from_scores
from cluscomp_formats.tokens.unsupported import UnsupportedTokenizer
from cluscomp_formats.tokens.word_schemes import SCHEMES, Scheme

__all__ = ["UnsupportedTokenizer", "build_generation_config", "build_tokenizer"]

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = 1, 2, 3, 4, 5
"""Values of `tokenizer.ggml.token_type`."""

_NAMES = {"bos": "bos", "eos": "eos", "unknown": "unk", "seperator": "sep", "padding": "pad", "cls": "cls", "mask": "mask"}
"""Names in Hugging Face's files of the tokens of `tokenizer.ggml.<key>_token_id`."""
_END_KEYS = (*KEYS, "fim_pad", "fim_rep", "fim_sep")
_DEFAULTS = {"llama": {"bos": 1, "eos": 2, "unknown": 0}, "gpt2": {"bos": 11, "eos": 11}}
"""What llama.cpp assumes if a file does not name these tokens and has at least so many."""

_SPACE = "\u2581"


@dataclass(frozen=True)
class _Vocabulary:
    """Tokens by id with their types, and the ids of the special ones, checked against each other."""

    tokens: list[str]
    types: list[int]
    special: dict[str, str]
    special_ids: dict[str, int]


def build_tokenizer(metadata: Mapping[str, Any]) -> dict[str, bytes]:
    """`tokenizer.json` and `tokenizer_config.json` by name.

    Raises UnsupportedTokenizer, saying why, if the file has no tokenizer or one that cannot be rebuilt faithfully.
    """
    model = metadata.get("tokenizer.ggml.model")
    if model == "gpt2":
        vocabulary = _vocabulary(metadata)
        scheme_name = metadata.get("tokenizer.ggml.pre", "default")
        scheme = SCHEMES.get(scheme_name) if isinstance(scheme_name, str) else None
        if scheme is None:
            raise UnsupportedTokenizer(f"unknown pre-tokenizer {scheme_name!a}; known: {', '.join(sorted(SCHEMES))}")
        parts, add_bos = _byte_level(metadata, vocabulary, scheme), scheme.add_bos
    elif model == "llama":
        vocabulary = _vocabulary(metadata)
        parts, add_bos = _sentencepiece(metadata, vocabulary), True
    elif model is None:
        raise UnsupportedTokenizer("the file has no tokenizer")
    else:
        raise UnsupportedTokenizer(f"tokenizer model {model!a}; known: gpt2, llama")

    add_bos = bool(metadata.get("tokenizer.ggml.add_bos_token", add_bos)) and "bos_token" in vocabulary.special
    add_eos = bool(metadata.get("tokenizer.ggml.add_eos_token", False)) and "eos_token" in vocabulary.special
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added_tokens(vocabulary),
        **parts,
        "post_processor": _template(vocabulary, add_bos, add_eos),
    }
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "add_bos_token": add_bos,
        "add_eos_token": add_eos,
        **vocabulary.special,
    }
    config |= _chat_templates(metadata)
    return {"tokenizer.json": _json_bytes(tokenizer), "tokenizer_config.json": _json_bytes(config)}


def _chat_templates(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The `chat_template` of `tokenizer_config.json`: a text, or a list of named ones."""
    key = "tokenizer.chat_template"
    found = {
        name.removeprefix(f"{key}.") if name != key else DEFAULT: text
        for name, text in metadata.items()
        if (name == key or name.startswith(f"{key}.")) and isinstance(text, str)
    }
    if not all(is_unicode(name) and is_unicode(text) for name, text in found.items()):
        raise UnsupportedTokenizer("the chat template is not valid UTF-8")
    if found.keys() <= {DEFAULT}:
        return {"chat_template": found[DEFAULT]} if found else {}
    return {"chat_template": [{"name": name, "template": text} for name, text in found.items()]}


def build_generation_config(metadata: Mapping[str, Any]) -> dict[str, bytes]:
    """`generation_config.json` by name, with all tokens at which llama.cpp ends a generation; empty if there are none."""
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
        return {}
    ids = _special_ids(metadata, (*_NAMES, *_END_KEYS), len(tokens))
    ends = ends_generation(tokens, ids)
    values: dict[str, Any] = {"eos_token_id": sorted(ends, key=lambda number: (number != ids.get("eos"), number))}
    values |= {f"{_NAMES[key]}_token_id": ids[key] for key in ("bos", "padding") if key in ids}
    return {"generation_config.json": _json_bytes(values)} if ends else {}


def _special_ids(metadata: Mapping[str, Any], keys: Sequence[str], count: int) -> dict[str, int]:
    """The ids of `tokenizer.ggml.<key>_token_id`, llama.cpp's defaults if one is missing or out of range."""
    model = metadata.get("tokenizer.ggml.model")
    found = {key: number for key, number in _DEFAULTS.get(str(model), {}).items() if key in keys}
    for key in keys:
        number = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if type(number) is int and 0 <= number < count:
            found[key] = number
    return {key: number for key, number in found.items() if number < count}


def _json_bytes(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, indent=2).encode()


def _list(metadata: Mapping[str, Any], key: str, item: type, length: int | None = None) -> list[Any]:
    values = metadata.get(f"tokenizer.ggml.{key}")
    if not isinstance(values, list) or not all(type(value) is item for value in values):
        raise UnsupportedTokenizer(f"tokenizer.ggml.{key} is missing or not a list of {item.__name__}")
    if length is not None and len(values) != length:
        raise UnsupportedTokenizer(f"tokenizer.ggml.{key} has {len(values)} items for {length} tokens")
    return values


def _vocabulary(metadata: Mapping[str, Any]) -> _Vocabulary:
    # llama.cpp also names empty tokens, so that each text has one id.
    texts = _list(metadata, "tokens", str)
    tokens = [text or f"[EMPTY_{number}]" for number, text in enumerate(texts)]
    if len(set(tokens)) != len(tokens):
        raise UnsupportedTokenizer("two tokens have the same text")
    if not all(map(is_unicode, tokens)):
        raise UnsupportedTokenizer("a token is not valid UTF-8")
    has_types = "tokenizer.ggml.token_type" in metadata
    types = _list(metadata, "token_type", int, len(tokens)) if has_types else [_NORMAL] * len(tokens)
    for key in _NAMES:
        number = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if number is not None and (type(number) is not int or not 0 <= number < len(tokens)):
            raise UnsupportedTokenizer(f"tokenizer.ggml.{key}_token_id is {number!a}, of {len(tokens)} tokens")
    types = types_in_use(tokens, types, ends_generation(tokens, _special_ids(metadata, _END_KEYS, len(tokens))))
    special_ids = {f"{_NAMES[key]}_token": number for key, number in _special_ids(metadata, tuple(_NAMES), len(tokens)).items()}
    return _Vocabulary(tokens, types, {name: tokens[number] for name, number in special_ids.items()}, special_ids)


def _added_tokens(vocabulary: _Vocabulary) -> list[dict[str, Any]]:
    """Tokens that are matched in the text before anything else: control, unknown and user-defined ones."""
    kept_whole = (_UNKNOWN, _CONTROL, _USER_DEFINED)
    return [
        {
            "id": number,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": token_type != _USER_DEFINED,
        }
        for number, (token, token_type) in enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True))
        if token_type in kept_whole
    ]


def _template(vocabulary: _Vocabulary, add_bos: bool, add_eos: bool) -> dict[str, Any] | None:
    """The post-processor that puts the begin and end tokens around a text."""
    used = [name for name, add in (("bos_token", add_bos), ("eos_token", add_eos)) if add]
    if not used:
        return None

    def around(sequence: str, type_id: int) -> list[dict[str, Any]]:
        pieces: list[dict[str, Any]] = [{"Sequence": {"id": sequence, "type_id": type_id}}]
        for name in used:
            token = {"SpecialToken": {"id": vocabulary.special[name], "type_id": type_id}}
            pieces = [token, *pieces] if name == "bos_token" else [*pieces, token]
        return pieces

    special = {
        vocabulary.special[name]: {
            "id": vocabulary.special[name],
            "ids": [vocabulary.special_ids[name]],
            "tokens": [vocabulary.special[name]],
        }
        for name in used
    }
    pair = around("A", 0) + around("B", 1)
    return {"type": "TemplateProcessing", "single": around("A", 0), "pair": pair, "special_tokens": special}


def _bpe(vocabulary: _Vocabulary, merges: Sequence[tuple[str, str]], **options: Any) -> dict[str, Any]:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        **options,
        "vocab": {
            token: number
            for number, (token, kind) in enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True))
            # Converters give this name to an embedding without a token.
            if kind != _UNUSED or token != f"[PAD{number}]"
        },
        "merges": [list(merge) for merge in merges],
    }


def _byte_level(metadata: Mapping[str, Any], vocabulary: _Vocabulary, scheme: Scheme) -> dict[str, Any]:
    known = set(vocabulary.tokens)
    merges = []
    for line in _list(metadata, "merges", str):
        # A part may begin with a space but not contain another one: llama.cpp also searches from the second character.
        at = line.find(" ", 1)
        left, right = line[:at], line[at + 1 :]
        if at < 0 or not {left, right, left + right} <= known:
            raise UnsupportedTokenizer(f"the merge {line!a} does not combine two tokens into a third")
        merges.append((left, right))
    words = [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False} for pattern in scheme.patterns
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "normalizer": {"type": scheme.normalizer} if scheme.normalizer else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*words, byte_level]},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": _bpe(vocabulary, merges, ignore_merges=scheme.ignore_merges),
    }


def _sentencepiece(metadata: Mapping[str, Any], vocabulary: _Vocabulary) -> dict[str, Any]:
    scores = _list(metadata, "scores", float, len(vocabulary.tokens))
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    normalizers: list[dict[str, Any]] = [replace]
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if metadata.get("tokenizer.ggml.add_space_prefix", True):
        normalizers = [{"type": "Prepend", "prepend": _SPACE}, replace]
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    unknown = vocabulary.special.get("unk_token") or next(
        (token for token, token_type in zip(vocabulary.tokens, vocabulary.types, strict=True) if token_type == _UNKNOWN), None
    )
    merges = merges_from_scores(
        {
            token: score
            for token, token_type, score in zip(vocabulary.tokens, vocabulary.types, scores, strict=True)
            if token_type == _NORMAL
        }
    )
    return {
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": _bpe(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True),
    }
