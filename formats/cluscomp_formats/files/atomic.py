"""Write files atomically: an output is either complete or absent."""

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
from cluscomp_formats.files.leftovers import clear_leftovers, locked, unfinished_name

__all__ = ["atomic_write", "check_output", "check_place", "fsync_folder", "storage_error"]


def check_output(path: Path, *, force: bool) -> None:
    """Check an output file before a long job, and remove the leftovers of killed attempts to write it.

    Raises OutputExistsError if the output exists, unless it is a file and `force` is given: folders, devices, pipes and links
    are never replaced. Raises StorageError if the file cannot be created.
    """
    problem = _conflict(check_place(path), path, force=force)
    if problem is not None:
        raise OutputExistsError(problem)
    clear_leftovers(path, folder=False)
    probe = unfinished_name(path)
    try:
        # Permissions do not show everything, for example on network file systems.
        with contextlib.suppress(FileExistsError):
            probe.open("xb").close()
            probe.unlink()
    except OSError as error:
        raise storage_error(path, error) from error


def check_place(path: Path) -> os.stat_result | None:
    """Return the status of what exists at `path`, without following links, None if nothing does.

    Raises StorageError if nothing can be created there.
    """
    status = None
    try:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            status = path.lstat()
        is_folder = path.parent.is_dir()
        remedy = f"mkdir -p {path.parent}"
        if not is_folder and os.path.lexists(path.parent):
            raise StorageError(Problem("not_a_folder", "the parent of the output is not a folder", str(path.parent)))
    except ValueError as error:
        raise StorageError(Problem("bad_name", f"not a valid file name: {error}", str(path))) from None
    except OSError as error:
        raise storage_error(path, error) from error
    if not is_folder:
        raise StorageError(Problem("no_folder", "the output's folder does not exist", str(path), remedy=remedy))
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise StorageError(Problem("not_writable", "the output's folder is not writable", str(path)))
    return status


def _conflict(status: os.stat_result | None, path: Path, *, force: bool) -> Problem | None:
    """Return a problem if an existing file must not be replaced, None otherwise."""
    if status is None:
        return None
    if stat.S_ISDIR(status.st_mode):
        return Problem("output_is_folder", "the output is a folder", str(path), remedy="name a file")
    if stat.S_ISLNK(status.st_mode):
        message, remedy = "the output is a link, which is never replaced", "name the file itself, or remove the link"
        return Problem("output_is_link", message, str(path), found=f"a link to {os.path.realpath(path)}", remedy=remedy)
    if not stat.S_ISREG(status.st_mode):
        message = "the output is a device, pipe or socket, which is never replaced"
        return Problem("output_is_device", message, str(path), remedy="name a file")
    if not force:
        remedy = "choose another output, or replace it with `force=True`"
        return Problem("output_exists", "the output already exists", str(path), remedy=remedy)
    return None


@contextlib.contextmanager
def atomic_write(path: Path, *, force: bool = False) -> Iterator[BinaryIO]:
    """Open a sibling temporary file for writing and reading; fsync and rename it to `path` when the block succeeds.

    If the block fails for any reason, including Ctrl-C, the temporary file is removed and `path` is untouched. The stream's
    `.name` is the path of the temporary file. Raises OutputExistsError or StorageError as `check_output` does; StorageError if
    the system refuses to write.
    """
    check_output(path, force=force)
    temporary = unfinished_name(path)
    try:
        stream = temporary.open("x+b")
    except OSError as error:
        raise storage_error(path, error) from error
    try:
        with locked(temporary):
            with stream:
                yield stream
                stream.flush()
                os.fsync(stream.fileno())
            problem = _conflict(check_place(path), path, force=force)
            if problem is not None:
                message = f"{problem.message}: it was created while the output was written"
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
    """Make creations, renames and removals in a folder durable, if the platform supports it (Windows does not)."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def storage_error(path: Path | None, error: OSError) -> StorageError:
    """Convert an OSError, about the file `path` if known, to a StorageError with a remedy."""
    remedy = {
        errno.ENOSPC: "free some space, or write to another disk",
        errno.EDQUOT: "free some of your quota, or write to another disk",
        errno.EACCES: "check the permissions of the folder",
        errno.ENAMETOOLONG: "choose a shorter name",
        errno.EROFS: "write to a file system that is not read-only",
    }.get(error.errno or 0)
    return StorageError(Problem("os_error", error.strerror or str(error), None if path is None else str(path), remedy=remedy))
