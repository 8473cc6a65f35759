"""Infinity and NaN in configurations. JSON does not have them.

Python reads and writes them as bare words. So did transformers; since version 5 it writes `{"__float__": "Infinity"}`. That is
valid JSON, so configurations have this form here: it has a digest, and every format can store it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

__all__ = ["load_config", "with_floats"]

_TAG = "__float__"
_NAMES = {math.inf: "Infinity", -math.inf: "-Infinity"}


def load_config(text: str | bytes) -> Any:
    """`json.loads`, with every number that is not finite in transformers' form. Raises ValueError, RecursionError."""
    return json.loads(text, parse_constant=_tagged, parse_float=_finite)


def _tagged(name: str) -> dict[str, str]:
    return {_TAG: name}


def _finite(digits: str) -> float | dict[str, str]:
    """1e999 is a number in JSON, but every reader makes infinity of it."""
    number = float(digits)
    return number if math.isfinite(number) else _tagged(_NAMES[number])


def with_floats(config: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a configuration with the numbers themselves, as transformers' `from_dict` takes it."""
    return {key: _decoded(value) for key, value in config.items()}


def _decoded(value: Any) -> Any:
    if isinstance(value, Mapping):
        tag = value.get(_TAG)
        if len(value) == 1 and tag in ("Infinity", "-Infinity", "NaN"):
            return float(tag)
        return with_floats(value)
    return [_decoded(item) for item in value] if isinstance(value, list) else value
