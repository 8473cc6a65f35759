"""Encode the GGUF container: metadata and tensor directory, version 3, little-endian.

Source: the GGUF specification (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md).
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from cluscomp_formats.gguf.container import MAGIC

__all__ = ["MAX_TENSOR_NAME_BYTES", "DirectoryEntry", "Value", "aligned", "encode_header"]

MAX_TENSOR_NAME_BYTES = 63
"""ggml stores names in 64 bytes, including a terminating zero."""

_VERSION = 3
_ARRAY = 9
_TYPE_NUMBERS = {"uint32": 4, "int32": 5, "float32": 6, "bool": 7, "string": 8, "uint64": 10}
_STRUCT_CODES = {"uint32": "I", "int32": "i", "float32": "f", "bool": "?", "uint64": "Q"}
_TENSOR_TYPES = {
    "F32": 0,
    "F16": 1,
    "Q4_0": 2,
    "Q4_1": 3,
    "Q5_0": 6,
    "Q5_1": 7,
    "Q8_0": 8,
    "I8": 24,
    "I16": 25,
    "I32": 26,
    "I64": 27,
    "F64": 28,
    "BF16": 30,
}
"""Numbers of the ggml types in written files."""

Scalar = bool | int | float | str


@dataclass(frozen=True)
class Value:
    """A metadata value of a GGUF type; a list is stored as an array of that type."""

    kind: Literal["uint32", "int32", "float32", "bool", "string", "uint64"]
    content: Scalar | Sequence[Scalar]


@dataclass(frozen=True)
class DirectoryEntry:
    """An entry of the tensor directory: row-major shape, name of the ggml type, offset in the data section in bytes."""

    name: str
    shape: tuple[int, ...]
    type_name: str
    offset: int


def aligned(offset: int, alignment: int) -> int:
    """Return `offset` rounded up to a multiple of `alignment`, both in bytes."""
    return -(-offset // alignment) * alignment


def encode_header(metadata: Mapping[str, Value], entries: Sequence[DirectoryEntry]) -> bytes:
    """Return the bytes before the data section, without the padding between them."""
    parts = [MAGIC, struct.pack("<IQQ", _VERSION, len(entries), len(metadata))]
    for key, value in metadata.items():
        parts += [_string(key), _value(value)]
    for entry in entries:
        # ggml stores the fastest-varying dimension first.
        dimensions = struct.pack(f"<I{len(entry.shape)}Q", len(entry.shape), *entry.shape[::-1])
        parts += [_string(entry.name), dimensions, struct.pack("<IQ", _TENSOR_TYPES[entry.type_name], entry.offset)]
    return b"".join(parts)


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _value(value: Value) -> bytes:
    number = _TYPE_NUMBERS[value.kind]
    if isinstance(value.content, str):
        return struct.pack("<I", number) + _string(value.content)
    if not isinstance(value.content, Sequence):
        return struct.pack(f"<I{_STRUCT_CODES[value.kind]}", number, value.content)
    head = struct.pack("<IIQ", _ARRAY, number, len(value.content))
    if value.kind == "string":
        return head + b"".join(_string(str(item)) for item in value.content)
    return head + struct.pack(f"<{len(value.content)}{_STRUCT_CODES[value.kind]}", *value.content)
