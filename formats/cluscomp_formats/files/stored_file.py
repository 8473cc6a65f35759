"""An open file whose parts are memory-mapped on demand.

The file is not mapped as a whole, because address space may be limited (`ulimit -v`) and a much larger model must still be
readable tensor by tensor. Nor is each array mapped by itself, because Python keeps a file handle for every mapping and a
process may have only about a thousand.
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
"""Length of a file in bytes, and time of its last change in nanoseconds."""

WINDOW_BYTES = 1 << 26
"""Reads within one such window share its mapping; others get their own mapping. A multiple of all page sizes."""

_FETCH_AGAIN = "copy, download or convert it again"


class StoredFile:
    """An open regular file, which had `length` bytes when it was opened. It is closed with the last reference to it.

    If the path is replaced or deleted, reads still use the opened file. Raises InvalidFileError if there is no such file (with
    the `remedy`) or it is a folder, pipe or device; StorageError if the system refuses to open it.
    """

    def __init__(self, path: Path, remedy: str | None = None) -> None:
        self.name = str(path)
        self._handle = open_regular(path, remedy)
        weakref.finalize(self, os.close, self._handle)
        status = os.fstat(self._handle)
        self.length = status.st_size
        self.stamp: Stamp = (status.st_size, status.st_mtime_ns)
        """Identifies the file's content for `read_again`."""
        self._windows: weakref.WeakValueDictionary[int, mmap.mmap] = weakref.WeakValueDictionary()

    def __deepcopy__(self, memo: dict[int, Any]) -> StoredFile:
        """Return the same object: copies of a model read the same file."""
        return self

    def copy(self, offset: int, length: int) -> bytes:
        """Return `length` bytes from byte `offset`, fewer only at the end of the file. Raises StorageError if this fails."""
        try:
            with os.fdopen(self._handle, "rb", closefd=False) as stream:
                stream.seek(offset)
                return stream.read(length)
        except OSError as error:
            raise storage_error(Path(self.name), error) from error

    def read(self, offset: int, length: int, owner: str | None = None) -> npt.NDArray[np.uint8]:
        """Return `length` bytes from byte `offset` as a read-only view of the file, uint8 `[length]`.

        Raises InvalidFileError, about the tensor `owner`, if the file has been truncated; StorageError if it cannot be mapped.
        """
        # Access to a page that no longer exists kills the process (SIGBUS), so check the length before every read. A
        # truncation between this check and the use of the array cannot be detected.
        size = os.fstat(self._handle).st_size
        if size < max(self.length, offset + length):
            found, expected = f"{size} bytes", f"{max(self.length, offset + length)} bytes"
            message = "the file was truncated while open"
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
            # mmap raises ValueError if the file has just become shorter.
            raise InvalidFileError(Problem("file_changed", f"the file was truncated while open: {error}", self.name)) from None
        except OSError as error:
            raise storage_error(Path(self.name), error) from error


def read_again(path: Path, stamp: Stamp, offset: int, length: int, owner: str) -> npt.NDArray[np.uint8]:
    """Return `length` bytes of a file that had this `stamp` when its header was read, as `StoredFile.read` does.

    The file is closed immediately, since a model may have more files than a process may open; the mapping exists as long as the
    array. Raises InvalidFileError, about the tensor `owner`, if the file was changed or deleted; StorageError if it cannot be
    read.
    """
    try:
        file = StoredFile(path)
        if file.stamp == stamp:
            return file.read(offset, length, owner)
        found = "another length or time of change"
    except InvalidFileError as error:
        found = error.problems[0].message
    message, remedy = "the file was changed or deleted", "do not change the source while it is in use"
    raise InvalidFileError(Problem("file_changed", message, str(path), owner, found, remedy=remedy))
