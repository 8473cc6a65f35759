"""The tokenizer in a model's side files: `tokenizer.json`, completed by settings that only other files have."""

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
"""The side files that define the tokens, the special tokens and the end tokens."""

_UNSUPPORTED = "unsupported: "
"""Prefix of `provenance["tokenizer"]` if the tokenizer of a GGUF source could not be rebuilt; the reason follows."""

_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


@dataclass(frozen=True)
class TokenizerFiles:
    """The tokenizer of a model's side files.

    `tokenizer` is a complete `tokenizer.json`, `content` the same as bytes. `special_tokens` are the special tokens by name,
    `ids` the ids of all tokens by text. `moved` has the added tokens whose id in a file differs from the one that the
    tokenizers library assigns, by text: (id in the file, assigned id). `ids` and `moved` are empty if `tokenizer.json` has an
    unusual structure.
    """

    tokenizer: Mapping[str, Any]
    content: bytes
    special_tokens: Mapping[str, str]
    ids: Mapping[str, int] = field(default_factory=dict)
    moved: Mapping[str, tuple[int, int]] = field(default_factory=dict)


def with_tokenizer(files: Mapping[str, Array], model_type: str | None = None) -> dict[str, Array]:
    """Return the side files, with a `tokenizer.json` built from other files if it is missing and this is possible.

    `model_type` is that of the model's configuration. Raises InvalidFileError if a file is malformed.
    """
    try:
        built = build_tokenizer_files(files, model_type)
    except UnsupportedTokenizer:
        built = {}
    return {**files, **{name: Array.of(np.frombuffer(content, np.uint8)) for name, content in built.items()}}


def no_tokenizer(model: Model) -> Problem:
    """Return why a model has no tokenizer, and the remedy. Raises InvalidFileError if a side file is malformed."""
    reason, remedy = "there is no tokenizer.json", "put the model's own tokenizer.json next to the weights of the source"
    in_source = str(model.provenance.get("tokenizer", ""))
    try:
        build_tokenizer_files(model.files, model.config.get("model_type"))
    except UnsupportedTokenizer as fault:
        reason = str(fault)
    if in_source.startswith(_UNSUPPORTED):
        reason, remedy = in_source.removeprefix(_UNSUPPORTED), "start from the Hugging Face folder of this model"
    elif vocabularies(model.files):
        made = "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        needs = "offline; it may require the package sentencepiece or tiktoken"
        remedy = f"make a tokenizer.json in the folder of the source with transformers, {made} ({needs})"
    return Problem("no_tokenizer", "this model has no tokenizer", None, None, reason, "tokenizer.json", remedy)


def read_tokenizer(files: Mapping[str, Array]) -> TokenizerFiles | None:
    """Return the tokenizer in a model's side files, None if there is no `tokenizer.json` and none can be built.

    A `tokenizer.json` with an unusual structure is returned unchanged; the tokenizers library will report its errors. Raises
    InvalidFileError if a file is not a JSON object or an added token is malformed.
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
        # ASCII escapes preserve invalid Unicode, which the tokenizers library then rejects.
        content = json.dumps(tokenizer).encode()
    ids = {**vocabulary, **{text: number for text, (number, _) in placed.items()}}
    return TokenizerFiles(tokenizer, content, special_tokens, ids, moved)


def vocabulary_ids(tokenizer: Mapping[str, Any]) -> dict[str, int] | None:
    """Return the ids of a `tokenizer.json`'s vocabulary by text, without added tokens; None if its structure is unusual."""
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
    """Return the added tokens in `tokenizer.json` with their stored ids; None if their structure is unusual."""
    entries = tokenizer.get("added_tokens", [])
    tokens = []
    for entry in entries if isinstance(entries, list) else [{}]:
        if not isinstance(entry, dict) or type(entry.get("id")) is not int or not isinstance(entry.get("content"), str):
            return None
        if not all(isinstance(entry.get(flag), bool) for flag in _FLAGS):
            return None
        tokens.append((entry["id"], AddedToken(entry["content"], **{flag: entry[flag] for flag in _FLAGS})))
    return tokens
