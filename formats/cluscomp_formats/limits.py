"""Limits of names and shapes that are common to all formats."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Sequence

__all__ = [
    "MAX_NAME_BYTES",
    "MAX_RANK",
    "SIDE_FOLDER",
    "can_be_shape",
    "file_name_fault",
    "name_fault",
    "side_file_name_fault",
]

MAX_NAME_BYTES = 512
MAX_RANK = 8


def can_be_shape(shape: Sequence[int], item_bytes: int) -> bool:
    """Return whether an array of this shape is possible: at most `MAX_RANK` lengths and fewer than 2^63 bytes.

    Zero lengths are ignored in the product, because numpy rejects shapes whose other lengths overflow.
    """
    return len(shape) <= MAX_RANK and math.prod(length for length in shape if length) * item_bytes < 1 << 63


def name_fault(name: str) -> str | None:
    """Return the fault of the name of a tensor, codebook or side file, None if it has none."""
    if not name:
        return "is empty"
    if any(unicodedata.category(character) in ("Cc", "Cs") for character in name):
        return "has control characters or lone surrogates"
    if len(name.encode()) > MAX_NAME_BYTES:
        return f"is longer than {MAX_NAME_BYTES} bytes of UTF-8"
    return None


def file_name_fault(name: str) -> str | None:
    """Return the fault of the plain name of a file, which must not lead out of the folder it is unpacked to; None if fine."""
    if any(character in name for character in "/\\:") or name in (".", ".."):
        return "is a path; it must be a plain name"
    return name_fault(name)


SIDE_FOLDER = re.compile(r"additional_chat_templates|[0-9]{1,2}_[A-Za-z][A-Za-z0-9]{0,62}")
"""Names of folders for side files: chat templates of transformers, and modules of sentence-transformers such as `1_Pooling`."""


def side_file_name_fault(name: str) -> str | None:
    """Return the fault of the name of a side file, None if it is a plain name or `FOLDER/NAME` with a `SIDE_FOLDER`."""
    folder, slash, plain = name.partition("/")
    if slash and SIDE_FOLDER.fullmatch(folder):
        return file_name_fault(plain) or name_fault(name)
    return file_name_fault(name)
