"""Parse the header of a safetensors file strictly."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from cluscomp_formats.errors import InvalidFileError, Problem
from cluscomp_formats.ir import DTYPES
from cluscomp_formats.limits import MAX_RANK, can_be_shape
from cluscomp_formats.safetensors.spec import LENGTH_BYTES, MAX_HEADER_BYTES, METADATA, STORED_NAMES, Entry
from cluscomp_formats.strict_json import StrictJsonError, parse_strict

__all__ = ["Header", "header_length", "parse_header"]

_DTYPES = {stored: name for name, stored in STORED_NAMES.items()}
_SIZE_LIMIT = 1 << 63
_FETCH_AGAIN = "copy, download or convert it again"


@dataclass(frozen=True)
class Header:
    """The content of a header: the arrays by name, and the file's metadata."""

    entries: Mapping[str, Entry]
    metadata: Mapping[str, str] = field(default_factory=dict)


def header_length(start: bytes, file_length: int, file: str) -> int:
    """Return the header's length, given the first 8 bytes of a file. Raises InvalidFileError if it is invalid."""
    if len(start) < LENGTH_BYTES:
        found, expected = f"{len(start)} bytes", f"at least {LENGTH_BYTES}"
        raise InvalidFileError(Problem("truncated", "the file ends early", file, None, found, expected, _FETCH_AGAIN))
    length = int.from_bytes(start[:LENGTH_BYTES], "little")
    if length > MAX_HEADER_BYTES:
        found, expected = f"{length} bytes", f"at most {MAX_HEADER_BYTES}"
        message = "not a safetensors file, or its header is too long"
        raise InvalidFileError(Problem("header_too_long", message, file, None, found, expected))
    if LENGTH_BYTES + length > file_length:
        found, expected = f"{file_length} bytes", f"at least {LENGTH_BYTES + length}"
        raise InvalidFileError(Problem("truncated", "the file ends early", file, None, found, expected, _FETCH_AGAIN))
    return length


def parse_header(data: bytes, data_length: int, file: str) -> Header:
    """Parse a header; `data_length` is the number of bytes after it in the file.

    Raises InvalidFileError with every problem found, at most one per array.
    """
    try:
        value = parse_strict(data)
    except StrictJsonError as error:
        raise InvalidFileError(Problem(error.kind, f"the header: {error}", file, "header")) from None
    if not isinstance(value, dict) or not data.startswith(b"{"):
        raise InvalidFileError(Problem("bad_header", "the header is not a JSON object", file, "header"))
    problems: list[Problem] = []
    metadata = value.pop(METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        problems.append(Problem("bad_header", f"{METADATA} is not an object of strings", file, "header"))
    entries: dict[str, Entry] = {}
    for name, member in value.items():
        entry = _entry(name, member, file)
        if isinstance(entry, Problem):
            problems.append(entry)
        else:
            entries[name] = entry
    # If an entry is malformed, the others would seem to leave a gap.
    if not problems:
        problems += _layout_problems(entries.items(), data_length, file)
    if problems:
        raise InvalidFileError(problems)
    return Header(entries, metadata)


def _entry(name: str, member: Any, file: str) -> Entry | Problem:
    def problem(kind: str, message: str, found: object, expected: str) -> Problem:
        return Problem(kind, message, file, name[:200], repr(found)[:200], expected)

    expected_members = {"dtype", "shape", "data_offsets"}
    if not isinstance(member, dict) or member.keys() != expected_members:
        found = sorted(member) if isinstance(member, dict) else member
        return problem("bad_entry", "malformed entry", found, ", ".join(sorted(expected_members)))
    dtype = member["dtype"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        return problem("unknown_dtype", "unknown dtype", dtype, ", ".join(_DTYPES))
    shape, offsets = member["shape"], member["data_offsets"]
    if not _are_sizes(shape) or len(shape) > MAX_RANK:
        return problem("bad_shape", "malformed shape", shape, f"at most {MAX_RANK} lengths")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        return problem("bad_offsets", "malformed data_offsets", offsets, "begin and end")
    item = DTYPES[_DTYPES[dtype]].itemsize
    if not can_be_shape(shape, item):
        return problem("bad_shape", "the shape is invalid", shape, f"less than {_SIZE_LIMIT} bytes")
    needed = math.prod(shape) * item
    if offsets[1] - offsets[0] != needed:
        return problem("bad_offsets", "the number of bytes does not match dtype and shape", offsets, f"{needed} bytes")
    return Entry(_DTYPES[dtype], tuple(shape), offsets[0], offsets[1])


def _are_sizes(value: Any) -> bool:
    # isinstance would accept bool, and comparisons would accept 1.0.
    return isinstance(value, list) and all(type(item) is int and 0 <= item < _SIZE_LIMIT for item in value)


def _layout_problems(entries: Iterable[tuple[str, Entry]], data_length: int, file: str) -> Iterator[Problem]:
    """Yield a problem for each gap or overlap between arrays, and for trailing or missing data."""
    position = 0
    for name, entry in sorted(entries, key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != position:
            kind, what = (
                ("overlap", "overlaps the previous one") if entry.begin < position else ("hole", "leaves a gap before it")
            )
            yield Problem(kind, f"the array {what}", file, name[:200], str(entry.begin), str(position))
        position = max(position, entry.end)
    if position > data_length:
        yield Problem(
            "truncated", "the file ends early", file, None, f"{data_length} bytes of data", str(position), _FETCH_AGAIN
        )
    elif position < data_length:
        found = f"{data_length} bytes of data"
        yield Problem("trailing_bytes", "the file has trailing bytes", file, None, found, str(position), _FETCH_AGAIN)
