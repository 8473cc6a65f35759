"""A file kept open and mapped piece by piece, each piece when it is asked for.

Not as a whole: address space is bounded too (`ulimit -v`), and a model several times larger is still to be read tensor by
tensor. Nor each array for itself: Python holds a file handle for every mapping, and a process may have about a thousand.
"""

from __future__ import annotations

import mmap
import os
import stat
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cluscomp_formats.atomic import storage_error
from cluscomp_formats.errors import InvalidFileError, Problem

__all__ = ["StoredFile"]

WINDOW_BYTES = 1 << 26
"""Pieces that lie within one such window share its mapping; others get one of their own. A multiple of all page sizes."""

_FETCH_AGAIN = "copy, download or convert it again"


class StoredFile:
    """An open regular file, `length` bytes long when it was opened; closed when nobody refers to it any more.

    It may be replaced or deleted meanwhile: what was opened is what is read. Raises InvalidFileError if there is no such file
    or it is a folder, pipe or device; StorageError if the system refuses to open it.
    """

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        try:
            # Before opening it: opening a named pipe waits for a writer.
            mode = path.stat().st_mode
            if stat.S_ISDIR(mode):
                raise InvalidFileError(Problem("is_folder", "a folder, not a file", self.name, remedy="name a file in it"))
            if not stat.S_ISREG(mode):
                message, remedy = "a device or pipe, not a file", "copy it to a file"
                raise InvalidFileError(Problem("not_a_file", message, self.name, remedy=remedy))
            self._handle = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        except FileNotFoundError:
            raise InvalidFileError(Problem("missing", "no such file", self.name)) from None
        except OSError as error:
            raise storage_error(path, error) from error
        weakref.finalize(self, os.close, self._handle)
        status = os.fstat(self._handle)
        self.length = status.st_size
        self.modified_ns = status.st_mtime_ns
        """When it was last changed, for those who open it again."""
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
