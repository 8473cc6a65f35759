"""Sections written in one pass: each payload is read once, checked, packed, summed, hashed and written before the next."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

from cluscomp_formats.ir import Array, DigestBuilder, Model
from cluscomp_formats.progress import Progress
from cluscomp_formats.sections.digest import check_claim, hash_payload
from cluscomp_formats.sections.header import Section, align
from cluscomp_formats.sections.payload_stream import Writeback, read_checked, stored_pieces
from cluscomp_formats.sections.payloads import Payload

__all__ = ["place_sections", "write_sections"]

_LONGEST_CRC = (1 << 32) - 1


def _next_offset(end: int, _length: int) -> int:
    return align(end)


def place_sections(
    payloads: Sequence[Payload], start: int, offset_of: Callable[[int, int], int] = _next_offset
) -> tuple[list[Section], int]:
    """Where `write_sections` puts the sections, with checksums as long as their text can get, and where it then ends."""
    sections = []
    end = start
    for payload in payloads:
        offset = offset_of(end, payload.stored_bytes)
        end = offset + payload.stored_bytes
        sections.append(Section(offset, payload.stored_bytes, _LONGEST_CRC))
    return sections, align(end)


def write_sections(
    stream: BinaryIO,
    start: int,
    model: Model,
    payloads: Sequence[tuple[Payload, Array]],
    path: Path,
    on_progress: Progress,
    offset_of: Callable[[int, int], int] = _next_offset,
) -> tuple[list[Section], str]:
    """Write the sections from byte `start`, a multiple of the alignment, with zeros before; the sections and the digest.

    `offset_of(end, length)` places a section of that length after one that ended there. Zeros fill up the last one's line.

    Raises InvalidRequestError for values the formats cannot hold, InvalidFileError if the model is not what its digest claims,
    StorageError if a payload cannot be read.
    """
    total = sum(payload.stored_bytes for payload, _ in payloads)
    done = 0
    builder = DigestBuilder(model.config)
    sections: list[Section] = []
    stream.write(bytes(start))
    writeback = Writeback(stream)
    # hashlib and zlib let go of the interpreter lock: one thread hashes and sums what this one packs and writes.
    with ThreadPoolExecutor(max_workers=1) as summing:
        for payload, array in payloads:
            values = read_checked(payload, array, path)
            end, checksum = stream.tell(), _Checksum()
            offset = offset_of(end, payload.stored_bytes)
            stream.write(bytes(offset - end))
            tasks = [summing.submit(hash_payload, builder, payload, array, values)]
            for piece in stored_pieces(payload, values):
                tasks.append(summing.submit(checksum.add, piece))
                stream.write(piece)
                writeback.advance()
                done += piece.nbytes
                on_progress("writing", done, total)
            for task in tasks:
                task.result()
            sections.append(Section(offset, payload.stored_bytes, checksum.value))
            del values, piece, tasks
    stream.write(bytes(align(stream.tell()) - stream.tell()))
    digest = builder.digest()
    check_claim(model, digest)
    return sections, digest


class _Checksum:
    """A CRC-32 that grows piece by piece."""

    def __init__(self) -> None:
        self.value = 0

    def add(self, piece: memoryview) -> None:
        self.value = zlib.crc32(piece, self.value)
