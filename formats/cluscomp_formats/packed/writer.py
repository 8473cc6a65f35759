"""Write packed files in one pass: each payload is read once, checked, packed, hashed and written before the next."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import BinaryIO

from cluscomp_formats.errors import InvalidRequestError
from cluscomp_formats.files.atomic import atomic_write, check_output
from cluscomp_formats.ir import Model
from cluscomp_formats.packed.reader import open_packed
from cluscomp_formats.packed.spec import PREAMBLE_LENGTH, VERSION, Preamble
from cluscomp_formats.progress import Progress, silent
from cluscomp_formats.sections.digest import NO_DIGEST
from cluscomp_formats.sections.header import PackedHeader, align, header_of, header_value
from cluscomp_formats.sections.model_problems import json_problems, request_problems
from cluscomp_formats.sections.payload_stream import SelfTest, WriteReport
from cluscomp_formats.sections.payloads import stored_payloads
from cluscomp_formats.sections.section_stream import place_sections, write_sections
from cluscomp_formats.strict_json import canonical_json

__all__ = ["packed_size", "write_packed"]


def write_packed(
    model: Model,
    path: Path,
    *,
    force: bool = False,
    self_test: SelfTest | None = None,
    on_progress: Progress = silent,
) -> WriteReport:
    """Write `model` as a packed file, atomically, with about one payload in memory at a time.

    If `self_test` is given, it is called with the model as opened from the finished payloads, and its result is stored as the
    self-test record; otherwise `model.self_test` is stored. `on_progress` is called with payload bytes done and in total.

    Raises OutputExistsError if the output exists and `force` is False; StorageError if the system refuses to read or write;
    InvalidFileError if the model's digest does not match its recorded one; InvalidRequestError if the format cannot store the
    model. Names, configuration and shapes are checked before anything is written; values (codes out of range, NaN in a
    codebook, unsorted outliers) are checked before the output appears. Each payload's loader is called once; its exceptions are
    passed on, except OSError, which becomes a StorageError that names the tensor.
    """
    check_output(path, force=force)
    payloads = list(stored_payloads(model))
    problems = list(request_problems(model, payloads, str(path)))
    if problems:
        raise InvalidRequestError(problems)
    with atomic_write(path, force=force) as stream:
        # The preamble stays zero until the end, so that an incomplete file is not a valid model.
        sections, digest = write_sections(stream, PREAMBLE_LENGTH, model, payloads, path, on_progress)
        record = model.self_test if self_test is None else None
        header = header_of(model, [payload for payload, _ in payloads], sections, digest, record)
        file_bytes = _write_header(stream, header)
        if self_test is not None:
            record = self_test(open_packed(Path(stream.name)))
            faults = list(json_problems({"self_test": record}, str(path)))
            if faults:
                raise InvalidRequestError(faults)
            header = header_of(model, [payload for payload, _ in payloads], sections, digest, record)
            file_bytes = _write_header(stream, header)
    payload_bytes = sum(section.length for section in sections)
    return WriteReport(path, digest, file_bytes, payload_bytes, len(sections))


def packed_size(model: Model) -> int:
    """Return an upper bound of the bytes of the file of `model`, including its self-test record; reads no payload.

    A checksum is counted with ten digits and may have fewer; everything else is exact.
    """
    payloads = [payload for payload, _ in stored_payloads(model)]
    sections, end = place_sections(payloads, PREAMBLE_LENGTH)
    header = header_of(model, payloads, sections, NO_DIGEST, model.self_test)
    return (end if sections else PREAMBLE_LENGTH) + len(canonical_json(header_value(header)).encode())


def _write_header(stream: BinaryIO, header: PackedHeader) -> int:
    """Write the header after the sections, and the preamble. Return the file's length in bytes."""
    data = canonical_json(header_value(header)).encode()
    offset = PREAMBLE_LENGTH
    if header.sections:
        offset = align(header.sections[-1].offset + header.sections[-1].length)
    stream.seek(offset)
    stream.write(data)
    stream.truncate()
    stream.seek(0)
    stream.write(Preamble(VERSION, 0, offset + len(data), offset, len(data), zlib.crc32(data)).to_bytes())
    stream.flush()
    return offset + len(data)
