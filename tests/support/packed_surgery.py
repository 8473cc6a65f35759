"""Cut packed files open and sew them up again: changes that carry right checksums, so that only the change itself is wrong."""

import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cluscomp_formats.errors import InvalidFileError, Problem
from cluscomp_formats.packed import open_packed

PREAMBLE = struct.Struct("<8sIIQQQI16s")


def preamble_fields(data: bytes) -> list[Any]:
    """magic, version, flags, file_length, header_offset, header_length, header_crc32, reserved."""
    return list(PREAMBLE.unpack(data[:60]))


def with_preamble(data: bytes, index: int, value: Any) -> bytes:
    """`data` with one field of the preamble replaced and the preamble's checksum right."""
    fields = preamble_fields(data)
    fields[index] = value
    body = PREAMBLE.pack(*fields)
    return body + struct.pack("<I", zlib.crc32(body)) + data[64:]


def with_header_bytes(data: bytes, header: bytes) -> bytes:
    """`data` with another header, and lengths and checksums to match."""
    magic, version, flags, _, offset, _, _, reserved = preamble_fields(data)
    body = PREAMBLE.pack(magic, version, flags, offset + len(header), offset, len(header), zlib.crc32(header), reserved)
    return body + struct.pack("<I", zlib.crc32(body)) + data[64:offset] + header


def header_of(data: bytes) -> dict[str, Any]:
    header: dict[str, Any] = json.loads(data[preamble_fields(data)[4] :])
    return header


def with_header(data: bytes, change: Callable[[dict[str, Any]], None]) -> bytes:
    """`data` with its header changed in place by `change`."""
    header = header_of(data)
    change(header)
    return with_header_bytes(data, json.dumps(header, sort_keys=True, separators=(",", ":")).encode())


def with_section(data: bytes, number: int, content: bytes) -> bytes:
    """`data` with the bytes of a section replaced by as many others, and its checksum right."""
    section = header_of(data)["sections"][number]
    assert len(content) == section["length"]
    end = section["offset"] + section["length"]
    changed = data[: section["offset"]] + content + data[end:]
    return with_header(changed, lambda header: header["sections"][number].update(crc32=zlib.crc32(content)))


def problems_of(path: Path, data: bytes, *, check: bool = True) -> tuple[Problem, ...]:
    """The problems found in a file of these bytes; fails if there are none."""
    path.write_bytes(data)
    with pytest.raises(InvalidFileError) as caught:
        open_packed(path, check=check)
    assert all(problem.file == str(path) for problem in caught.value.problems)
    return caught.value.problems
