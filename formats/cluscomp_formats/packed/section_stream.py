"""Sections written in one pass: each payload is read once, checked, packed, summed, hashed and written before the next."""

from __future__ import annotations

import contextlib
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import numpy as np

from cluscomp_formats.atomic import storage_error
from cluscomp_formats.errors import InvalidRequestError, Problem, StorageError
from cluscomp_formats.ir import AnyArray, Array, DigestBuilder, Model
from cluscomp_formats.packed.bits import pack_bits
from cluscomp_formats.packed.header import Section
from cluscomp_formats.packed.payloads import Payload
from cluscomp_formats.packed.spec import align

__all__ = ["Progress", "read_payload", "write_sections"]

Progress = Callable[[int, int], None]

_PIECE = 1 << 19
"""Elements handled at a time, a multiple of 8: few enough to be summed, packed and written while in the cache."""

_WRITEBACK = 1 << 23
"""Bytes after which the system is asked to start writing to the disk."""


def write_sections(
    stream: BinaryIO,
    start: int,
    model: Model,
    payloads: Sequence[tuple[Payload, Array]],
    path: Path,
    on_progress: Progress | None,
) -> tuple[list[Section], str]:
    """Write the sections from byte `start`, a multiple of the alignment, with zeros before; the sections and the digest.

    Raises InvalidRequestError for values the formats cannot hold, StorageError if a payload cannot be read.
    """
    total = sum(payload.stored_bytes for payload, _ in payloads)
    done = 0
    builder = DigestBuilder(model.config)
    sections: list[Section] = []
    stream.write(bytes(start))
    writeback = _Writeback(stream)
    # hashlib lets go of the interpreter lock, so one payload is hashed while it is packed and written.
    with ThreadPoolExecutor(max_workers=1) as hasher:
        for payload, array in payloads:
            values = read_payload(payload, array, path)
            hashing = hasher.submit(_hash, builder, payload, array, values)
            offset, crc = stream.tell(), 0
            for piece in _pieces(payload, values):
                crc = zlib.crc32(piece, crc)
                stream.write(piece)
                writeback.advance()
                done += piece.nbytes
                if on_progress is not None:
                    on_progress(done, total)
            section = Section(offset, payload.stored_bytes, crc)
            stream.write(bytes(align(stream.tell()) - stream.tell()))
            sections.append(section)
            hashing.result()
            del values, piece
    return sections, builder.digest()


class _Writeback:
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


def _hash(builder: DigestBuilder, payload: Payload, array: Array, values: AnyArray) -> None:
    if payload.description is not None:
        builder.add(payload.description, array, values)


def read_payload(payload: Payload, array: Array, path: Path) -> AnyArray:
    """The values, checked. Raises InvalidRequestError, naming the output `path`; StorageError if they cannot be read."""
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


def _pieces(payload: Payload, values: AnyArray) -> Iterator[memoryview]:
    """The section's bytes, a piece at a time. Yields at least one, possibly empty."""
    flat = values.reshape(-1)
    for start in range(0, max(flat.size, 1), _PIECE):
        piece = flat[start : start + _PIECE]
        stored = piece.view(np.uint8) if payload.code_bits is None else pack_bits(piece, payload.code_bits)
        yield stored.data
