"""The sections of an open packed file, mapped into memory and checked when first read."""

from __future__ import annotations

import mmap
import zlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from cluscomp_formats.errors import InvalidFileError, Problem
from cluscomp_formats.ir import AnyArray
from cluscomp_formats.packed.header import Section
from cluscomp_formats.packed.payloads import Payload
from cluscomp_formats.packed.spec import align

__all__ = ["MappedFile"]

_DAMAGED = "the file is damaged: copy, download or convert it again"


class MappedFile:
    """Reads payloads out of a mapped file.

    `name` is the file's path for messages. `payloads`, one per section, are set once the header has been understood. A
    section's checksum, padding and values are checked when it is first read. The arrays handed out may be read-only views
    of the mapping, which lives as long as any of them.
    """

    def __init__(self, name: str, mapping: mmap.mmap, sections: Sequence[Section]) -> None:
        self.name = name
        self.payloads: Sequence[Payload] = ()
        self._mapping = mapping
        self._sections = sections
        self._sound: set[int] = set()

    def read(self, number: int) -> AnyArray:
        """The values of section `number`. Raises InvalidFileError."""
        payload, section = self.payloads[number], self._sections[number]
        # Touching a page that is no longer there kills the process (SIGBUS), so look before every read. A file cut between
        # this look and the use of the array cannot be caught.
        if self._mapping.size() < len(self._mapping):
            found = f"{self._mapping.size()} bytes"
            raise self._error(payload, "file_changed", "the file was cut while open", found, f"{len(self._mapping)} bytes")
        stored = self._bytes(section.offset, section.length)
        if number in self._sound:
            return payload.unpack(stored)
        self._check_stored(payload, section, stored)
        values = payload.unpack(stored)
        fault = payload.content_fault(values)
        if fault is not None:
            raise self._error(payload, fault.kind, fault.message, fault.found, fault.expected)
        self._sound.add(number)
        return values

    def _bytes(self, offset: int, length: int) -> npt.NDArray[np.uint8]:
        return np.frombuffer(self._mapping, dtype=np.uint8, count=length, offset=offset)

    def _check_stored(self, payload: Payload, section: Section, stored: npt.NDArray[np.uint8]) -> None:
        crc = zlib.crc32(stored.data)
        if crc != section.crc32:
            message = f"the checksum of {payload.part} is wrong"
            raise self._error(payload, "checksum_mismatch", message, f"{crc:08x}", f"{section.crc32:08x}")
        end = section.offset + section.length
        if self._bytes(end, align(end) - end).any():
            raise self._error(payload, "bad_padding", f"the padding after {payload.part} is not zero", "other bytes", "zeros")
        fault = payload.padding_fault(stored)
        if fault is not None:
            raise self._error(payload, fault.kind, fault.message, fault.found, fault.expected)

    def _error(self, payload: Payload, kind: str, message: str, found: str, expected: str) -> InvalidFileError:
        return InvalidFileError(Problem(kind, message, self.name, payload.owner, found, expected, _DAMAGED))
