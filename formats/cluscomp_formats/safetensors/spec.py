"""The entry of an array in a header, and the names of dtypes."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["LENGTH_BYTES", "MAX_HEADER_BYTES", "METADATA", "STORED_NAMES", "Entry"]

LENGTH_BYTES = 8
MAX_HEADER_BYTES = 100_000_000
"""Limit of the safetensors library."""

STORED_NAMES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint64": "U64",
    "uint32": "U32",
    "uint16": "U16",
    "uint8": "U8",
    "bool": "BOOL",
}

METADATA = "__metadata__"
"""The member of the header that is not an array."""


@dataclass(frozen=True)
class Entry:
    """An array in a file: dtype (a key of `DTYPES`), shape, and begin and end in bytes from the start of the data."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int
