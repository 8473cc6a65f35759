"""The constants of native GGUF files, version 1, and the storage of payloads. The specification is `docs/gguf-format.md`."""

from __future__ import annotations

import math

from cluscomp_formats.sections.payloads import Payload

__all__ = ["ALIGNMENT", "ARCHITECTURE", "ROW_ORDER", "VERSION", "stored_spec"]

ARCHITECTURE = "cluscomp"
"""`general.architecture`. With a name that llama.cpp knows, it would load the file and fail with confusing errors."""

VERSION = 1
ROW_ORDER = "huggingface"
"""Query and key rows are not permuted, unlike in stock Llama files."""

ALIGNMENT = 64
"""As in the packed format: each section is stored as a tensor."""

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
"""The ggml type that stores the bits of each dtype; ggml has no unsigned types."""


def stored_spec(payload: Payload) -> tuple[str, tuple[int, ...]]:
    """Return the ggml type and row-major shape of the tensor of a non-empty payload.

    Codes are a stream of bytes, except row-major ones of 16 bits; scalars and arrays of more than four dimensions are vectors.
    """
    if payload.code_bits is not None and (payload.code_bits < 16 or payload.order == "tiles"):
        return "I8", (payload.stored_bytes,)
    if 1 <= len(payload.shape) <= MAX_GGML_RANK:
        return GGML_TYPES[payload.dtype], payload.shape
    return GGML_TYPES[payload.dtype], (math.prod(payload.shape),)
