"""The sections of an open packed file, mapped on demand and checked when they are first read."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from cluscomp_formats.errors import InvalidFileError, Problem
from cluscomp_formats.files.stored_file import StoredFile
from cluscomp_formats.ir import AnyArray
from cluscomp_formats.sections.bits import LargestCode, largest_code
from cluscomp_formats.sections.header import Section, align
from cluscomp_formats.sections.payloads import ContentFault, Payload

__all__ = ["MappedFile"]

_DAMAGED = "the file is damaged: copy, download or convert it again"


class MappedFile:
    """Reads payloads from an open file.

    `name` is the file's path for messages. `payloads`, one per section, are set after the header has been parsed. A section's
    checksum, padding and values are checked when it is first read. The returned arrays may be read-only views of the file.
    """

    def __init__(self, file: StoredFile, sections: Sequence[Section]) -> None:
        self.name = file.name
        self.payloads: Sequence[Payload] = ()
        self._file = file
        self._sections = sections
        self._checked: set[int] = set()

    def stored_bytes(self, number: int) -> int:
        """Return the length of section `number` in bytes."""
        return self._sections[number].length

    def check(self, number: int, largest: LargestCode = largest_code) -> npt.NDArray[np.uint8]:
        """Return section `number` as stored, uint8 `[bytes]`, after checking it without unpacking codes.

        It is checked once; `largest` finds the largest code. Threads may check different sections at the same time. Raises as
        `read`.
        """
        payload, section = self.payloads[number], self._sections[number]
        stored = self._file.read(section.offset, section.length, payload.owner)
        if number not in self._checked:
            self._check_stored(payload, section, stored)
            self._raise(payload, payload.stored_fault(stored, largest))
            self._checked.add(number)
        return stored

    def read(self, number: int) -> AnyArray:
        """Return the values of section `number`. Raises InvalidFileError if it is damaged, StorageError if it is unreadable."""
        payload, section = self.payloads[number], self._sections[number]
        stored = self._file.read(section.offset, section.length, payload.owner)
        if number in self._checked:
            return payload.unpack(stored)
        self._check_stored(payload, section, stored)
        values = payload.unpack(stored)
        self._raise(payload, payload.content_fault(values))
        self._checked.add(number)
        return values

    def _check_stored(self, payload: Payload, section: Section, stored: npt.NDArray[np.uint8]) -> None:
        crc = zlib.crc32(stored.data)
        if crc != section.crc32:
            message = f"the checksum of {payload.part} does not match"
            raise self._error(payload, "checksum_mismatch", message, f"{crc:08x}", f"{section.crc32:08x}")
        end = section.offset + section.length
        if self._file.read(end, align(end) - end, payload.owner).any():
            raise self._error(payload, "bad_padding", f"the padding after {payload.part} is not zero", "other bytes", "zeros")
        self._raise(payload, payload.padding_fault(stored))

    def _raise(self, payload: Payload, fault: ContentFault | None) -> None:
        if fault is not None:
            raise self._error(payload, fault.kind, fault.message, fault.found, fault.expected)

    def _error(self, payload: Payload, kind: str, message: str, found: str, expected: str) -> InvalidFileError:
        return InvalidFileError(Problem(kind, message, self.name, payload.owner, found, expected, _DAMAGED))
