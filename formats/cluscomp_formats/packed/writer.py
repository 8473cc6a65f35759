"""Write packed files in one pass: each payload is read once, checked, packed, summed, hashed and written before the next."""

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
    """Write `model` as a packed file, atomically, with no more than about one payload in memory.

    With `self_test`, the callback gets the model as opened from the finished payloads and returns the self-test record to
    store; without, `model.self_test` is kept. `on_progress` gets payload bytes done and in total.

    Raises OutputExistsError and StorageError; InvalidRequestError for a model the format cannot hold: before anything is
    written for names, configuration and shapes, and before the file appears for values (a code past its codebook, NaN in a
    codebook, unsorted outliers). Each payload's loader is called once; what it raises passes through, but an OSError comes
    as a StorageError that names the tensor.
    InvalidFileError, and no output, for a model that is not what its digest claims.
    """
    check_output(path, force=force)
    payloads = list(stored_payloads(model))
    problems = list(request_problems(model, payloads, str(path)))
    if problems:
        raise InvalidRequestError(problems)
    with atomic_write(path, force=force) as stream:
        # The preamble stays zero until the end: an unfinished file is never taken for a model.
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
    """Bytes of the file of `model`, its self-test record included, at most; reads no payload.

    The text of a checksum is counted with ten digits and may have fewer; all else is exact.
    """
    payloads = [payload for payload, _ in stored_payloads(model)]
    sections, end = place_sections(payloads, PREAMBLE_LENGTH)
    header = header_of(model, payloads, sections, NO_DIGEST, model.self_test)
    return (end if sections else PREAMBLE_LENGTH) + len(canonical_json(header_value(header)).encode())


def _write_header(stream: BinaryIO, header: PackedHeader) -> int:
    """Write header and preamble after the sections; the file's length in bytes."""
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
