"""Write a file so that it is either complete or not there."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from cluscomp_formats.errors import OutputExistsError, Problem, StorageError
from cluscomp_formats.leftovers import clear_leftovers, held, unfinished_name

__all__ = ["atomic_write", "check_output", "fsync_folder", "storage_error"]


def check_output(path: Path, *, force: bool) -> None:
    """Refuse an output that exists (unless `force`) or whose folder does not; call before any long work.

    Clears away what killed attempts at it have left. Raises OutputExistsError, StorageError.
    """
    clear_leftovers(path)
    if path.is_dir():
        problem = Problem("output_is_folder", "the output is a folder", str(path), remedy="name a file")
        raise OutputExistsError(problem)
    if path.exists() and not force:
        remedy = "choose another output, or pass --force to replace it"
        raise OutputExistsError(Problem("output_exists", "the output already exists", str(path), remedy=remedy))
    if not path.parent.is_dir():
        problem = Problem("no_folder", "the output's folder does not exist", str(path), remedy=f"mkdir -p {path.parent}")
        raise StorageError(problem)
    if not os.access(path.parent, os.W_OK):
        raise StorageError(Problem("not_writable", "the output's folder is not writable", str(path)))


@contextlib.contextmanager
def atomic_write(path: Path, *, force: bool = False) -> Iterator[BinaryIO]:
    """Open a sibling temporary file for writing and reading; fsync and rename it to `path` when the block succeeds.

    When the block fails, for whatever reason, Ctrl-C included, the temporary file is removed and `path` is untouched.
    The stream's `.name` is the temporary file's path. Raises OutputExistsError, StorageError.
    """
    check_output(path, force=force)
    temporary = unfinished_name(path)
    try:
        stream = temporary.open("x+b")
    except OSError as error:
        raise storage_error(path, error) from error
    try:
        with held(temporary):
            with stream:
                yield stream
                stream.flush()
                os.fsync(stream.fileno())
            if path.exists() and not force:
                raise OutputExistsError(Problem("output_exists", "the output appeared while it was being made", str(path)))
            temporary.replace(path)
            fsync_folder(path.parent)
    except OSError as error:
        raise storage_error(path, error) from error
    finally:
        stream.close()
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def fsync_folder(folder: Path) -> None:
    """Make what was made, renamed or removed in a folder durable, where the platform can (Windows cannot open a folder)."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def storage_error(path: Path, error: OSError) -> StorageError:
    """The operating system's refusal as a problem with a remedy."""
    remedy = {
        errno.ENOSPC: "free some space, or write to another disk",
        errno.EDQUOT: "free some of your quota, or write to another disk",
        errno.EACCES: "check the permissions of the folder",
        errno.EROFS: "write to a file system that is not read-only",
    }.get(error.errno or 0)
    return StorageError(Problem("os_error", error.strerror or str(error), str(path), remedy=remedy))
