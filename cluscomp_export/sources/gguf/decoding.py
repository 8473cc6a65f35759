"""Payloads of GGUF tensors as lazy arrays: plain types unchanged, quantised types decoded to float32 by gguf-py.

llama.cpp's converter stores the rows of the query and key projections of Llama models in another order: within each head,
the two halves that rotary embedding pairs up are interleaved, `stored[2 i + j] = original[j * head_dim / 2 + i]`. Given the
number of heads, the rows are restored to the order of Hugging Face.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from cluscomp_formats.architectures import TensorSpec
from cluscomp_formats.errors import Problem, UnsupportedError
from cluscomp_formats.files.stored_file import read_again
from cluscomp_formats.gguf.container import StoredTensor, gguf_package
from cluscomp_formats.ir import DTYPES, AnyArray, Array

__all__ = ["PLAIN_DTYPES", "check_decodable", "lazy_array", "part_of", "undo_rope_permutation"]

PLAIN_DTYPES = {
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F64": "float64",
    "I8": "int8",
    "I16": "int16",
    "I32": "int32",
    "I64": "int64",
}
"""ggml types that are not quantised, and the IR dtype of each."""


def check_decodable(tensors: list[StoredTensor]) -> None:
    """Decode one block of zeros of each quantised type. Raises UnsupportedError naming the types gguf-py cannot decode."""
    gguf = gguf_package()
    problems = []
    seen: set[str] = set(PLAIN_DTYPES)
    for tensor in tensors:
        if tensor.type_name in seen:
            continue
        seen.add(tensor.type_name)
        ggml_type = gguf.GGMLQuantizationType(tensor.type_number)
        block = np.zeros((1, gguf.GGML_QUANT_SIZES[ggml_type][1]), dtype=np.uint8)
        try:
            gguf.quants.dequantize(block, ggml_type)
        except NotImplementedError:
            message, remedy = "gguf-py cannot decode this type", "convert the model to another type, such as Q8_0 or F16"
            where = (str(tensor.path), tensor.name)
            problems.append(Problem("unsupported_type", message, *where, found=tensor.type_name, remedy=remedy))
    if problems:
        raise UnsupportedError(problems)


def lazy_array(tensor: StoredTensor) -> Array:
    """The tensor as an Array, unchanged."""
    return Array(tensor.shape, PLAIN_DTYPES.get(tensor.type_name, "float32"), lambda: _load(tensor))


def part_of(tensor: StoredTensor, spec: TensorSpec) -> Array:
    """A tensor of the model, which the stored one is or, in a stack of experts, contains."""
    if spec.expert is not None:
        length = tensor.nbytes // tensor.shape[0]
        tensor = replace(tensor, shape=tensor.shape[1:], offset=tensor.offset + spec.expert * length, nbytes=length)
    stored, heads = lazy_array(tensor), spec.permuted_heads
    if heads is not None:
        return Array(stored.shape, stored.dtype, lambda: undo_rope_permutation(_load(tensor), heads))
    if spec.offset:
        return Array(stored.shape, "float32", lambda: stored.to_float32() - np.float32(spec.offset))
    return stored


def _load(tensor: StoredTensor) -> AnyArray:
    plain = PLAIN_DTYPES.get(tensor.type_name)
    if plain is not None:
        return _mapped(tensor, DTYPES[plain], tensor.shape)
    gguf = gguf_package()
    rows = tensor.shape[:-1]
    blocks = _mapped(tensor, np.dtype(np.uint8), (*rows, tensor.nbytes // math.prod(rows)))
    # Scales of a damaged or untrusted file may be infinite; the caller decides about such weights.
    with np.errstate(all="ignore"):
        values: AnyArray = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType(tensor.type_number))
    return values.reshape(tensor.shape)


def _mapped(tensor: StoredTensor, dtype: np.dtype[np.generic], shape: tuple[int, ...]) -> AnyArray:
    content = read_again(tensor.path, tensor.stamp, tensor.offset, tensor.nbytes, tensor.name)
    values: AnyArray = content.view(dtype).reshape(shape)
    return values if values.flags.aligned else values.copy()


def undo_rope_permutation(values: AnyArray, num_heads: int) -> AnyArray:
    """Rows `[num_heads * head_dim, ...]` from the interleaved order of GGUF Llama files back to the order of Hugging Face."""
    pairs = values.reshape(num_heads, values.shape[0] // num_heads // 2, 2, *values.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(values.shape)
