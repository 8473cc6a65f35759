"""Side files that must be JSON objects."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from cluscomp_formats.errors import InvalidFileError, Problem
from cluscomp_formats.ir import Array

__all__ = ["read_json_file"]


def read_json_file(files: Mapping[str, Array], name: str) -> dict[str, Any]:
    """Return a side file that must be a JSON object, empty if there is no such file. Raises InvalidFileError if malformed."""
    if name not in files:
        return {}
    try:
        value = json.loads(files[name].read().tobytes())
    except (ValueError, RecursionError) as error:
        raise InvalidFileError(Problem("bad_json", f"not valid JSON: {error}", name)) from error
    if not isinstance(value, dict):
        raise InvalidFileError(Problem("bad_json", "not a JSON object", name, found=type(value).__name__, expected="object"))
    return value
