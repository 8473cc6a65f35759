"""Strict JSON: a canonical text per value, and only values that JSON readers of all languages accept."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from typing import Any

__all__ = ["MAX_DEPTH", "StrictJsonError", "canonical_json", "is_unicode", "json_faults", "parse_canonical", "parse_strict"]

MAX_DEPTH = 64
"""Largest nesting depth of objects and arrays."""

_INTEGERS = range(-(2**63), 2**64)
_SURROGATE = re.compile("[\ud800-\udfff]")
_MAX_KEY = 80
"""Characters of a key that messages show."""

_Path = tuple[Any, Any]
"""The path of a value's container (None at the top) and the value's key or index in it."""


class StrictJsonError(ValueError):
    """A JSON text violates a rule. `kind` is the problem's kind."""

    def __init__(self, kind: str, message: str) -> None:
        self.kind = kind
        super().__init__(message)


def canonical_json(value: Any) -> str:
    """Return JSON with sorted keys, no whitespace, ASCII only and no NaN: equal values give equal bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def json_faults(value: Any, where: str) -> Iterator[tuple[str, str]]:
    """Yield `(path, fault)` for everything in `value` that strict JSON cannot represent; `where` is the path of `value`.

    Integers must fit 64 bits, floats must be finite, keys must be strings, and strings must be valid Unicode.
    """
    # An explicit stack, because the value may be nested deeper than Python can recurse, or contain itself. Paths are built
    # only for faults: the paths of all members of a long list would repeat its own path as often.
    stack: list[tuple[Any, _Path, int]] = [(value, (None, where), 1)]
    while stack:
        item, path, depth = stack.pop()
        if item is None or isinstance(item, bool):
            continue
        if isinstance(item, str):
            if not is_unicode(item):
                yield _spelt(path), "a string with a lone surrogate"
        elif isinstance(item, int):
            if item not in _INTEGERS:
                yield _spelt(path), "an integer of more than 64 bits"
        elif isinstance(item, float):
            if not math.isfinite(item):
                yield _spelt(path), f"the number {item}"
        elif depth > MAX_DEPTH:
            yield _spelt(path), f"nested more than {MAX_DEPTH} deep"
        elif isinstance(item, dict):
            for key, member in item.items():
                if not isinstance(key, str):
                    yield _spelt(path), f"the key {key!r}, which is not a string"
                elif not is_unicode(key):
                    yield _spelt(path), "a key with a lone surrogate"
                else:
                    stack.append((member, (path, key), depth + 1))
        elif isinstance(item, (list, tuple)):
            stack += [(member, (path, index), depth + 1) for index, member in enumerate(item)]
        else:
            yield _spelt(path), f"a {type(item).__name__}"


def _spelt(path: _Path) -> str:
    """Return a path as `where.key[index]`, with long keys cut."""
    parts: list[str] = []
    above, step = path
    while above is not None:
        parts.append(f"[{step}]" if isinstance(step, int) else f".{step[:_MAX_KEY]}")
        above, step = above
    return f"{step}{''.join(reversed(parts))}"


def parse_strict(data: bytes, encoding: str = "utf-8") -> Any:
    """Return the value of a JSON text in any formatting, if `json_faults` finds no fault in it.

    Raises StrictJsonError of kind `bad_json` or `duplicate_key`.
    """
    try:
        value = json.loads(data.decode(encoding), object_pairs_hook=_object_without_duplicates, parse_constant=_no_constant)
    except StrictJsonError:
        raise
    except RecursionError:
        raise StrictJsonError("bad_json", f"nested more than {MAX_DEPTH} deep") from None
    except ValueError as error:
        # JSONDecodeError, UnicodeDecodeError and Python's limit on the digits of an integer.
        raise StrictJsonError("bad_json", str(error)) from None
    fault = next(json_faults(value, "the value"), None)
    if fault is not None:
        raise StrictJsonError("bad_json", f"{fault[0]} is {fault[1]}")
    return value


def parse_canonical(data: bytes) -> Any:
    """Return the value of a canonical JSON text; see `canonical_json`.

    Raises StrictJsonError of kind `bad_json`, `duplicate_key` or `not_canonical`.
    """
    value = parse_strict(data, "ascii")
    if canonical_json(value).encode() != data:
        raise StrictJsonError("not_canonical", "keys are unsorted, or white space or numbers are not in canonical form")
    return value


def is_unicode(text: str) -> bool:
    """Return whether a text can be encoded, that is, has no lone surrogate."""
    return text.isascii() or _SURROGATE.search(text) is None


def _object_without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) < len(pairs):
        seen: set[str] = set()
        doubled = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise StrictJsonError("duplicate_key", f"the key {doubled!r} occurs twice in one object")
    return members


def _no_constant(name: str) -> Any:
    raise StrictJsonError("bad_json", f"{name} is not JSON")
