"""Write native GGUF files: the sections of the packed format as GGUF tensors, their description in the metadata."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from cluscomp_formats.errors import ClusCompError, InvalidRequestError
from cluscomp_formats.files.atomic import atomic_write, check_output
from cluscomp_formats.gguf.container_encoding import DirectoryEntry, Value, aligned, encode_header
from cluscomp_formats.gguf.hyperparameters import base_architecture, read_hyperparameters
from cluscomp_formats.gguf.reader import open_gguf
from cluscomp_formats.gguf.spec import ALIGNMENT, ARCHITECTURE, ROW_ORDER, VERSION, stored_spec
from cluscomp_formats.gguf.tensor_names import tensor_names
from cluscomp_formats.gguf.tokenizer_metadata import InexpressibleTokenizer, tokenizer_metadata, with_tokenizer_read
from cluscomp_formats.ir import Model
from cluscomp_formats.progress import Progress, silent
from cluscomp_formats.sections.digest import NO_DIGEST
from cluscomp_formats.sections.header import Section, header_of, header_value
from cluscomp_formats.sections.model_problems import json_problems, request_problems
from cluscomp_formats.sections.payload_stream import SelfTest, WriteReport
from cluscomp_formats.sections.payloads import Payload, stored_payloads
from cluscomp_formats.sections.section_stream import place_sections, write_sections
from cluscomp_formats.strict_json import canonical_json

__all__ = ["gguf_size", "write_gguf"]

_COPY_BYTES = 1 << 24


def write_gguf(
    model: Model,
    path: Path,
    *,
    force: bool = False,
    self_test: SelfTest | None = None,
    on_progress: Progress = silent,
) -> WriteReport:
    """Write `model` as a native GGUF file, atomically, with about one payload in memory at a time.

    If `self_test` is given, it is called with the model as opened from the finished payloads, which is valid only during the
    call, and its result is stored as the self-test record; otherwise `model.self_test` is stored. `on_progress` is called with
    payload bytes done and in total. Each payload's loader is called once.

    Raises OutputExistsError, StorageError, InvalidRequestError and InvalidFileError as `write_packed`; UnsupportedError without
    the package gguf.
    """
    check_output(path, force=force)
    problems = list(request_problems(model, list(stored_payloads(model)), str(path)))
    if problems:
        raise InvalidRequestError(problems)
    model = with_tokenizer_read(model, path)
    arrays = list(stored_payloads(model))
    payloads = [payload for payload, _ in arrays]
    header_bytes = _header_builder(model, payloads)
    record = model.self_test if self_test is None else None
    # Every part of the header but the record has its final length from the start.
    start = len(header_bytes([Section(0, 0, 0)] * len(payloads), NO_DIGEST, record))
    with atomic_write(path, force=force) as stream:
        # The header stays zero until the end, so that an incomplete file is not a valid model.
        sections, digest = write_sections(stream, start, model, arrays, path, on_progress)
        file_bytes = stream.tell()
        _overwrite_start(stream, header_bytes(sections, digest, record))
        if self_test is not None:
            record = self_test(open_gguf(Path(stream.name)))
            faults = list(json_problems({"self_test": record}, str(path)))
            if faults:
                raise InvalidRequestError(faults)
            header = header_bytes(sections, digest, record)
            _move_up(stream, start, file_bytes, len(header) - start)
            file_bytes += len(header) - start
            _overwrite_start(stream, header)
    payload_bytes = sum(section.length for section in sections)
    return WriteReport(path, digest, file_bytes, payload_bytes, len(sections))


def gguf_size(model: Model) -> int:
    """Return the bytes of the file of `model`, including its self-test record; reads only the tokenizer.

    Raises InvalidRequestError and UnsupportedError as `write_gguf`.
    """
    payloads = [payload for payload, _ in stored_payloads(model)]
    sections = [Section(0, 0, 0)] * len(payloads)
    header = _header_builder(model, payloads)(sections, NO_DIGEST, model.self_test)
    return place_sections(payloads, len(header))[1]


def _header_builder(
    model: Model, payloads: Sequence[Payload]
) -> Callable[[Sequence[Section], str, Mapping[str, Any] | None], bytes]:
    """Return a function that makes the padded header from the values that are known after the payloads have been written."""
    architecture = base_architecture(model.config)
    names = tensor_names(model, payloads, architecture)
    described = _described(model)
    entries = []
    offset = 0
    for name, payload in zip(names, payloads, strict=True):
        if name:
            type_name, shape = stored_spec(payload)
            entries.append(DirectoryEntry(name, shape, type_name, offset))
            offset += aligned(payload.stored_bytes, ALIGNMENT)

    def build(sections: Sequence[Section], digest: str, record: Mapping[str, Any] | None) -> bytes:
        value = header_value(header_of(model, payloads, sections, digest, record))
        layout = {key: value[key] for key in ("codebooks", "files", "tensors")}
        own = {
            "version": Value("uint32", VERSION),
            "base_architecture": Value("string", architecture or "unknown"),
            "original_parameter_count": Value("uint64", sum(tensor.num_weights for tensor in model.tensors.values())),
            "row_order": Value("string", ROW_ORDER),
            "digest": Value("string", digest),
            "config": Value("string", canonical_json(model.config)),
            "provenance": Value("string", canonical_json(model.provenance)),
            "layout": Value("string", canonical_json(layout)),
            "sections": Value("string", names),
            "crc32": Value("uint32", [section.crc32 for section in sections]),
        }
        if record is not None:
            own["self_test"] = Value("string", canonical_json(record))
        header = encode_header({**described, **{f"cluscomp.{key}": value for key, value in own.items()}}, entries)
        return header.ljust(aligned(len(header), ALIGNMENT), b"\0")

    return build


def _described(model: Model) -> dict[str, Value]:
    """Return keys for other GGUF readers: names, hyperparameters, tokenizer. Our reader does not need them."""
    values = {
        "general.architecture": Value("string", ARCHITECTURE),
        "general.alignment": Value("uint32", ALIGNMENT),
        "general.type": Value("string", "model"),
    }
    name = model.provenance.get("name")
    if isinstance(name, str) and name:
        values["general.name"] = Value("string", name)
    try:
        hyperparameters = read_hyperparameters(model.config)
    except ClusCompError:
        # llama.cpp has no keys for this model, but the file has its configuration as JSON.
        return values
    values |= hyperparameters.metadata
    try:
        values |= tokenizer_metadata(model, hyperparameters.description.vocab_size).values
    except InexpressibleTokenizer as reason:
        values["cluscomp.tokenizer_note"] = Value("string", f"not expressed in tokenizer.ggml keys: {reason}")
    return values


def _overwrite_start(stream: BinaryIO, header: bytes) -> None:
    stream.seek(0)
    stream.write(header)
    stream.flush()


def _move_up(stream: BinaryIO, start: int, end: int, distance: int) -> None:
    """Move bytes `start` to `end` up by `distance`, the last ones first, because the ranges may overlap."""
    while distance and end > start:
        begin = max(start, end - _COPY_BYTES)
        stream.seek(begin)
        piece = stream.read(end - begin)
        stream.seek(begin + distance)
        stream.write(piece)
        end = begin
