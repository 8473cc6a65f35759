"""The constants of the packed format, version 1, and its 64-byte preamble. The specification is `docs/packed-format.md`."""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass

__all__ = [
    "MAGIC",
    "PREAMBLE_LENGTH",
    "VERSION",
    "Preamble",
]

MAGIC = b"\xc1CLUS\r\n\x1a"
"""The byte C1 does not occur in UTF-8 text; CR LF and ^Z are changed by a transfer as text."""

VERSION = 1
# Name, offset and struct code of each field, as in the specification's table.
PREAMBLE_FIELDS = (
    ("magic", 0, "8s"),
    ("version", 8, "I"),
    ("flags", 12, "I"),
    ("file_length", 16, "Q"),
    ("header_offset", 24, "Q"),
    ("header_length", 32, "Q"),
    ("header_crc32", 40, "I"),
    ("reserved", 44, "16s"),
    ("preamble_crc32", 60, "I"),
)
_LAYOUT = struct.Struct("<" + "".join(code for _, _, code in PREAMBLE_FIELDS))
_CRC = struct.Struct("<I")
PREAMBLE_LENGTH = _LAYOUT.size
_RESERVED = bytes(16)


@dataclass(frozen=True)
class Preamble:
    """The first 64 bytes of a file. Offsets and lengths are in bytes."""

    version: int
    flags: int
    file_length: int
    header_offset: int
    header_length: int
    header_crc32: int
    reserved: bytes = _RESERVED

    def to_bytes(self) -> bytes:
        """Return the stored bytes, including the checksum."""
        fields = (self.file_length, self.header_offset, self.header_length, self.header_crc32, self.reserved)
        body = _LAYOUT.pack(MAGIC, self.version, self.flags, *fields, 0)[: -_CRC.size]
        return body + _CRC.pack(zlib.crc32(body))

    @classmethod
    def from_bytes(cls, data: bytes) -> Preamble | None:
        """Return the fields of `data [64]`, None if its checksum does not match. Does not check the magic."""
        _, version, flags, file_length, header_offset, header_length, header_crc32, reserved, crc = _LAYOUT.unpack(data)
        if crc != zlib.crc32(data[: -_CRC.size]):
            return None
        return cls(version, flags, file_length, header_offset, header_length, header_crc32, reserved)
