"""Read and check payloads, and convert them to their stored bytes, for all writers."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from cluscomp_formats.errors import InvalidRequestError, Problem, StorageError
from cluscomp_formats.files.atomic import fsync_folder, storage_error
from cluscomp_formats.files.side_files import write_synced
from cluscomp_formats.ir import AnyArray, Array, Model
from cluscomp_formats.sections.bits import pack_bits
from cluscomp_formats.sections.payloads import Payload
from cluscomp_formats.sections.tiles import tiled_pieces

__all__ = [
    "SelfTest",
    "WriteReport",
    "Writeback",
    "read_checked",
    "stored_pieces",
    "write_side_files",
]

SelfTest = Callable[[Model], Mapping[str, Any] | None]

_PIECE = 1 << 19
"""Elements per piece, a multiple of 8: few enough to be hashed, packed and written while they are in the cache."""

_WRITEBACK = 1 << 23
"""Number of bytes after which the system is asked to start writing to the disk."""


@dataclass(frozen=True)
class WriteReport:
    """The result of writing the file or folder `path`. Sizes are in bytes.

    `file_bytes` is the total size; `payload_bytes` is the size of the payloads, without padding, preamble and headers;
    `num_sections` is their number.
    """

    path: Path
    digest: str
    file_bytes: int
    payload_bytes: int
    num_sections: int


class Writeback:
    """Starts writing to the disk while the rest of the file is being made, rather than at the final fsync.

    Without it, packing takes a third longer. It is a hint to the system, given where supported (Linux).
    """

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._started = 0

    def advance(self) -> None:
        """Start writing the bytes since the last call to the disk, if they are many enough."""
        position = self._stream.tell()
        if not hasattr(os, "posix_fadvise") or position - self._started < _WRITEBACK:
            return
        self._stream.flush()
        with contextlib.suppress(OSError):
            length = position - self._started
            os.posix_fadvise(self._stream.fileno(), self._started, length, os.POSIX_FADV_DONTNEED)
        self._started = position


def read_checked(payload: Payload, array: Array, path: Path) -> AnyArray:
    """Read a payload and check its values against the rules of its part.

    Raises InvalidRequestError if a value violates a rule; StorageError if the loader raises OSError. Other errors of the loader
    are passed on.
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
    """Yield the stored bytes of a payload in pieces, at least one, possibly empty."""
    if payload.code_bits is not None and payload.order == "tiles":
        for piece in tiled_pieces(values, payload.code_bits):
            yield piece.data
        return
    flat = values.reshape(-1)
    if payload.order == "planes":
        for byte in (0, 1):
            for start in range(0, max(flat.size, 1), _PIECE):
                piece = flat[start : start + _PIECE].view(np.uint8)
                yield np.ascontiguousarray(piece[byte::2]).data
        return
    for start in range(0, max(flat.size, 1), _PIECE):
        piece = flat[start : start + _PIECE]
        stored = piece.view(np.uint8) if payload.code_bits is None else pack_bits(piece, payload.code_bits)
        yield stored.data


def write_side_files(model: Model, folder: Path, output: Path, advance: Callable[[int], None]) -> None:
    """Write the model's side files to `folder` and fsync them. Messages name `output`; `advance` is called with bytes done."""
    for name in sorted(model.files):
        array = model.files[name]
        content = read_checked(Payload(name, "bytes", array.dtype, array.shape), array, output)
        path = folder / name
        if path.parent != folder:
            path.parent.mkdir(exist_ok=True)
        write_synced(path, content.tobytes())
        advance(content.nbytes)
    for inner in {(folder / name).parent for name in model.files if "/" in name}:
        fsync_folder(inner)
