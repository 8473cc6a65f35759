"""A model's tokenizer as its side files have it: a `tokenizer.json` completed by what only the files beside it say."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cluscomp_formats.errors import Problem
from cluscomp_formats.ir import Array, Model
from cluscomp_formats.tokens.added_tokens import AddedToken, assign_ids, missing_tokens, read_settings
from cluscomp_formats.tokens.class_tokens import tokenizer_class, with_class_tokens
from cluscomp_formats.tokens.from_vocabulary import VOCABULARY_FILES, build_tokenizer_files, vocabularies
from cluscomp_formats.tokens.json_files import read_json_file
from cluscomp_formats.tokens.unsupported import UnsupportedTokenizer

__all__ = ["TOKEN_FILES", "TokenizerFiles", "no_tokenizer", "read_tokenizer", "with_tokenizer"]

TOKENIZER = "tokenizer.json"
TOKEN_FILES = (
    *(TOKENIZER, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "generation_config.json"),
    *VOCABULARY_FILES,
)
"""The side files that say what tokens there are, which of them are special and which end a text."""

_UNSUPPORTED = "unsupported: "
"""How `provenance["tokenizer"]` of a GGUF source begins whose tokenizer could not be rebuilt; the reason follows."""

_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


@dataclass(frozen=True)
class TokenizerFiles:
    """What the side files say.

    `tokenizer` is a complete `tokenizer.json`, `content` the same as bytes, `special_tokens` the special tokens by name, `ids`
    the ids of all tokens by text. `moved` are the added tokens to which a file gives another id than the tokenizers library
    does, by text: (claimed, real). The last two are empty for a `tokenizer.json` that is not laid out as usual.
    """

    tokenizer: Mapping[str, Any]
    content: bytes
    special_tokens: Mapping[str, str]
    ids: Mapping[str, int] = field(default_factory=dict)
    moved: Mapping[str, tuple[int, int]] = field(default_factory=dict)


def with_tokenizer(files: Mapping[str, Array], model_type: str | None = None) -> dict[str, Array]:
    """The side files with a `tokenizer.json` built from other files if it is missing and that can be done.

    `model_type` is that of the model's configuration. Raises InvalidFileError.
    """
    try:
        built = build_tokenizer_files(files, model_type)
    except UnsupportedTokenizer:
        built = {}
    return {**files, **{name: Array.of(np.frombuffer(content, np.uint8)) for name, content in built.items()}}


def no_tokenizer(model: Model) -> Problem:
    """Why a model has no tokenizer, and what to do. Raises InvalidFileError."""
    reason, remedy = "there is no tokenizer.json", "put the model's own tokenizer.json beside the weights of the source"
    in_source = str(model.provenance.get("tokenizer", ""))
    try:
        build_tokenizer_files(model.files, model.config.get("model_type"))
    except UnsupportedTokenizer as fault:
        reason = str(fault)
    if in_source.startswith(_UNSUPPORTED):
        reason, remedy = in_source.removeprefix(_UNSUPPORTED), "start from the Hugging Face folder of this model"
    elif vocabularies(model.files):
        made = "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        needs = "offline; it may ask for the package sentencepiece or tiktoken"
        remedy = f"make a tokenizer.json in the folder of the source with transformers, {made} ({needs})"
    return Problem("no_tokenizer", "this model has no tokenizer", None, None, reason, "tokenizer.json", remedy)


def read_tokenizer(files: Mapping[str, Array]) -> TokenizerFiles | None:
    """The tokenizer among a model's side files, None if there is no `tokenizer.json` and none can be built.

    A `tokenizer.json` that is not laid out as usual comes back as it is: the library that it is for says what is wrong with it.
    Raises InvalidFileError for files that are no JSON objects and for malformed added tokens.
    """
    files = with_tokenizer(files)
    if TOKENIZER not in files:
        return None
    content = files[TOKENIZER].read().tobytes()
    tokenizer = read_json_file(files, TOKENIZER)
    config = read_json_file(files, "tokenizer_config.json")
    special_map, added = (read_json_file(files, f"{name}.json") for name in ("special_tokens_map", "added_tokens"))
    listed, vocabulary = _stored_tokens(tokenizer), vocabulary_ids(tokenizer)
    known = {token.content for _, token in listed or ()} | (vocabulary or {}).keys()
    config = with_class_tokens(config, tokenizer_class(config), known)
    settings = read_settings(config, special_map, added, dict(listed or ()))
    special_tokens = {name: token.content for name, token in settings.named.items()}
    if listed is None or vocabulary is None:
        return TokenizerFiles(tokenizer, content, special_tokens)
    stored = [token for _, token in listed]
    more = missing_tokens(settings, stored)
    placed = assign_ids(vocabulary, [*stored, *more])
    claims = {token.content: number for number, token in [*listed, *settings.by_id.items()]}
    moved = {text: (claims[text], number) for text, (number, _) in placed.items() if claims.get(text, number) != number}
    if more or any(placed[token.content][0] != number for number, token in listed if token.content):
        entries = sorted(placed.values(), key=lambda item: item[0])
        tokenizer = {**tokenizer, "added_tokens": [token.entry(number) for number, token in entries]}
        # Escaped, so that what is no valid Unicode is the library's to refuse.
        content = json.dumps(tokenizer).encode()
    ids = {**vocabulary, **{text: number for text, (number, _) in placed.items()}}
    return TokenizerFiles(tokenizer, content, special_tokens, ids, moved)


def vocabulary_ids(tokenizer: Mapping[str, Any]) -> dict[str, int] | None:
    """Ids by text of the vocabulary of a `tokenizer.json`, added tokens apart; None if it is not laid out as usual."""
    model = tokenizer.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocabulary, dict) and all(type(number) is int for number in vocabulary.values()):
        return vocabulary
    if isinstance(vocabulary, list) and all(
        isinstance(piece, list) and piece and isinstance(piece[0], str) for piece in vocabulary
    ):
        return {piece[0]: number for number, piece in enumerate(vocabulary)}
    return None


def _stored_tokens(tokenizer: Mapping[str, Any]) -> list[tuple[int, AddedToken]] | None:
    """The added tokens that `tokenizer.json` lists, with the ids it claims; None if they are not laid out as usual."""
    entries = tokenizer.get("added_tokens", [])
    tokens = []
    for entry in entries if isinstance(entries, list) else [{}]:
        if not isinstance(entry, dict) or type(entry.get("id")) is not int or not isinstance(entry.get("content"), str):
            return None
        if not all(isinstance(entry.get(flag), bool) for flag in _FLAGS):
            return None
        tokens.append((entry["id"], AddedToken(entry["content"], **{flag: entry[flag] for flag in _FLAGS})))
    return tokens
