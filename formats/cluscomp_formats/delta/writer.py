"""Write deltas."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from cluscomp_formats.delta.delta import Delta
from cluscomp_formats.delta.spec import FORMAT, VERSION, array_faults, checksum_of
from cluscomp_formats.errors import InvalidRequestError
from cluscomp_formats.files.atomic import atomic_write
from cluscomp_formats.safetensors.writer import header_bytes, lay_out
from cluscomp_formats.sections.model_problems import json_problems
from cluscomp_formats.strict_json import canonical_json

__all__ = ["write_delta"]


def write_delta(delta: Delta, path: Path, *, force: bool = False) -> int:
    """Write a delta atomically. Return its size in bytes.

    Raises OutputExistsError if the output exists and `force` is False; StorageError if the system refuses to write;
    InvalidRequestError if the format cannot store the delta.
    """
    arrays = dict(sorted(delta.arrays.items()))
    problems = list(json_problems({"record": delta.record}, str(path)))
    problems += [problem for name, array in arrays.items() for problem in array_faults(name, array, str(path))]
    if problems:
        raise InvalidRequestError(problems)
    entries = lay_out({name: (array.dtype, array.shape) for name, array in arrays.items()})
    metadata = {
        "base": delta.base,
        "format": FORMAT,
        "record": canonical_json(delta.record),
        "result": delta.result,
        "version": str(VERSION),
    }
    metadata["sha256"] = checksum_of(metadata, arrays)
    with atomic_write(path, force=force) as stream:
        stream.write(header_bytes(entries, metadata))
        for name in entries:
            stream.write(arrays[name].read().reshape(-1).view(np.uint8).data)
        return stream.tell()
