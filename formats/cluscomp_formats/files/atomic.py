"""Write a file so that it is either complete or not there."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

from cluscomp_formats.errors import OutputExistsError, Problem, StorageError
from cluscomp_formats.files.leftovers import clear_leftovers, held, unfinished_name

__all__ = ["atomic_write", "check_output", "check_place", "fsync_folder", "storage_error"]


def check_output(path: Path, *, force: bool) -> None:
    """Refuse an output that exists (unless it is a file and `force`) or that cannot be made; call before any long work.

    A folder, device, pipe or link is never replaced. Clears away what killed attempts at a file that may be written have left.
    Raises OutputExistsError, StorageError.
    """
    problem = _in_the_way(check_place(path), path, force=force)
    if problem is not None:
        raise OutputExistsError(problem)
    clear_leftovers(path, folder=False)
    probe = unfinished_name(path)
    try:
        # Permissions do not tell all: think of network file systems.
        with contextlib.suppress(FileExistsError):
            probe.open("xb").close()
            probe.unlink()
    except OSError as error:
        raise storage_error(path, error) from error


def check_place(path: Path) -> os.stat_result | None:
    """Refuse a place where nothing can be made. What is there now, links not followed, None if nothing is.

    Raises StorageError.
    """
    status = None
    try:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            status = path.lstat()
        is_folder = path.parent.is_dir()
        remedy = f"mkdir -p {path.parent}"
        if not is_folder and os.path.lexists(path.parent):
            raise StorageError(Problem("not_a_folder", "what should be the output's folder is none", str(path.parent)))
    except ValueError as error:
        raise StorageError(Problem("bad_name", f"a name no file can have: {error}", str(path))) from None
    except OSError as error:
        raise storage_error(path, error) from error
    if not is_folder:
        raise StorageError(Problem("no_folder", "the output's folder does not exist", str(path), remedy=remedy))
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise StorageError(Problem("not_writable", "the output's folder is not writable", str(path)))
    return status


def _in_the_way(status: os.stat_result | None, path: Path, *, force: bool) -> Problem | None:
    """What is at the place of a file to be written and must not be replaced."""
    if status is None:
        return None
    if stat.S_ISDIR(status.st_mode):
        return Problem("output_is_folder", "the output is a folder", str(path), remedy="name a file")
    if stat.S_ISLNK(status.st_mode):
        message, remedy = "the output is a link, which is never replaced", "name the file itself, or remove the link"
        return Problem("output_is_link", message, str(path), found=f"a link to {os.path.realpath(path)}", remedy=remedy)
    if not stat.S_ISREG(status.st_mode):
        message = "the output is a device, pipe or socket, which is never replaced"
        return Problem("output_is_device", message, str(path), remedy="name a file; results as JSON go to a pipe with --json")
    if not force:
        remedy = "choose another output, or pass --force to replace it"
        return Problem("output_exists", "the output already exists", str(path), remedy=remedy)
    return None


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
            problem = _in_the_way(check_place(path), path, force=force)
            if problem is not None:
                message = f"{problem.message}: it appeared while the output was being made"
                raise OutputExistsError(replace(problem, message=message))
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


def storage_error(path: Path | None, error: OSError) -> StorageError:
    """The operating system's refusal, about that file if it is known, as a problem with a remedy."""
    remedy = {
        errno.ENOSPC: "free some space, or write to another disk",
        errno.EDQUOT: "free some of your quota, or write to another disk",
        errno.EACCES: "check the permissions of the folder",
        errno.ENAMETOOLONG: "choose a shorter name",
        errno.EROFS: "write to a file system that is not read-only",
    }.get(error.errno or 0)
    return StorageError(Problem("os_error", error.strerror or str(error), None if path is None else str(path), remedy=remedy))
