"""Write sections in one pass: each payload is read once, checked, packed, hashed and written before the next."""

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
    """Return the sections as `write_sections` places them, and the end offset. Checksums have the longest possible text."""
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
    """Write zeros up to byte `start`, a multiple of the alignment, then the sections. Return the sections and the digest.

    `offset_of(end, length)` returns the offset of a section of this length, given the end of the previous one. Zeros pad the
    last section to a multiple of the alignment.

    Raises InvalidRequestError if the formats cannot store a value; InvalidFileError if the digest does not match the model's
    recorded one; StorageError if a payload cannot be read.
    """
    total = sum(payload.stored_bytes for payload, _ in payloads)
    done = 0
    builder = DigestBuilder(model.config)
    sections: list[Section] = []
    stream.write(bytes(start))
    writeback = Writeback(stream)
    # hashlib and zlib release the interpreter lock, so another thread hashes while this one packs and writes.
    with ThreadPoolExecutor(max_workers=1) as hashing:
        for payload, array in payloads:
            values = read_checked(payload, array, path)
            end, checksum = stream.tell(), _Checksum()
            offset = offset_of(end, payload.stored_bytes)
            stream.write(bytes(offset - end))
            tasks = [hashing.submit(hash_payload, builder, payload, array, values)]
            for piece in stored_pieces(payload, values):
                tasks.append(hashing.submit(checksum.add, piece))
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
    """An incremental CRC-32."""

    def __init__(self) -> None:
        self.value = 0

    def add(self, piece: memoryview) -> None:
        self.value = zlib.crc32(piece, self.value)
