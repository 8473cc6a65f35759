"""The constants of the packed format, version 1, and its 64-byte preamble. The specification is `docs/packed-format.md`."""

from __future__ import annotations

import math
import re
import struct
import unicodedata
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = [
    "ALIGNMENT",
    "MAGIC",
    "MAX_HEADER_LENGTH",
    "MAX_NAME_BYTES",
    "MAX_RANK",
    "PREAMBLE_LENGTH",
    "VERSION",
    "Preamble",
    "align",
    "can_be_shape",
    "file_name_fault",
    "name_fault",
    "side_file_name_fault",
]

MAGIC = b"\xc1CLUS\r\n\x1a"
"""No text in UTF-8 has the byte C1; CR LF and ^Z do not survive a transfer as text."""

VERSION = 1
ALIGNMENT = 64
"""Sections begin at multiples of this many bytes: a cache line, and enough for any vector load."""

MAX_HEADER_LENGTH = 1 << 26
MAX_NAME_BYTES = 512
MAX_RANK = 8

# name, offset, struct code; the specification's table says the same.
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
    """The fixed start of a file. Offsets and lengths in bytes."""

    version: int
    flags: int
    file_length: int
    header_offset: int
    header_length: int
    header_crc32: int
    reserved: bytes = _RESERVED

    def to_bytes(self) -> bytes:
        """The preamble as stored, with its checksum."""
        fields = (self.file_length, self.header_offset, self.header_length, self.header_crc32, self.reserved)
        body = _LAYOUT.pack(MAGIC, self.version, self.flags, *fields, 0)[: -_CRC.size]
        return body + _CRC.pack(zlib.crc32(body))

    @classmethod
    def from_bytes(cls, data: bytes) -> Preamble | None:
        """The fields of `data [64]`, or None if its checksum is wrong. Does not look at the magic."""
        _, version, flags, file_length, header_offset, header_length, header_crc32, reserved, crc = _LAYOUT.unpack(data)
        if crc != zlib.crc32(data[: -_CRC.size]):
            return None
        return cls(version, flags, file_length, header_offset, header_length, header_crc32, reserved)


def align(offset: int) -> int:
    """`offset` rounded up to the next multiple of `ALIGNMENT`."""
    return -(-offset // ALIGNMENT) * ALIGNMENT


def can_be_shape(shape: Sequence[int], item_bytes: int) -> bool:
    """Whether an array of that shape can be: at most `MAX_RANK` lengths, fewer than 2^63 bytes.

    With a zero among them the product is zero, but numpy still multiplies the others.
    """
    return len(shape) <= MAX_RANK and math.prod(length for length in shape if length) * item_bytes < 1 << 63


def name_fault(name: str) -> str | None:
    """What is wrong with the name of a tensor, codebook or side file; None if nothing is."""
    if not name:
        return "is empty"
    if any(unicodedata.category(character) in ("Cc", "Cs") for character in name):
        return "holds control characters or lone surrogates"
    if len(name.encode()) > MAX_NAME_BYTES:
        return f"is longer than {MAX_NAME_BYTES} bytes of UTF-8"
    return None


def file_name_fault(name: str) -> str | None:
    """What is wrong with the plain name of a file, which must not lead out of the folder it is unpacked to."""
    if any(character in name for character in "/\\:") or name in (".", ".."):
        return "is a path; it has to be a plain name"
    return name_fault(name)


SIDE_FOLDER = re.compile(r"additional_chat_templates|[0-9]{1,2}_[A-Za-z][A-Za-z0-9]{0,62}")
"""Folders that side files may lie in: templates of transformers, and modules of sentence-transformers such as `1_Pooling`."""


def side_file_name_fault(name: str) -> str | None:
    """What is wrong with the name of a side file: a plain name, or one in a `SIDE_FOLDER` with a slash between."""
    folder, slash, plain = name.partition("/")
    if slash and SIDE_FOLDER.fullmatch(folder):
        return file_name_fault(plain) or name_fault(name)
    return file_name_fault(name)
