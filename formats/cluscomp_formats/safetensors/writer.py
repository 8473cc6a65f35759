"""Write the header of a safetensors file; the arrays must follow in the order of `lay_out`, without gaps."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from cluscomp_formats.ir import DTYPES
from cluscomp_formats.safetensors.spec import LENGTH_BYTES, METADATA, STORED_NAMES, Entry
from cluscomp_formats.strict_json import canonical_json

__all__ = ["header_bytes", "lay_out"]


def lay_out(specs: Mapping[str, tuple[str, tuple[int, ...]]]) -> dict[str, Entry]:
    """Return the entries of arrays in file order: arrays of wide items first, which aligns all arrays without gaps.

    `specs` has the dtype (a key of `DTYPES`) and shape of each array by name.
    """
    entries: dict[str, Entry] = {}
    position = 0
    for name, (dtype, shape) in sorted(specs.items(), key=lambda spec: -DTYPES[spec[1][0]].itemsize):
        end = position + math.prod(shape) * DTYPES[dtype].itemsize
        entries[name] = Entry(dtype, shape, position, end)
        position = end
    return entries


# transformers only opens files whose metadata names a framework.
_FOR_TRANSFORMERS = {"format": "pt"}


def header_bytes(entries: Mapping[str, Entry], metadata: Mapping[str, str] = _FOR_TRANSFORMERS) -> bytes:
    """Return the length and the header, padded with spaces so that the data begins at a multiple of 8 bytes."""
    value: dict[str, Any] = {
        name: {"dtype": STORED_NAMES[entry.dtype], "shape": entry.shape, "data_offsets": [entry.begin, entry.end]}
        for name, entry in entries.items()
    }
    text = canonical_json({**value, METADATA: dict(metadata)}).encode()
    text += b" " * (-len(text) % LENGTH_BYTES)
    return len(text).to_bytes(LENGTH_BYTES, "little") + text
