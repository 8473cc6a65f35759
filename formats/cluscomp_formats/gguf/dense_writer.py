"""Write dense GGUF files for stock llama.cpp: the model is decoded and requantised.

Each tensor is decoded to float32 and stored in one of ggml's types with gguf-py's quantisers, one tensor at a time.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from cluscomp_formats.architectures import TensorSpec
from cluscomp_formats.errors import InvalidRequestError, Problem, StorageError, UnsupportedError
from cluscomp_formats.files.atomic import atomic_write, check_output
from cluscomp_formats.format import Format
from cluscomp_formats.gguf.container import gguf_package
from cluscomp_formats.gguf.container_encoding import DirectoryEntry, Value, aligned, encode_header
from cluscomp_formats.gguf.hyperparameters import Hyperparameters, read_hyperparameters
from cluscomp_formats.gguf.placement import Placed, stored_tensors
from cluscomp_formats.gguf.rope import interleave_halves
from cluscomp_formats.gguf.tokenizer_metadata import (
    InexpressibleTokenizer,
    TokenizerMetadata,
    tokenizer_metadata,
    with_tokenizer_read,
)
from cluscomp_formats.ir import FLOAT_DTYPES, AnyArray, DenseTensor, Model, float32_to_bfloat16
from cluscomp_formats.progress import Progress, silent
from cluscomp_formats.sections.digest import check_claim
from cluscomp_formats.sections.payload_stream import SelfTest

__all__ = ["DENSE_TYPES", "DenseReport", "dense_format", "dense_gguf_notes", "dense_gguf_size", "write_dense_gguf"]


@dataclass(frozen=True)
class _DenseType:
    """A ggml type: weights and bytes per block, and its value of `general.file_type` (llama.cpp's `llama_ftype`)."""

    name: str
    block_weights: int
    block_bytes: int
    file_type: int


DENSE_TYPES = {
    dense_type.name.lower(): dense_type
    for dense_type in (
        _DenseType("F32", 1, 4, 0),
        _DenseType("F16", 1, 2, 1),
        _DenseType("BF16", 1, 2, 32),
        _DenseType("Q8_0", 32, 34, 7),
        _DenseType("Q4_0", 32, 18, 2),
        _DenseType("Q4_1", 32, 20, 3),
        _DenseType("Q5_0", 32, 22, 8),
        _DenseType("Q5_1", 32, 24, 9),
    )
}
"""The available types, by name."""

_ALIGNMENT = 32
_FURTHER_LAYERS = re.compile(r"(?:model\.)?mtp\..*")
_NAMED = 3
"""Largest number of tensors named in a note."""
_QUANTIZATION_VERSION = 2


@dataclass(frozen=True)
class DenseReport:
    """The result of writing. `kept_at_f16` names the tensors whose rows are not a multiple of the type's block size.

    A file without codebooks has no digest.
    """

    path: Path
    file_bytes: int
    num_tensors: int
    kept_at_f16: tuple[str, ...]
    digest: None = None


@dataclass(frozen=True)
class _Planned:
    """A tensor to write: its name in the file, the tensors of the model in it, its type."""

    stored_name: str
    place: Placed
    dense_type: _DenseType

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.place.shape)) // self.dense_type.block_weights * self.dense_type.block_bytes


def dense_format(native: Format, gguf_type: str) -> Format:
    """Return the `native` format with `write_dense_gguf` as its writer. Raises InvalidRequestError if the type is unknown."""
    if gguf_type not in DENSE_TYPES:
        found, expected = repr(gguf_type)[:200], ", ".join(DENSE_TYPES)
        raise InvalidRequestError(Problem("bad_option", "unknown GGUF type", found=found, expected=expected))

    def write(model: Model, path: Path, *, force: bool, self_test: SelfTest | None, on_progress: Progress) -> DenseReport:
        return write_dense_gguf(model, path, gguf_type=gguf_type, force=force, on_progress=on_progress)

    size = functools.partial(dense_gguf_size, gguf_type=gguf_type)
    return replace(native, write=write, size=size, notes=functools.partial(dense_gguf_notes, gguf_type=gguf_type))


