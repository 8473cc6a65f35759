"""What all writers do with a model: check it, then read, check, hash and pack one payload after the other."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from cluscomp_formats.errors import InvalidFileError, InvalidRequestError, Problem, StorageError
from cluscomp_formats.files.atomic import storage_error
from cluscomp_formats.ir import AnyArray, Array, DigestBuilder, Model
from cluscomp_formats.packed.spec import MAX_RANK, name_fault, side_file_name_fault
from cluscomp_formats.sections.bits import pack_bits
from cluscomp_formats.sections.json_values import json_faults
from cluscomp_formats.sections.payloads import Payload

__all__ = [
    "SelfTest",
    "WriteReport",
    "Writeback",
    "check_claim",
    "hash_payload",
    "json_problems",
    "model_problems",
    "read_checked",
    "stored_pieces",
]

SelfTest = Callable[[Model], Mapping[str, Any] | None]

_PIECE = 1 << 19
"""Elements handled at a time, a multiple of 8: few enough to be summed, packed and written while in the cache."""

_WRITEBACK = 1 << 23
"""Bytes after which the system is asked to start writing to the disk."""


@dataclass(frozen=True)
class WriteReport:
    """What was written, to the file or folder `path`. Sizes in bytes.

    `file_bytes` is the size of everything written; `payload_bytes` counts the payloads without padding, preamble and
    headers, `num_sections` how many there are.
    """

    path: Path
    digest: str
    file_bytes: int
    payload_bytes: int
    num_sections: int


class Writeback:
    """Has the disk work while the rest of the file is being made, instead of only at the final fsync.

    Without it packing takes a third longer. Only a hint, given where the system has it (Linux).
    """

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._started = 0

    def advance(self) -> None:
        """Start writing out what was written since the last time, if it is worth it."""
        position = self._stream.tell()
        if not hasattr(os, "posix_fadvise") or position - self._started < _WRITEBACK:
            return
        self._stream.flush()
        with contextlib.suppress(OSError):
            length = position - self._started
            os.posix_fadvise(self._stream.fileno(), self._started, length, os.POSIX_FADV_DONTNEED)
        self._started = position


def hash_payload(builder: DigestBuilder, payload: Payload, array: Array, values: AnyArray) -> None:
    """Add a payload to the digest; side files do not enter."""
    if payload.description is not None:
        builder.add(payload.description, array, values)


def check_claim(model: Model, digest: str, file: str | None = None) -> None:
    """Hold the computed digest of a model against the one it was read with. Raises InvalidFileError if they differ.

    Writers do so before their output appears: an artefact that is not what it says must not become one that is.
    """
    if model.claimed_digest not in (None, digest):
        message, remedy = "the content is not what the digest says", "copy, download or convert it again"
        raise InvalidFileError(Problem("digest_mismatch", message, file, None, digest, model.claimed_digest, remedy))


def read_checked(payload: Payload, array: Array, path: Path) -> AnyArray:
    """The values of a payload, held against the rules of its part.

    Raises InvalidRequestError if they break one, StorageError for an OSError of the loader; other errors pass through.
    """
    try:
        values = array.read()
    except OSError as error:
        problem = storage_error(path, error).problems[0]
        message = f"{payload.part} cannot be read: {problem.message}"
        raise StorageError(Problem("source_unreadable", message, error.filename, payload.owner)) from error
    fault = payload.content_fault(values)
    if fault is not None:
        raise InvalidRequestError(
            Problem(fault.kind, fault.message, str(path), payload.owner, fault.found, fault.expected, "the model is faulty")
        )
    return values


def stored_pieces(payload: Payload, values: AnyArray) -> Iterator[memoryview]:
    """The payload's bytes as stored, a piece at a time. Yields at least one, possibly empty."""
    flat = values.reshape(-1)
    if payload.planar:
        for byte in (0, 1):
            for start in range(0, max(flat.size, 1), _PIECE):
                piece = flat[start : start + _PIECE].view(np.uint8)
                yield np.ascontiguousarray(piece[byte::2]).data
        return
    for start in range(0, max(flat.size, 1), _PIECE):
        piece = flat[start : start + _PIECE]
        stored = piece.view(np.uint8) if payload.code_bits is None else pack_bits(piece, payload.code_bits)
        yield stored.data


def model_problems(model: Model, payloads: Sequence[tuple[Payload, Array]], file: str) -> Iterator[Problem]:
    """What can be found wrong without reading a payload."""
    for label, names, fault_of in (
        ("tensor", model.tensors, name_fault),
        ("codebook", model.codebooks, name_fault),
        ("side file", model.files, side_file_name_fault),
    ):
        for name in names:
            fault = fault_of(name)
            if fault is not None:
                yield Problem("bad_name", f"the name of a {label} {fault}", file, repr(name[:200]))
    for name, array in model.files.items():
        if array.dtype != "uint8" or len(array.shape) != 1:
            found = f"{array.dtype} {list(array.shape)}"
            yield Problem("bad_side_file", "a side file is held as its bytes", file, name, found, "uint8 [bytes]")
    for payload, _ in payloads:
        if len(payload.shape) > MAX_RANK:
            found, expected = f"{len(payload.shape)} dimensions", f"at most {MAX_RANK}"
            yield Problem("bad_shape", f"{payload.part} has too many dimensions", file, payload.owner, found, expected)
    values = {"config": model.config, "provenance": model.provenance, "self_test": model.self_test}
    yield from json_problems(values, file)


def json_problems(values: Mapping[str, Any], file: str) -> Iterator[Problem]:
    """What in the values, labelled objects, JSON cannot hold; `self_test` may be None."""
    for label, value in values.items():
        if not isinstance(value, dict) and not (value is None and label == "self_test"):
            found = f"a {type(value).__name__}"
            yield Problem("not_json", f"{label} is not a JSON object", file, found=found, expected="a dict")
            continue
        for where, fault in json_faults(value, label):
            yield Problem("not_json", f"{where} is {fault}, which JSON cannot hold", file)
