"""Build a `tokenizer.json` for models that only have the vocabulary of another program.

Supported are SentencePiece models (Llama, Mistral, Gemma, T5) and the `vocab.json` with `merges.txt` of GPT-2 and Qwen2. The
class in `tokenizer_config.json` determines how a text is split into words and which tokens are added around it. If anything is
uncertain, no tokenizer is built: one that is almost right gives wrong answers that nobody notices.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from typing import Any

from cluscomp_formats.ir import Array
from cluscomp_formats.strict_json import is_unicode
from cluscomp_formats.tokens import sentencepiece_model as sp
from cluscomp_formats.tokens.added_tokens import AddedToken
from cluscomp_formats.tokens.class_tokens import tokenizer_class, with_class_tokens
from cluscomp_formats.tokens.json_files import read_json_file
from cluscomp_formats.tokens.merges import merges_from_scores
from cluscomp_formats.tokens.sentencepiece_model import SentencePieceModel
from cluscomp_formats.tokens.unsupported import UnsupportedTokenizer
from cluscomp_formats.tokens.word_schemes import GPT2_WORDS, SCHEMES

__all__ = ["BYTE_LEVEL_CLASSES", "SENTENCEPIECE_CLASSES", "VOCABULARY_FILES", "build_tokenizer_files", "vocabularies"]

VOCABULARY_FILES = (
    *("tokenizer.model", "spiece.model", "vocab.json", "merges.txt"),
    *("vocab.txt", "tekken.json", "sentencepiece.bpe.model"),
)
"""The files that are used if there is no `tokenizer.json`."""

_CONFIG = "tokenizer_config.json"
_SPACE = "\u2581"

_GENERAL = ("", "PreTrainedTokenizer", "TokenizersBackend")
_T5 = "T5Tokenizer"
SENTENCEPIECE_CLASSES = ("LlamaTokenizer", "CodeLlamaTokenizer", "GemmaTokenizer", _T5)
"""Classes that use the ids of the SentencePiece model; many other classes have their own tables."""

BYTE_LEVEL_CLASSES = ("GPT2Tokenizer", "Qwen2Tokenizer")
_CLASS_OF_TYPE = {"gpt2": "GPT2Tokenizer", "qwen2": "Qwen2Tokenizer", "qwen3": "Qwen2Tokenizer"}


def vocabularies(files: Mapping[str, Array]) -> list[str]:
    """Return the names of the vocabulary files, from which a tokenizer could be built, here or by other software."""
    return [*(name for name in VOCABULARY_FILES if name in files), *(name for name in files if name.endswith(".tiktoken"))]


def build_tokenizer_files(files: Mapping[str, Array], model_type: str | None = None) -> dict[str, bytes]:
    """Return `tokenizer.json`, and `tokenizer_config.json` completed by default special tokens; empty if the former exists.

    `model_type` is that of the model's configuration, for files that do not name a class. Raises UnsupportedTokenizer, with the
    reason, if there is no vocabulary or it cannot be rebuilt faithfully; InvalidFileError if a file is not a JSON object.
    """
    if "tokenizer.json" in files:
        return {}
    config = read_json_file(files, _CONFIG)
    class_name = tokenizer_class(config)
    pieces = next((name for name in ("tokenizer.model", "spiece.model") if name in files), None)
    if pieces is not None:
        tokenizer, names = _sentencepiece(files[pieces].read().tobytes(), config, class_name)
    elif {"vocab.json", "merges.txt"} <= files.keys():
        tokenizer, names = _byte_level(files, class_name or _CLASS_OF_TYPE.get(model_type or "", ""))
    else:
        known = vocabularies(files)
        raise UnsupportedTokenizer(f"{known[0]} alone is not read" if known else "there is no tokenizer.json")
    whole = {"version": "1.0", "truncation": None, "padding": None, **tokenizer}
    built = {"tokenizer.json": json.dumps(whole, ensure_ascii=False, indent=1).encode()}
    named = {**names, **{name: value for name, value in config.items() if value is not None}}
    if named != config:
        built[_CONFIG] = json.dumps({**config, **named}, indent=2).encode()
    return built


def _sentencepiece(content: bytes, config: Mapping[str, Any], class_name: str) -> tuple[dict[str, Any], dict[str, str]]:
    if class_name not in (*_GENERAL, *SENTENCEPIECE_CLASSES):
        raise UnsupportedTokenizer(f"{class_name} assigns its own ids to the pieces of a SentencePiece model")
    try:
        model = SentencePieceModel.parse(content)
    except UnsupportedTokenizer as reason:
        # tiktoken's format has one line per token: the token in base64, a space, its rank.
        if content[:1].isalnum() and b" " in content[:256]:
            raise UnsupportedTokenizer(
                "tokenizer.model is a tiktoken vocabulary, which does not define how text is split into words"
            ) from reason
        raise
    if any(piece.kind == sp.UNUSED for piece in model.pieces):
        raise UnsupportedTokenizer("the SentencePiece model has unused pieces")
    names = {f"{name}_token": model.pieces[number].text for name, number in model.ids.items()}
    added = [
        AddedToken(piece.text, special=piece.kind != sp.USER_DEFINED).entry(number)
        for number, piece in enumerate(model.pieces)
        if piece.kind in (sp.UNKNOWN, sp.CONTROL, sp.USER_DEFINED)
    ]
    if class_name == _T5:
        added += _sentinels(config, len(model.pieces))
    first_only = config.get("legacy") is False and model.add_prefix
    tokenizer = {
        "added_tokens": added,
        "normalizer": {"type": "Sequence", "normalizers": _normalizers(model, first_only=first_only)},
        "pre_tokenizer": _metaspace() if first_only else None,
        "post_processor": _template(config, names, model),
        "decoder": {"type": "Sequence", "decoders": _decoders(model)},
        "model": _unigram(model) if model.kind == sp.UNIGRAM else _bpe(model),
    }
    return tokenizer, names


def _sentinels(config: Mapping[str, Any], size: int) -> list[dict[str, Any]]:
    """Return T5's sentinel tokens for omitted spans of a text, the last one first; their ids follow the pieces."""
    count = config.get("extra_ids", 100)
    if type(count) is not int or not 0 <= count <= 1000:
        raise UnsupportedTokenizer(f"extra_ids is {count!a}"[:200])
    return [AddedToken(f"<extra_id_{count - 1 - at}>").entry(size + at) for at in range(count)]


