"""The constants of the ONNX format, version 1, and the storage of payloads. The specification is `docs/onnx-format.md`."""

from __future__ import annotations

from dataclasses import replace

from cluscomp_formats.sections.header import ALIGNMENT
from cluscomp_formats.sections.payloads import Payload

__all__ = [
    "CONFIG",
    "DATA_FILE",
    "DOMAIN",
    "DOMAIN_VERSION",
    "ELEMENT_TYPES",
    "IR_VERSION",
    "MAX_ENTRIES",
    "MAX_MODEL_BYTES",
    "METADATA_KEYS",
    "METADATA_PREFIX",
    "MODEL_FILE",
    "OPSET",
    "OPTIONAL_METADATA_KEYS",
    "SUBFOLDER",
    "VERSION",
    "data_offset",
    "stored_spec",
]

VERSION = 1
DOMAIN = "ai.cluscomp"
DOMAIN_VERSION = 1
OPSET = 21
"""Version of the standard operators."""

IR_VERSION = 10
"""IR version that was released with this opset."""

# The layout Optimum and transformers.js expect.
SUBFOLDER = "onnx"
MODEL_FILE = "model.onnx"
DATA_FILE = "model.onnx_data"
CONFIG = "config.json"

MAX_MODEL_BYTES = 1 << 24
"""Limit of `model.onnx`, which has no weights; parsing can take a hundred times as much memory."""

MAX_ENTRIES = MAX_MODEL_BYTES // 32
"""Limit of the entries of each list, and of nodes and attributes together; entries with names are longer than 32 bytes."""

PAGE = 4096
"""Arrays of this many bytes or more begin on a page, so that a runtime can map them."""

METADATA_PREFIX = "cluscomp."
METADATA_KEYS = ("config", "crc32", "digest", "files", "layout", "provenance", "sections", "version")
OPTIONAL_METADATA_KEYS = ("self_test",)
"""The keys of `metadata_props`, without their prefix, as in the specification's table."""

ELEMENT_TYPES = {
    "float64": 11,
    "float32": 1,
    "float16": 10,
    "bfloat16": 16,
    "int64": 7,
    "int32": 6,
    "int16": 5,
    "int8": 3,
    "uint64": 13,
    "uint32": 12,
    "uint16": 4,
    "uint8": 2,
    "bool": 9,
}
"""ONNX element types, by dtype."""


def stored_spec(payload: Payload) -> tuple[Payload, str, tuple[int, ...]]:
    """Return the payload as this format stores it, and its stored dtype and shape.

    Codes are stored as planes of bytes, `[width, across, groups]`: the low bytes and, for more than 256 clusters, the high
    bytes. Runtimes in browsers do not support uint16, and all runtimes combine planes faster than neighbouring bytes.
    """
    if payload.code_bits is None:
        return payload, payload.dtype, payload.shape
    wide = payload.code_bits > 8
    stored = replace(payload, code_bits=16 if wide else 8, order="planes" if wide else "rows")
    return stored, "uint8", (1 + wide, *payload.shape)


def data_offset(end: int, length: int) -> int:
    """Return the offset of an array of `length` bytes in the data file, if the previous array ends at `end`."""
    alignment = PAGE if length >= PAGE else ALIGNMENT
    return -(-end // alignment) * alignment
