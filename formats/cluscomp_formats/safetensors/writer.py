"""The start of a safetensors file; the arrays follow in the order of `lay_out`, one after the other."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from cluscomp_formats.ir import DTYPES
from cluscomp_formats.safetensors.spec import LENGTH_BYTES, METADATA, STORED_NAMES, Entry
from cluscomp_formats.strict_json import canonical_json

__all__ = ["header_bytes", "lay_out"]


def lay_out(specs: Mapping[str, tuple[str, tuple[int, ...]]]) -> dict[str, Entry]:
    """Where arrays lie, in this order: wide items before narrow ones, which aligns all of them without a hole.

    `specs` has the dtype, a key of `DTYPES`, and shape of each array by name.
    """
    entries: dict[str, Entry] = {}
    position = 0
    for name, (dtype, shape) in sorted(specs.items(), key=lambda spec: -DTYPES[spec[1][0]].itemsize):
        end = position + math.prod(shape) * DTYPES[dtype].itemsize
        entries[name] = Entry(dtype, shape, position, end)
        position = end
    return entries


# transformers opens only files that name the framework they were written for.
_FOR_TRANSFORMERS = {"format": "pt"}


def header_bytes(entries: Mapping[str, Entry], metadata: Mapping[str, str] = _FOR_TRANSFORMERS) -> bytes:
    """The start of a file: length and header, padded with spaces so that the data begins at a multiple of 8."""
    value: dict[str, Any] = {
        name: {"dtype": STORED_NAMES[entry.dtype], "shape": entry.shape, "data_offsets": [entry.begin, entry.end]}
        for name, entry in entries.items()
    }
    text = canonical_json({**value, METADATA: dict(metadata)}).encode()
    text += b" " * (-len(text) % LENGTH_BYTES)
    return len(text).to_bytes(LENGTH_BYTES, "little") + text
