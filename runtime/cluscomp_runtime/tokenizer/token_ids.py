"""Convert token ids as callers pass them (lists, tuples, numpy arrays, torch tensors, their scalars) to lists of ints."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Set
from typing import Any

from cluscomp_formats.errors import InvalidRequestError, Problem

__all__ = ["token_batch", "token_ids"]


def token_ids(value: Any) -> list[int]:
    """Return the ids of a sequence `[tokens]` or of a batch of one `[1, tokens]`. Raises InvalidRequestError otherwise."""
    ids = _items(value, value)
    if len(ids) == 1 and _is_sequence(ids[0]):
        ids = _items(ids[0], value)
    return [_token(token, value) for token in ids]


def token_batch(value: Any) -> list[list[int]]:
    """Return the ids of a batch `[batch, tokens]` of sequences of equal length. Raises InvalidRequestError otherwise."""
    rows = _items(value, value)
    if not rows or not all(map(_is_sequence, rows)):
        raise _error("bad_input", "wrong shape of input_ids", value, "[batch, tokens]")
    batch = [[_token(token, value) for token in _items(row, value)] for row in rows]
    lengths = sorted({len(row) for row in batch})
    if len(lengths) > 1:
        message, remedy = (
            "the sequences of a batch differ in length",
            "pass one sequence at a time: the model would attend to padding",
        )
        found = ", ".join(f"{length}" for length in lengths[:5]) + (", ..." if len(lengths) > 5 else "") + " tokens"
        raise InvalidRequestError(Problem("ragged_batch", message, found=found, expected="one length", remedy=remedy))
    return batch


def _plain(value: Any, whole: Any) -> Any:
    """Convert arrays, tensors and their scalars to Python values."""
    if not hasattr(value, "tolist"):
        return value
    try:
        return value.tolist()
    except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
        raise _error("bad_prompt", "the values of this tensor cannot be read", whole, "integer token ids") from error


def _is_sequence(value: Any) -> bool:
    if hasattr(value, "tolist"):
        return getattr(value, "ndim", 0) > 0
    return isinstance(value, Iterable) and not isinstance(value, (str, bytes, bytearray, Mapping, Set))


def _items(value: Any, whole: Any) -> list[Any]:
    if not _is_sequence(value):
        remedy = "pass its input_ids" if isinstance(value, Mapping) else None
        raise _error("bad_prompt", "the value is neither a text nor a sequence of token ids", whole, _EXPECTED, remedy)
    return list(_plain(value, whole))


def _token(value: Any, whole: Any) -> int:
    value = _plain(value, whole)
    # bool is a subclass of int; without this check, a mask would pass as ids.
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise _error("bad_prompt", f"{repr(value)[:50]} is not a token id", whole, _EXPECTED)
    return operator.index(value)


_EXPECTED = "a text, or integer token ids [tokens]"


def _error(kind: str, message: str, value: Any, expected: str, remedy: str | None = None) -> InvalidRequestError:
    shape = getattr(value, "shape", None)
    found = f"{type(value).__name__} of shape {tuple(shape)}" if shape is not None else repr(value)[:200]
    return InvalidRequestError(Problem(kind, message, found=found, expected=expected, remedy=remedy))
