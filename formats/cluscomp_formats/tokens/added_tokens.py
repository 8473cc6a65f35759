"""Added tokens of a model: those of `tokenizer.json` and those that only the other side files name.

The rules are those of transformers 5 for loading a tokenizer, in its order:

1. `tokenizer_config.json` has special tokens by name (`bos_token`, ...), special tokens without a name
   (`extra_special_tokens`, formerly `additional_special_tokens`) and, in `added_tokens_decoder`, added tokens by id.
2. Only without `added_tokens_decoder`: `special_tokens_map.json` overrides those names, and `added_tokens.json` has added
   tokens.
3. Tokens that `tokenizer.json` does not have, or has with other flags, are added: first those by id, then the named ones, then
   the others.

The tokenizers library assigns the ids: that of the same text in the vocabulary, else the next free id. The ids in the files
only determine the order.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from cluscomp_formats.errors import InvalidFileError, Problem
from cluscomp_formats.strict_json import is_unicode

__all__ = ["NAMES", "AddedToken", "TokenSettings", "assign_ids", "missing_tokens", "read_settings", "special_tokens"]

NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""Names of the special tokens that any tokenizer may have, in the order in which transformers adds them."""

_CONFIG, _MAP, _ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
_EXTRA, _OLD_EXTRA, _BY_ID = "extra_special_tokens", "additional_special_tokens", "added_tokens_decoder"


@dataclass(frozen=True)
class AddedToken:
    """A token that is recognised in a text before the text is split; the fields are those of `tokenizer.json`."""

    content: str
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = False
    special: bool = True

    def entry(self, token_id: int) -> dict[str, Any]:
        """Return the token as a member of `added_tokens` in `tokenizer.json`."""
        return {"id": token_id, **vars(self)}


@dataclass(frozen=True)
class TokenSettings:
    """The content of the files besides `tokenizer.json`: named special tokens, unnamed ones, and added tokens by stored id."""

    named: Mapping[str, AddedToken] = field(default_factory=dict)
    extra: tuple[AddedToken, ...] = ()
    by_id: Mapping[int, AddedToken] = field(default_factory=dict)


def read_settings(
    config: Mapping[str, Any], special_map: Mapping[str, Any], added: Mapping[str, Any], stored: Mapping[int, AddedToken]
) -> TokenSettings:
    """Read the settings in `tokenizer_config.json`, `special_tokens_map.json` and `added_tokens.json`; each file is optional.

    `stored` are the added tokens of `tokenizer.json` by their stored ids. Raises InvalidFileError if a token is malformed; a
    value that is not a token (`bos_token: false`) is ignored.
    """
    extra = config.get(_EXTRA) or config.get(_OLD_EXTRA) or []
    values = {name: (config[name], _CONFIG) for name in NAMES if name in config}
    own = {name: (value, _CONFIG) for name, value in config.items() if _is_own_name(name) and isinstance(value, str)}
    if isinstance(extra, dict):
        own |= {str(name): (value, _CONFIG) for name, value in extra.items()}
        extra = []
    decoder = config.get(_BY_ID)
    if decoder is None:
        values |= {name: (special_map[name], _MAP) for name in NAMES if name in special_map}
        own = {name: (value, _MAP) for name, value in special_map.items() if _is_own_name(name)} | own
        more = special_map.get(_EXTRA)
        if isinstance(more, dict):
            own |= {str(name): (value, _MAP) for name, value in more.items()}
        elif isinstance(more, list):
            extra = [*_items(extra), *more]
        elif not {_EXTRA, _OLD_EXTRA} & config.keys():
            extra = special_map.get(_OLD_EXTRA) or []
    ordered = {name: values[name] for name in NAMES if name in values} | own
    named = {name: token for name, (value, file) in ordered.items() if (token := _token(value, file))}
    others = [token for value in _items(extra) if (token := _token(value, _CONFIG))]
    if decoder is not None:
        by_id = dict(_decoder_tokens(decoder))
    else:
        special = {token.content for token in (*named.values(), *others)}
        by_id = {**dict(_added_tokens(added, special)), **stored}
    flags = {token.content: token for token in by_id.values()}
    # A named token has the flags of the added token with the same text.
    named = {name: flags.get(token.content, token) for name, token in named.items()}
    return TokenSettings(named, tuple(others), by_id)