def write_dense_gguf(
    model: Model, path: Path, *, gguf_type: str = "f16", force: bool = False, on_progress: Progress = silent
) -> DenseReport:
    """Write `model`, clustered or not, as a dense GGUF file that stock llama.cpp runs, atomically.

    Matrices are stored as `gguf_type`, a key of `DENSE_TYPES`, or as F16 if their rows are not a multiple of its block size;
    vectors are stored as F32. `on_progress` is called with bytes done and in total. One decoded tensor is in memory at a time.

    Raises OutputExistsError if the output exists and `force` is False; StorageError if the system refuses to read or write;
    InvalidRequestError if the type is unknown, a tensor is missing, or weights are not finite in the type; UnsupportedError if
    llama.cpp does not support the architecture, configuration or tokenizer, or without the package gguf; InvalidFileError if
    the model's digest does not match its recorded one, which requires reading the model once more.
    """
    if gguf_type not in DENSE_TYPES:
        expected = ", ".join(DENSE_TYPES)
        raise InvalidRequestError(Problem("unknown_type", "unknown GGUF type", None, None, repr(gguf_type), expected))
    check_output(path, force=force)
    gguf_package()
    hyperparameters = read_hyperparameters(model.config)
    model = with_tokenizer_read(model, path)
    planned = _plan(model, hyperparameters, DENSE_TYPES[gguf_type], str(path))
    header, entries, total = _layout(model, hyperparameters, planned, DENSE_TYPES[gguf_type], str(path))
    if model.claimed_digest is not None:
        # Writing dense tensors does not compute the model's digest.
        check_claim(model, model.digest())
    with atomic_write(path, force=force) as stream:
        stream.write(header.ljust(aligned(len(header), _ALIGNMENT), b"\0"))
        start = stream.tell()
        for values, complete in _contents(model, hyperparameters, planned, str(path)):
            stream.write(values.tobytes())
            if complete:
                stream.write(bytes(aligned(stream.tell(), _ALIGNMENT) - stream.tell()))
            on_progress("writing", stream.tell() - start, total)
        file_bytes = stream.tell()
    return DenseReport(path, file_bytes, len(entries), _kept_at_f16(planned, DENSE_TYPES[gguf_type]))


def _kept_at_f16(planned: list[_Planned], asked: _DenseType) -> tuple[str, ...]:
    kept = DENSE_TYPES["f16"]
    return tuple(name for item in planned if item.dense_type is kept and asked is not kept for name in item.place.names)


def dense_gguf_size(model: Model, gguf_type: str) -> int:
    """Return the bytes of the file of `write_dense_gguf`; reads only the tokenizer. Raises that function's early errors."""
    gguf_package()
    hyperparameters = read_hyperparameters(model.config)
    planned = _plan(model, hyperparameters, DENSE_TYPES[gguf_type], "")
    header, _, total = _layout(model, hyperparameters, planned, DENSE_TYPES[gguf_type], "")
    return aligned(len(header), _ALIGNMENT) + total


def dense_gguf_notes(model: Model, gguf_type: str) -> tuple[str, ...]:
    """Return notes on what the file of `write_dense_gguf` omits or stores differently than requested.

    Raises the errors of `write_dense_gguf` that occur before it writes.
    """
    hyperparameters = read_hyperparameters(model.config)
    notes = [*_tokenizer(model, hyperparameters, "").notes]
    kept = _kept_at_f16(_plan(model, hyperparameters, DENSE_TYPES[gguf_type], ""), DENSE_TYPES[gguf_type])
    if kept:
        named = ", ".join(kept[:_NAMED]) + (f" and {len(kept) - _NAMED} more" if len(kept) > _NAMED else "")
        notes.append(f"{len(kept)} tensors are stored as f16: their rows are not whole blocks of {gguf_type}: {named}")
    further = [name for name in model.tensors if _FURTHER_LAYERS.fullmatch(name)]
    if further:
        notes.append(f"{len(further)} tensors of layers for multi-token prediction are omitted: {further[0]}, ...")
    return tuple(notes)


def _layout(
    model: Model, hyperparameters: Hyperparameters, planned: list[_Planned], asked: _DenseType, file: str
) -> tuple[bytes, list[DirectoryEntry], int]:
    """Return the header, its tensors, and the bytes of the data after it."""
    divisors = hyperparameters.rope_divisors
    sizes = [("rope_freqs.weight", divisors.shape, "F32", divisors.nbytes)] if divisors is not None else []
    sizes += [(item.stored_name, item.place.shape, item.dense_type.name, item.nbytes) for item in planned]
    entries, total = [], 0
    for name, shape, type_name, nbytes in sizes:
        entries.append(DirectoryEntry(name, shape, type_name, total))
        total += aligned(nbytes, _ALIGNMENT)
    return encode_header(_metadata(model, hyperparameters, asked, file), entries), entries, total