def _normalizers(model: SentencePieceModel, *, first_only: bool) -> list[dict[str, Any]]:
    steps: list[dict[str, Any]] = []
    if model.character_map:
        steps.append({"type": "Precompiled", "precompiled_charsmap": base64.b64encode(model.character_map).decode()})
    if model.remove_spaces:
        steps += [_replace({"Regex": pattern}, content) for pattern, content in ((" {2,}", " "), (r"\A ", ""), (r" \z", ""))]
    if not first_only:
        steps += [{"type": "Prepend", "prepend": _SPACE}] if model.add_prefix else []
        steps.append(_replace({"String": " "}, _SPACE))
    return steps


def _replace(pattern: Mapping[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def _metaspace() -> dict[str, Any]:
    return {"type": "Metaspace", "replacement": _SPACE, "prepend_scheme": "first", "split": False}


def _decoders(model: SentencePieceModel) -> list[dict[str, Any]]:
    steps = [_replace({"String": _SPACE}, " "), {"type": "ByteFallback"}, {"type": "Fuse"}]
    return [*steps, {"type": "Strip", "content": " ", "start": 1, "stop": 0}] if model.add_prefix else steps


def _template(config: Mapping[str, Any], names: Mapping[str, str], model: SentencePieceModel) -> dict[str, Any] | None:
    """Return the tokens around a text: those of the configuration, else as in the training of Llama (BPE) and T5 (Unigram)."""
    defaults = {"bos": model.kind == sp.BPE, "eos": model.kind == sp.UNIGRAM}
    ids = {piece.text: number for number, piece in enumerate(model.pieces)}
    used = {}
    for name, default in defaults.items():
        wanted = config.get(f"add_{name}_token")
        token = config.get(f"{name}_token") or names.get(f"{name}_token")
        text = token.get("content") if isinstance(token, dict) else token
        if (wanted if isinstance(wanted, bool) else default) and isinstance(text, str) and text in ids:
            used[name] = text

    def around(sequence: str, type_id: int) -> list[dict[str, Any]]:
        tokens = {name: {"SpecialToken": {"id": text, "type_id": type_id}} for name, text in used.items()}
        text = {"Sequence": {"id": sequence, "type_id": type_id}}
        return [piece for piece in (tokens.get("bos"), text, tokens.get("eos")) if piece is not None]

    if not used:
        return None
    special = {text: {"id": text, "ids": [ids[text]], "tokens": [text]} for text in used.values()}
    pair = around("A", 0) + around("B", 1)
    return {"type": "TemplateProcessing", "single": around("A", 0), "pair": pair, "special_tokens": special}


def _unigram(model: SentencePieceModel) -> dict[str, Any]:
    vocabulary = [[piece.text, piece.score] for piece in model.pieces]
    return {"type": "Unigram", "unk_id": model.ids.get("unk"), "vocab": vocabulary, "byte_fallback": model.byte_fallback}


def _bpe(model: SentencePieceModel) -> dict[str, Any]:
    scores = {piece.text: piece.score for piece in model.pieces if piece.kind in (sp.NORMAL, sp.USER_DEFINED)}
    unknown = model.pieces[model.ids["unk"]].text if "unk" in model.ids else None
    vocabulary = {piece.text: number for number, piece in enumerate(model.pieces)}
    return _bpe_model(vocabulary, merges_from_scores(scores), unknown, byte_fallback=model.byte_fallback)


def _bpe_model(
    vocabulary: Mapping[str, int], merges: list[tuple[str, str]], unknown: str | None, *, byte_fallback: bool
) -> dict[str, Any]:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": unknown,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": unknown is not None,
        "byte_fallback": byte_fallback,
        "ignore_merges": False,
        "vocab": vocabulary,
        "merges": merges,
    }


def _byte_level(files: Mapping[str, Array], class_name: str) -> tuple[dict[str, Any], dict[str, str]]:
    if class_name not in BYTE_LEVEL_CLASSES:
        found = class_name or "no tokenizer_class"
        raise UnsupportedTokenizer(f"with {found}, it is unknown how text is split into words for vocab.json and merges.txt")
    vocabulary = read_json_file(files, "vocab.json")
    if not all(type(number) is int and is_unicode(token) for token, number in vocabulary.items()):
        raise UnsupportedTokenizer("vocab.json has ids that are not integers, or tokens that are not valid Unicode")
    merges = _read_merges(files["merges.txt"].read().tobytes(), vocabulary)
    qwen = class_name == "Qwen2Tokenizer"
    words = SCHEMES["qwen2"].patterns[0] if qwen else GPT2_WORDS
    split = {"type": "Split", "pattern": {"Regex": words}, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    names: dict[str, str] = with_class_tokens({}, class_name, vocabulary)
    tokenizer = {
        "added_tokens": [AddedToken(text).entry(vocabulary[text]) for text in sorted(set(names.values()))],
        "normalizer": {"type": "NFC"} if qwen else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": _bpe_model(vocabulary, merges, None, byte_fallback=False),
    }
    return tokenizer, names


def _read_merges(content: bytes, vocabulary: Mapping[str, int]) -> list[tuple[str, str]]:
    try:
        lines = content.decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise UnsupportedTokenizer("merges.txt is not valid UTF-8") from error
    merges = []
    for line in lines[1:] if lines[0].startswith("#version") else lines:
        if line.strip():
            left, _, right = line.rstrip("\r").partition(" ")
            if not {left, right, left + right} <= vocabulary.keys():
                raise UnsupportedTokenizer(f"the line {line!a} of merges.txt is not two tokens that merge to a third"[:200])
            merges.append((left, right))
    return merges
