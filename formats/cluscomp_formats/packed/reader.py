"""Open packed files. Files are untrusted; `docs/packed-format.md` says what is checked when."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from pathlib import Path

from cluscomp_formats.errors import InvalidFileError, Problem
from cluscomp_formats.files.regular_file import first_bytes
from cluscomp_formats.files.stored_file import StoredFile
from cluscomp_formats.ir import Model
from cluscomp_formats.packed.lookalike import describe, is_mangled
from cluscomp_formats.packed.spec import MAGIC, PREAMBLE_LENGTH, VERSION, Preamble
from cluscomp_formats.sections.assembly import build_model, reference_problems
from cluscomp_formats.sections.digest import content_problems
from cluscomp_formats.sections.header import ALIGNMENT, MAX_HEADER_LENGTH, PackedHeader
from cluscomp_formats.sections.header_parsing import layout_problems, parse_header
from cluscomp_formats.sections.mapped_file import MappedFile
from cluscomp_formats.sections.payloads import stored_payloads
from cluscomp_formats.strict_json import StrictJsonError, parse_canonical

__all__ = ["looks_packed", "open_packed", "read_header"]

_FETCH_AGAIN = "copy, download or convert it again"


def open_packed(path: Path, *, check: bool = False) -> Model:
    """Open a packed file as a lazy model.

    The structure is checked immediately, and all its problems are reported together. A payload's checksum and values are
    checked when it is first read, which may raise InvalidFileError; with `check`, all payloads and the digest are checked
    immediately.

    The file stays open and its payloads are mapped. It may be replaced or deleted while the model is in use, but must not be
    changed in place: a truncation is detected when the next payload is read, but access to a returned array then kills the
    process with SIGBUS.

    Raises InvalidFileError if the file is not a valid packed file; StorageError if it cannot be read.
    """
    header, model, file = _open(path)
    if check:
        problems = list(content_problems(header, model, file))
        if problems:
            raise InvalidFileError(problems)
    return model


def read_header(path: Path) -> PackedHeader:
    """Return the header of a packed file after checking the structure; reads no payload.

    Raises InvalidFileError if the file is not a valid packed file; StorageError if it cannot be read.
    """
    return _open(path)[0]


def looks_packed(path: Path) -> bool:
    """Return whether `path` is a packed file, or a damaged one, by its first bytes. Never raises."""
    start = first_bytes(path, len(MAGIC))
    return start == MAGIC or is_mangled(start)


def _open(path: Path) -> tuple[PackedHeader, Model, MappedFile]:
    stored = StoredFile(path)
    header = _read_header(stored, _read_preamble(stored))
    file = MappedFile(stored, header.sections)
    model = build_model(header, file)
    problems = list(reference_problems(header, model, file.name))
    if problems:
        raise InvalidFileError(problems)
    file.payloads = [payload for payload, _ in stored_payloads(model)]
    return header, model, file


def _read_preamble(file: StoredFile) -> Preamble:
    name, start = file.name, file.copy(0, PREAMBLE_LENGTH)
    if not start:
        raise InvalidFileError(Problem("empty", "the file is empty", name, remedy=_FETCH_AGAIN))
    if start[: len(MAGIC)] != MAGIC[: len(start)]:
        found, remedy = describe(start)
        expected = f"{MAGIC.hex(' ')} at the start"
        raise InvalidFileError(Problem("bad_magic", "not a packed model", name, None, found, expected, remedy))
    if len(start) < PREAMBLE_LENGTH:
        found, expected = f"{len(start)} bytes", f"at least {PREAMBLE_LENGTH}"
        raise InvalidFileError(Problem("truncated", "the file ends early", name, None, found, expected, _FETCH_AGAIN))
    preamble = Preamble.from_bytes(start)
    if preamble is None:
        message = "the first 64 bytes do not match their checksum"
        raise InvalidFileError(Problem("checksum_mismatch", message, name, "preamble", remedy=_FETCH_AGAIN))
    if preamble.version > VERSION:
        found, expected = f"version {preamble.version}", f"version {VERSION}"
        message, remedy = "written by a newer version", "upgrade cluscomp-export"
        raise InvalidFileError(Problem("newer_version", message, name, None, found, expected, remedy))
    problems = list(_preamble_problems(preamble, file.length, name))
    if problems:
        raise InvalidFileError(problems)
    return preamble


def _preamble_problems(preamble: Preamble, length: int, name: str) -> Iterator[Problem]:
    def problem(kind: str, message: str, found: object, expected: object, remedy: str | None = None) -> Problem:
        return Problem(kind, message, name, "preamble", str(found), str(expected), remedy)

    if preamble.version != VERSION:
        yield problem("bad_version", "unknown version", preamble.version, VERSION)
    if preamble.flags:
        yield problem("unknown_flags", "unknown flags are set", hex(preamble.flags), 0, "upgrade cluscomp-export")
    if any(preamble.reserved):
        yield problem("reserved_not_zero", "reserved bytes are not zero", preamble.reserved.hex(" "), "zeros")
    if length < preamble.file_length:
        yield problem("truncated", "the file ends early", f"{length} bytes", preamble.file_length, _FETCH_AGAIN)
    if length > preamble.file_length:
        yield problem("trailing_bytes", "the file has trailing bytes", f"{length} bytes", preamble.file_length, _FETCH_AGAIN)
    if preamble.header_offset < PREAMBLE_LENGTH or preamble.header_offset % ALIGNMENT:
        expected = f"a multiple of {ALIGNMENT} from {PREAMBLE_LENGTH}"
        yield problem("bad_header_offset", "the header's offset is invalid", preamble.header_offset, expected)
    if preamble.header_length > MAX_HEADER_LENGTH:
        yield problem("header_too_long", "the header is too long", preamble.header_length, f"at most {MAX_HEADER_LENGTH}")
    end = preamble.header_offset + preamble.header_length
    if end != preamble.file_length:
        yield problem("bad_header_length", "the header does not end where the file does", end, preamble.file_length)


def _read_header(file: StoredFile, preamble: Preamble) -> PackedHeader:
    name, data = file.name, file.copy(preamble.header_offset, preamble.header_length)
    crc = zlib.crc32(data)
    if crc != preamble.header_crc32:
        found, expected = f"{crc:08x}", f"{preamble.header_crc32:08x}"
        message = "the checksum of the header does not match"
        raise InvalidFileError(Problem("checksum_mismatch", message, name, "header", found, expected, _FETCH_AGAIN))
    try:
        value = parse_canonical(data)
    except StrictJsonError as error:
        raise InvalidFileError(Problem(error.kind, f"the header: {error}", name, "header")) from None
    header, problems = parse_header(value, name)
    if header is not None:
        problems += layout_problems(header.sections, PREAMBLE_LENGTH, preamble.header_offset, name)
    if header is None or problems:
        raise InvalidFileError(problems)
    return header
