"""Check the payloads of a packed file all at once, in parallel, without unpacking codes."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

from cluscomp_formats.errors import InvalidFileError, Problem
from cluscomp_formats.ir import Model
from cluscomp_formats.sections.assembly import SectionLoader
from cluscomp_formats.sections.bits import LargestCode, largest_code
from cluscomp_formats.sections.payloads import stored_payloads

__all__ = ["check_payloads"]


def check_payloads(model: Model, *, workers: int | None = None, largest: LargestCode = largest_code) -> None:
    """Check every payload of a model that lies in the sections of one file (packed, GGUF, ONNX) and was not checked yet.

    Checksums, padding and values are checked in `workers` threads (default: one per core), so that later reads need no check.
    Codes are not unpacked, so little memory is needed. `largest(stream, count, bits)` returns the largest of `count` codes in a
    stream; a faster function can be given. Payloads of other models are checked when they are first read.

    Raises InvalidFileError with the problems of all faulty payloads, StorageError if one cannot be read.
    """
    loaders = [array.loader for _, array in stored_payloads(model)]
    sections = [loader for loader in loaders if isinstance(loader, SectionLoader)]
    # The largest first, so that the threads finish at about the same time.
    order = sorted(range(len(sections)), key=lambda index: -sections[index].stored_bytes)

    def check(index: int) -> tuple[Problem, ...]:
        try:
            sections[index].check(largest)
        except InvalidFileError as error:
            return error.problems
        return ()

    with ThreadPoolExecutor(max_workers=workers or os.cpu_count() or 1) as pool:
        found = dict(zip(order, pool.map(check, order), strict=True))
    problems = [problem for index in range(len(sections)) for problem in found[index]]
    if problems:
        raise InvalidFileError(problems)