def _plan(model: Model, hyperparameters: Hyperparameters, asked: _DenseType, file: str) -> list[_Planned]:
    """Return the tensors to write, in order. Raises InvalidRequestError or UnsupportedError with all unsuitable tensors."""
    description = hyperparameters.description
    head_name = description.head.weight
    if description.num_layers > len(model.tensors):
        found, wanted = f"{description.num_layers} layers", f"no more than its {len(model.tensors)} tensors"
        raise UnsupportedError(Problem("missing_tensor", "most layers of the model are missing", file, None, found, wanted))
    # If the model has a head tensor, it is used even if the head is tied, in our runtime as in llama.cpp.
    expected = stored_tensors(description, head=not description.tied or head_name in model.tensors)
    problems = []
    for spec in (part for place in expected.values() for part in place.parts):
        tensor = model.tensors.get(spec.name)
        if tensor is None:
            message, remedy = "a tensor that the configuration requires is missing", None
            if spec.name == head_name:
                message = "the model has no head, not even a tied one; llama.cpp would use the embedding as its head"
                remedy = "write another format, such as packed"
            problems.append(Problem("missing_tensor", message, file, spec.name, remedy=remedy))
        elif tensor.shape != spec.shape:
            found, wanted = str(list(tensor.shape)), str(list(spec.shape))
            message = "the tensor's shape contradicts the configuration"
            problems.append(Problem("wrong_shape", message, file, spec.name, found, wanted))
        elif isinstance(tensor, DenseTensor) and tensor.values.dtype not in FLOAT_DTYPES:
            found, wanted = tensor.values.dtype, ", ".join(FLOAT_DTYPES)
            problems.append(Problem("wrong_dtype", "not a float", file, spec.name, found, wanted))
    if problems:
        raise InvalidRequestError(problems)
    # Old checkpoints store the rotary frequencies, which can be computed from the configuration.
    placed = {name for place in expected.values() for name in place.names}
    others = [name for name in sorted(model.tensors) if name not in placed and not name.endswith("rotary_emb.inv_freq")]
    unknown = [name for name in others if not _FURTHER_LAYERS.fullmatch(name)]
    if unknown:
        message = "llama.cpp has no place for this tensor; running without it could give wrong results"
        raise UnsupportedError([Problem("unused_tensor", message, file, name) for name in unknown])
    return [_Planned(name, place, _type_for(place.parts[0], asked)) for name, place in expected.items()]


def _type_for(spec: TensorSpec, asked: _DenseType) -> _DenseType:
    # Routers are float32 in the files of llama.cpp's converter, too.
    if len(spec.shape) == 1 or spec.role == "router":
        return DENSE_TYPES["f32"]
    return asked if spec.shape[-1] % asked.block_weights == 0 else DENSE_TYPES["f16"]


def _metadata(model: Model, hyperparameters: Hyperparameters, asked: _DenseType, file: str) -> dict[str, Value]:
    values = {
        "general.architecture": Value("string", hyperparameters.architecture),
        "general.type": Value("string", "model"),
        "general.file_type": Value("uint32", asked.file_type),
        "general.quantization_version": Value("uint32", _QUANTIZATION_VERSION),
    }
    name = model.provenance.get("name")
    if isinstance(name, str) and name:
        values["general.name"] = Value("string", name)
    return {**values, **hyperparameters.metadata, **_tokenizer(model, hyperparameters, file).values}


def _tokenizer(model: Model, hyperparameters: Hyperparameters, file: str) -> TokenizerMetadata:
    try:
        return tokenizer_metadata(model, hyperparameters.description.vocab_size)
    except InexpressibleTokenizer as reason:
        message = f"llama.cpp cannot express the tokenizer: {reason}"
        remedy = "write another format, such as packed, or the native flavour of GGUF"
        raise UnsupportedError(Problem("tokenizer", message, file, "tokenizer.json", remedy=remedy)) from reason


def _contents(
    model: Model, hyperparameters: Hyperparameters, planned: list[_Planned], file: str
) -> Iterator[tuple[AnyArray, bool]]:
    """Yield the stored bytes of each tensor of the model, in order, and whether they complete a tensor of the file."""
    if hyperparameters.rope_divisors is not None:
        yield hyperparameters.rope_divisors, True
    for item in planned:
        for spec in item.place.parts:
            try:
                weight = model.tensors[spec.name].decode()
            except OSError as error:
                message = f"the tensor cannot be read: {error.strerror or error}"
                raise StorageError(Problem("source_unreadable", message, error.filename, spec.name)) from error
            if spec.permuted_heads is not None:
                weight = interleave_halves(weight, spec.permuted_heads)
            if spec.offset:
                weight = weight + np.float32(spec.offset)
            yield _stored(weight, spec.name, item.dense_type, file), spec is item.place.parts[-1]


def _stored(weight: AnyArray, name: str, dense_type: _DenseType, file: str) -> AnyArray:
    """Convert float32 to a type. Raises InvalidRequestError if a value is not finite in that type."""
    type_name = dense_type.name
    stored: Any = weight
    with np.errstate(over="ignore"):
        if type_name == "F16":
            stored = weight.astype(np.float16)
    if not np.isfinite(stored).all():
        largest = f"largest magnitude {float(np.abs(weight).max()):g}"
        remedy = "choose bf16 or f32" if np.isfinite(weight).all() else "the model is faulty"
        message = f"the weight has values that are not finite as {type_name}"
        raise InvalidRequestError(Problem("not_finite", message, file, name, largest, "finite values", remedy))
    if type_name == "BF16":
        return float32_to_bfloat16(weight)
    if dense_type.block_weights == 1:
        return np.asarray(stored)
    gguf = gguf_package()
    return np.asarray(gguf.quants.quantize(weight, gguf.GGMLQuantizationType[type_name]))
