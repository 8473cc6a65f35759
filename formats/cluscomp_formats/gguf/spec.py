"""The constants of the native GGUF flavour, version 1, and how a payload is stored. The specification is
`docs/gguf-format.md`."""

from __future__ import annotations

import math

from cluscomp_formats.sections.payloads import Payload

__all__ = ["ALIGNMENT", "ARCHITECTURE", "ROW_ORDER", "VERSION", "stored_form"]

ARCHITECTURE = "cluscomp"
"""`general.architecture`. Under a name llama.cpp knows it would load the file and fail in ways that confuse."""

VERSION = 1
ROW_ORDER = "huggingface"
"""Query and key rows are not permuted, unlike in stock Llama files."""

ALIGNMENT = 64
"""As in the packed format, whose sections the tensors are."""

MAX_GGML_RANK = 4

GGML_TYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint64": "I64",
    "uint32": "I32",
    "uint16": "I16",
    "uint8": "I8",
    "bool": "I8",
}
"""The ggml type that carries the bits of each dtype; ggml has no unsigned types."""


def stored_form(payload: Payload) -> tuple[str, tuple[int, ...]]:
    """ggml type and row-major shape of the tensor that holds a payload that is not empty.

    Codes narrower than 16 bits are a stream of bytes; scalars and arrays of more than four dimensions are vectors.
    """
    if payload.code_bits is not None and payload.code_bits < 16:
        return "I8", (payload.stored_bytes,)
    if 1 <= len(payload.shape) <= MAX_GGML_RANK:
        return GGML_TYPES[payload.dtype], payload.shape
    return GGML_TYPES[payload.dtype], (math.prod(payload.shape),)
