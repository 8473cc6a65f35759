"""Tokens that end a text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cluscomp_formats.errors import InvalidFileError, Problem
from cluscomp_formats.ir import Array
from cluscomp_formats.tokens.json_files import read_json_file

__all__ = ["end_tokens"]


def end_tokens(config: Mapping[str, Any], files: Mapping[str, Array], eos_id: int | None) -> tuple[int, ...]:
    """Return the ids that end a text: those of generation_config.json, else of config.json, else `eos_id` of the tokenizer.

    They are in the order of the file, each once. Raises InvalidFileError if a value is neither an id nor a list of ids.
    """
    generation = read_json_file(files, "generation_config.json")
    for name, source in (("generation_config.json", generation), ("config.json", config)):
        value = source.get("eos_token_id")
        if value is None:
            continue
        ids = value if isinstance(value, list) else [value]
        if any(isinstance(token, bool) or not isinstance(token, int) for token in ids):
            expected = "an id or a list of ids"
            raise InvalidFileError(Problem("bad_eos", "eos_token_id is malformed", name, None, repr(value)[:200], expected))
        return tuple(dict.fromkeys(ids))
    return () if eos_id is None else (eos_id,)