def special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Return the texts of the named special tokens in `tokenizer_config.json`. Raises InvalidFileError if one is malformed."""
    return {name: token.content for name, token in read_settings(config, {}, {}, {}).named.items()}


def missing_tokens(settings: TokenSettings, stored: Iterable[AddedToken]) -> list[AddedToken]:
    """Return the tokens that the settings add to those of `tokenizer.json`, in order; some may exist with other flags."""
    known = set(stored)
    contents = {token.content for token in known}
    named = {token.content for token in settings.named.values()}
    # A named token is special, even if its flags say otherwise.
    listed = [replace(token, special=token.special or token.content in named) for _, token in sorted(settings.by_id.items())]
    found = [token for token in listed if token not in known]
    contents |= {token.content for token in found}
    for token in (*settings.named.values(), *settings.extra):
        if token.content not in contents:
            contents.add(token.content)
            found.append(token)
    return found


def assign_ids(vocabulary: Mapping[str, int], tokens: Iterable[AddedToken]) -> dict[str, tuple[int, AddedToken]]:
    """Return tokens by text, with the ids the tokenizers library assigns when they are added to a vocabulary in this order."""
    placed: dict[str, tuple[int, AddedToken]] = {}
    highest = -1
    for token in tokens:
        if not token.content:
            continue
        if token.content in placed:
            number = placed[token.content][0]
        else:
            # The library continues from the number of tokens, even if the ids have gaps.
            number = vocabulary.get(token.content, max(len(vocabulary), highest + 1))
            highest = max(highest, number)
        placed[token.content] = number, token
    return placed


def _is_own_name(name: str) -> bool:
    """Return whether a setting names a special token that is specific to the model, such as `image_token`."""
    return name.endswith("_token") and name not in NAMES


def _items(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _token(value: Any, file: str) -> AddedToken | None:
    """Return a special token in a file: a text, or an object with `content`; None for anything else."""
    if isinstance(value, Mapping) and isinstance(value.get("content"), str):
        flags = {name: value.get(name) is True for name in ("single_word", "lstrip", "rstrip", "normalized")}
        return AddedToken(_checked(value["content"], file), **flags)
    return AddedToken(_checked(value, file)) if isinstance(value, str) else None


def _checked(content: str, file: str) -> str:
    if not is_unicode(content):
        raise InvalidFileError(Problem("bad_token", "a special token is not valid Unicode", file, found=ascii(content)[:200]))
    return content


def _decoder_tokens(decoder: Any) -> Iterator[tuple[int, AddedToken]]:
    if not isinstance(decoder, dict):
        found = type(decoder).__name__
        raise InvalidFileError(Problem("bad_token", f"{_BY_ID} is not an object", _CONFIG, None, found, "tokens by id"))
    for key, value in decoder.items():
        if not key.isdecimal() or len(key) > 10 or not isinstance(value, dict) or not isinstance(value.get("content"), str):
            found = f"{key!a}: {value!a}"[:200]
            raise InvalidFileError(Problem("bad_token", f"{_BY_ID} is malformed", _CONFIG, None, found, "tokens by id"))
        special = value.get("special") is True
        flags = {name: value.get(name) is True for name in ("single_word", "lstrip", "rstrip")}
        normalized = value.get("normalized", not special) is True
        content = _checked(value["content"], _CONFIG)
        yield int(key), AddedToken(content, **flags, normalized=normalized, special=special)


def _added_tokens(added: Mapping[str, Any], special: set[str]) -> Iterator[tuple[int, AddedToken]]:
    for content, number in added.items():
        if type(number) is not int or not 0 <= number < 2**32:
            found = f"{content!a}: {number!a}"[:200]
            raise InvalidFileError(Problem("bad_token", "malformed", _ADDED, None, found, "ids by token"))
        known = content in special
        yield number, AddedToken(_checked(content, _ADDED), normalized=not known, special=known)
