"""Open and read untrusted files safely: check their type first, and limit how much is read.

Opening a named pipe waits for a writer, reading a device may never end, and a sparse file of a terabyte needs no disk space but
fills the memory when it is read.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from pathlib import Path

from cluscomp_formats.errors import InvalidFileError, Problem, StorageError
from cluscomp_formats.files.atomic import storage_error

__all__ = ["MAX_JSON_BYTES", "check_there", "first_bytes", "open_regular", "read_whole"]

MAX_JSON_BYTES = 1 << 26
"""Largest configuration, index or record: 64 MB, the size of an index of a million tensors."""

_NOT_THERE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)
_FLAGS = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0)


def check_there(path: Path) -> None:
    """Raise InvalidFileError if there is no file or folder of this name, StorageError if the system cannot determine it."""
    try:
        path.stat()
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno not in _NOT_THERE:
            raise storage_error(path, error) from error
        raise InvalidFileError(_missing(path, None, "no such file or folder")) from None


def open_regular(path: Path, remedy: str | None = None) -> int:
    """Open a regular file for reading and return its handle, to be closed with `os.close`. Links are followed.

    Raises InvalidFileError if it is a folder, pipe, socket or device or, with the `remedy`, if there is no such file;
    StorageError if the system refuses.
    """
    try:
        _check(path, path.stat())
        handle = os.open(path, _FLAGS)
    except ValueError:
        # The name has a zero byte.
        raise InvalidFileError(_missing(path, remedy)) from None
    except OSError as error:
        if error.errno in _NOT_THERE:
            raise InvalidFileError(_missing(path, remedy)) from None
        raise storage_error(path, error) from error
    try:
        # The file may have been replaced since the first check; opening a pipe did not wait then.
        _check(path, os.fstat(handle))
    except BaseException:
        os.close(handle)
        raise
    return handle


def read_whole(path: Path, most: int = MAX_JSON_BYTES, remedy: str | None = None) -> bytes:
    """Return the content of a regular file of at most `most` bytes.

    Raises InvalidFileError if the file is longer or changes while it is read; otherwise as `open_regular`.
    """
    handle = open_regular(path, remedy)
    try:
        with os.fdopen(handle, "rb") as stream:
            length = os.fstat(handle).st_size
            if length > most:
                found, expected = f"{length} bytes", f"at most {most}"
                message, advice = "the file is too long", "it is damaged or of another type: copy or download it again"
                raise InvalidFileError(Problem("file_too_long", message, str(path), None, found, expected, advice))
            content = stream.read(length + 1)
    except OSError as error:
        raise storage_error(path, error) from error
    if len(content) != length:
        message, again = "the file changed while it was read", "do not change it while it is in use"
        found, expected = f"{len(content)} bytes or more", f"{length} bytes"
        raise InvalidFileError(Problem("file_changed", message, str(path), None, found, expected, again))
    return content


def first_bytes(path: Path, count: int) -> bytes:
    """Return the first `count` bytes of a regular file; fewer if it is shorter, none if it cannot be read. Never raises."""
    try:
        handle = open_regular(path)
    except (InvalidFileError, StorageError):
        return b""
    with contextlib.suppress(OSError), os.fdopen(handle, "rb") as stream:
        return stream.read(count)
    return b""


def _check(path: Path, status: os.stat_result) -> None:
    if stat.S_ISDIR(status.st_mode):
        raise InvalidFileError(Problem("is_folder", "a folder, not a file", str(path), remedy="name a file in it"))
    if not stat.S_ISREG(status.st_mode):
        message, remedy = "a device or pipe, not a file", "copy it to a file"
        raise InvalidFileError(Problem("not_a_file", message, str(path), remedy=remedy))


def _missing(path: Path, remedy: str | None, message: str = "no such file") -> Problem:
    with contextlib.suppress(OSError, ValueError):
        target = path.readlink()
        return Problem("missing", "a link that leads nowhere", str(path), found=f"a link to {target}", remedy=remedy)
    return Problem("missing", message, str(path), remedy=remedy)
