"""A file kept open and mapped piece by piece, each piece when it is asked for.

Not as a whole: address space is bounded too (`ulimit -v`), and a model several times larger is still to be read tensor by
tensor. Nor each array for itself: Python holds a file handle for every mapping, and a process may have about a thousand.
"""

from __future__ import annotations

import mmap
import os
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cluscomp_formats.errors import InvalidFileError, Problem
from cluscomp_formats.files.atomic import storage_error
from cluscomp_formats.files.regular_file import open_regular

__all__ = ["Stamp", "StoredFile", "read_again"]

Stamp = tuple[int, int]
"""Of a file: its length in bytes, and when it was last changed, in nanoseconds."""

WINDOW_BYTES = 1 << 26
"""Pieces that lie within one such window share its mapping; others get one of their own. A multiple of all page sizes."""

_FETCH_AGAIN = "copy, download or convert it again"


class StoredFile:
    """An open regular file, `length` bytes long when it was opened; closed when nobody refers to it any more.

    It may be replaced or deleted meanwhile: what was opened is what is read. Raises InvalidFileError if there is no such file
    (with the `remedy`) or it is a folder, pipe or device; StorageError if the system refuses to open it.
    """

    def __init__(self, path: Path, remedy: str | None = None) -> None:
        self.name = str(path)
        self._handle = open_regular(path, remedy)
        weakref.finalize(self, os.close, self._handle)
        status = os.fstat(self._handle)
        self.length = status.st_size
        self.stamp: Stamp = (status.st_size, status.st_mtime_ns)
        """For those who open it again."""
        self._windows: weakref.WeakValueDictionary[int, mmap.mmap] = weakref.WeakValueDictionary()

    def __deepcopy__(self, memo: dict[int, Any]) -> StoredFile:
        """What is stored never changes, and cannot be copied: a copy of a model reads the same file."""
        return self

    def copy(self, offset: int, length: int) -> bytes:
        """At most `length` bytes from byte `offset`, fewer only at the end of the file. Raises StorageError."""
        try:
            with os.fdopen(self._handle, "rb", closefd=False) as stream:
                stream.seek(offset)
                return stream.read(length)
        except OSError as error:
            raise storage_error(Path(self.name), error) from error

    def read(self, offset: int, length: int, owner: str | None = None) -> npt.NDArray[np.uint8]:
        """`length` bytes from byte `offset` as a read-only view of the file, uint8 `[length]`.

        Raises InvalidFileError, about the tensor `owner`, if the file was cut meanwhile; StorageError if it cannot be mapped.
        """
        # Touching a page that is no longer there kills the process (SIGBUS), so look before every read. A file cut between
        # this look and the use of the array cannot be caught.
        size = os.fstat(self._handle).st_size
        if size < max(self.length, offset + length):
            found, expected = f"{size} bytes", f"{max(self.length, offset + length)} bytes"
            message = "the file was cut while open"
            raise InvalidFileError(Problem("file_changed", message, self.name, owner, found, expected, _FETCH_AGAIN))
        if length == 0:
            return np.empty(0, dtype=np.uint8)
        begin = offset - offset % WINDOW_BYTES
        if offset + length <= begin + WINDOW_BYTES:
            mapping = self._windows.get(begin) or self._map(begin, min(WINDOW_BYTES, self.length - begin))
            self._windows[begin] = mapping
        else:
            begin = offset - offset % mmap.ALLOCATIONGRANULARITY
            mapping = self._map(begin, offset + length - begin)
        return np.frombuffer(mapping, dtype=np.uint8, count=length, offset=offset - begin)

    def _map(self, offset: int, length: int) -> mmap.mmap:
        try:
            return mmap.mmap(self._handle, length, access=mmap.ACCESS_READ, offset=offset)
        except ValueError as error:
            # mmap's answer to a file that has just become shorter.
            raise InvalidFileError(Problem("file_changed", f"the file was cut while open: {error}", self.name)) from None
        except OSError as error:
            raise storage_error(Path(self.name), error) from error


def read_again(path: Path, stamp: Stamp, offset: int, length: int, owner: str) -> npt.NDArray[np.uint8]:
    """`length` bytes of a file that had this `stamp` when its header was read, as `StoredFile.read` gives them.

    The file is closed again at once: a model may have more files than a process may have open. The mapping lives as long as the
    array. Raises InvalidFileError, about the tensor `owner`, if the file is another now or gone; StorageError.
    """
    try:
        file = StoredFile(path)
        if file.stamp == stamp:
            return file.read(offset, length, owner)
        found = "it is another now"
    except InvalidFileError as error:
        found = error.problems[0].message
    message, remedy = "the file changed or went away", "leave the source alone until the work is done"
    raise InvalidFileError(Problem("file_changed", message, str(path), owner, found, remedy=remedy))
