"""GGUF files, whole or split, as dense models under Hugging Face names."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cluscomp_export.sources.gguf.architectures import build_config, description_of, find_architecture
from cluscomp_export.sources.gguf.decoding import check_decodable, lazy_array, part_of
from cluscomp_export.sources.gguf.tokenizer import UnsupportedTokenizer, build_generation_config, build_tokenizer
from cluscomp_formats.errors import InvalidFileError, Problem, UnsupportedError
from cluscomp_formats.files.regular_file import first_bytes
from cluscomp_formats.gguf.container import MAGIC, Container, StoredTensor, read_container
from cluscomp_formats.gguf.placement import Placed, stored_tensors
from cluscomp_formats.ir import Array, DenseTensor, Model

__all__ = ["gguf_parts", "is_gguf", "model_of", "read_gguf"]

_SPLIT_NAME = re.compile(r"(?P<stem>.+)-(?P<part>\d{5})-of-(?P<count>\d{5})\.gguf")

_ROPE_DIVISORS = "rope_freqs.weight"
_UNUSED = re.compile(r"blk\.\d+\.attn_rot_embd(?:\.weight)?")
"""Rotary frequencies written by old converters; every reader computes them."""

_NAMED = 8
"""Tensors named in a message, at most."""


def is_gguf(path: Path) -> bool:
    """Whether it is a file that begins like a GGUF file. Never raises."""
    return first_bytes(path, len(MAGIC)) == MAGIC


def gguf_parts(path: Path) -> list[Path]:
    """All parts of the split model that `path` belongs to, in order, even if missing; only `path` if it is not split."""
    match = _SPLIT_NAME.fullmatch(path.name)
    count = int(match["count"]) if match else 0
    if match is None or not 1 <= int(match["part"]) <= count:
        return [path]
    return [path.with_name(f"{match['stem']}-{part:05d}-of-{count:05d}.gguf") for part in range(1, count + 1)]


def model_of(path: Path, container: Container) -> Model:
    """The model in the result of `read_gguf(path)`.

    Plain tensors keep their dtype, quantised ones are decoded to float32 when they are read. Raises InvalidFileError for
    contradictory files; UnsupportedError for architectures and types that are not supported.
    """
    file, metadata, stored = str(path), container.metadata, container.tensors
    family = find_architecture(file, metadata)
    check_decodable(list(stored.values()))
    divisors = lazy_array(stored[_ROPE_DIVISORS]).to_float32() if _ROPE_DIVISORS in stored else None
    config = build_config(file, family, metadata, stored, divisors)
    expected = stored_tensors(description_of(file, config), head=not config["tie_word_embeddings"])
    _check_tensors(file, expected, stored)

    tensors = {}
    stored_bits = {}
    for gguf_name, place in expected.items():
        tensor = stored[gguf_name]
        for spec in place.parts:
            tensors[spec.name] = DenseTensor(spec.name, part_of(tensor, spec))
            if tensor.bits_per_weight < 16:
                stored_bits[spec.name] = tensor.bits_per_weight
    files, tokenizer = _tokenizer(metadata)
    provenance = {
        "format": "gguf",
        "architecture": family.gguf,
        "name": _text(metadata, "general.name"),
        "types": dict(sorted(Counter(tensor.type_name for tensor in stored.values()).items())),
        "weight_bytes": sum(tensor.nbytes for tensor in stored.values()),
        "stored_bits": stored_bits,
        "tokenizer": tokenizer,
    }
    return Model(config, tensors, files, provenance)


def _tokenizer(metadata: Mapping[str, Any]) -> tuple[dict[str, Array], str]:
    """The tokenizer's files, and a note that describes it or says why there is none."""
    built = build_generation_config(metadata)
    try:
        built |= build_tokenizer(metadata)
        what = " ".join(_text(metadata, f"tokenizer.ggml.{key}") for key in ("model", "pre")).strip()
    except UnsupportedTokenizer as reason:
        what = f"unsupported: {reason}"
    return {name: Array.of(np.frombuffer(content, dtype=np.uint8)) for name, content in built.items()}, what


def _text(metadata: Mapping[str, Any], key: str) -> str:
    """A text of the metadata with invalid UTF-8 replaced; empty if it is missing."""
    value = metadata.get(key)
    return value.encode("utf-8", "surrogateescape").decode("utf-8", "replace") if isinstance(value, str) else ""


def read_gguf(path: Path) -> Container:
    """Parse a GGUF file, or all parts of the model if `path` is any part of a split one; no tensor is read.

    Metadata comes from the first part, as in llama.cpp. Raises InvalidFileError for truncated or damaged files and missing
    parts; UnsupportedError for versions, byte orders and tensor types that are not supported.
    """
    parts = gguf_parts(path)
    if len(parts) == 1:
        container = read_container(path)
        declared = container.metadata.get("split.count", 1) or 1
        if declared != 1:
            remedy = "rename the parts to NAME-00001-of-0000N.gguf"
            message = "a part of a split model without the name of a part"
            raise UnsupportedError(Problem("split_name", message, str(path), None, path.name, f"{declared} parts", remedy))
        return container
    missing = [part for part in parts if not os.path.lexists(part)]
    if missing:
        remedy = "download this part of the model"
        raise InvalidFileError([Problem("missing", "no such file", str(part), remedy=remedy) for part in missing])
    containers = [read_container(part) for part in parts]
    problems = []
    tensors: dict[str, StoredTensor] = {}
    for number, (part, container) in enumerate(zip(parts, containers, strict=True)):
        place = (container.metadata.get("split.no"), container.metadata.get("split.count"))
        if place != (number, len(parts)):
            message = "the number in the part does not match its name"
            expected = f"part {number} of {len(parts)}"
            problems.append(Problem("bad_split", message, str(part), None, f"part {place[0]} of {place[1]}", expected))
        message = "two parts contain a tensor of this name"
        twice = sorted(tensors.keys() & container.tensors.keys())
        problems.extend(Problem("duplicate_tensor", message, str(part), name) for name in twice)
        tensors.update(container.tensors)
    total = containers[0].metadata.get("split.tensors.count", len(tensors))
    if total != len(tensors):
        message = "the parts do not contain all tensors of the model"
        problems.append(Problem("missing_tensor", message, str(path), None, str(len(tensors)), str(total)))
    if problems:
        raise InvalidFileError(problems)
    return Container(containers[0].metadata, tensors)


def _check_tensors(file: str, expected: Mapping[str, Placed], stored: Mapping[str, StoredTensor]) -> None:
    """Check the stored tensors against those of the architecture. Raises InvalidFileError, UnsupportedError."""
    problems = []
    for name, place in expected.items():
        tensor = stored.get(name)
        if tensor is None:
            message = "a tensor of the architecture is missing"
            problems.append(Problem("missing_tensor", message, file, name, "nothing", str(list(place.shape))))
        elif tensor.shape != place.shape:
            message = "the tensor's shape contradicts the metadata"
            problems.append(Problem("wrong_shape", message, file, name, str(list(tensor.shape)), str(list(place.shape))))
    if problems:
        raise InvalidFileError(problems)
    unknown = [name for name in stored if name not in expected and name != _ROPE_DIVISORS and not _UNUSED.fullmatch(name)]
    if unknown:
        found = ", ".join(unknown[:_NAMED]) + (f" and {len(unknown) - _NAMED} more" if len(unknown) > _NAMED else "")
        message = "tensors that the Hugging Face model of this architecture does not have"
        remedy = "use the Hugging Face checkpoint of this model"
        raise UnsupportedError(Problem("unknown_tensor", message, file, None, found, None, remedy))
