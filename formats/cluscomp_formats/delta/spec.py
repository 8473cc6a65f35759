"""The constants of the delta format, version 1, its rules for arrays, and its checksum.

The specification is `docs/delta-format.md`.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from cluscomp_formats.errors import Problem
from cluscomp_formats.ir import CODEBOOK_DTYPES, FLOAT_DTYPES, Array
from cluscomp_formats.limits import name_fault
from cluscomp_formats.parameters import KINDS, kind_of
from cluscomp_formats.sections.payloads import is_finite
from cluscomp_formats.strict_json import canonical_json

__all__ = ["FORMAT", "METADATA", "VERSION", "array_faults", "checksum_of"]

FORMAT = "cluscomp-delta"
VERSION = 1
METADATA = ("base", "format", "record", "result", "sha256", "version")
"""Members of `__metadata__`, in the order in which they are stored."""


def array_faults(name: str, array: Array, file: str) -> list[Problem]:
    """Return the problems of one array, at most one."""
    fault = name_fault(name.partition(".")[2])
    if kind_of(name) not in KINDS or fault is not None:
        expected = f"one of {', '.join(KINDS)}, a point, and a name"
        return [Problem("bad_name", f"the name {fault or 'is not of a known kind'}", file, name[:200], expected=expected)]
    dtypes, rank = (CODEBOOK_DTYPES, 2) if kind_of(name) == "codebook" else (FLOAT_DTYPES, 1)
    if array.dtype not in dtypes or len(array.shape) != rank:
        found, expected = f"{array.dtype} {list(array.shape)}", f"{', '.join(dtypes)} of {rank} dimensions"
        return [Problem("wrong_form", f"not a valid {kind_of(name)}", file, name, found, expected)]
    bad = array.size - int(np.count_nonzero(is_finite(array.read(), array.dtype)))
    if bad:
        found = f"{bad} of {array.size} values"
        return [Problem("not_finite", "the values are NaN or infinite", file, name, found, "finite values")]
    return []


def checksum_of(metadata: Mapping[str, str], arrays: Mapping[str, Array]) -> str:
    """Return the SHA-256, as hexadecimal digits, over metadata, dtypes, shapes and values."""
    forms = {name: [array.dtype, list(array.shape)] for name, array in arrays.items()}
    # Imported here: it loads OpenSSL, and a model is loaded without it.
    import hashlib

    checksum = hashlib.sha256(f"{canonical_json([dict(metadata), forms])}\n".encode())
    for name in sorted(arrays):
        checksum.update(arrays[name].read().reshape(-1).view(np.uint8).data)
    return checksum.hexdigest()
