"""Write folders atomically: an output is either complete or absent."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

from cluscomp_formats.errors import OutputExistsError, Problem
from cluscomp_formats.files.atomic import check_place, fsync_folder, storage_error
from cluscomp_formats.files.leftovers import (
    clear_leftovers,
    discard_folder,
    locked,
    old_name,
    restore_old_folder,
    unfinished_name,
)

__all__ = ["atomic_folder", "check_output_folder"]


def check_output_folder(folder: Path, *, force: bool, replaceable: Callable[[Path], bool]) -> None:
    """Check an output folder before a long job, and remove the leftovers of killed attempts to write it.

    An empty folder can be filled. With `force`, a folder with content is replaced if `replaceable(folder)` is True, so that
    other files are never deleted. A folder that a killed attempt had moved aside gets its name back. Other leftovers are
    removed if the output passes the check.

    Raises OutputExistsError if the folder exists and must not be replaced; StorageError if it cannot be created.
    """
    # Path(".") has an empty name.
    folder = Path(os.path.abspath(folder))  # noqa: PTH100 - resolve() would follow links
    restore_old_folder(folder)
    status = check_place(folder)
    if status is not None:
        problem = _conflict(status, folder, force=force, replaceable=replaceable)
        if problem is not None:
            raise OutputExistsError(problem)
    clear_leftovers(folder, folder=True)
    probe = unfinished_name(folder)
    try:
        # Permissions do not show everything, for example on network file systems.
        with contextlib.suppress(FileExistsError):
            probe.mkdir()
            probe.rmdir()
    except OSError as error:
        raise storage_error(folder, error) from error


def _conflict(status: os.stat_result, folder: Path, *, force: bool, replaceable: Callable[[Path], bool]) -> Problem | None:
    """Return a problem if an existing output must not be replaced, None otherwise. Raises StorageError."""
    if not stat.S_ISDIR(status.st_mode):
        return Problem("output_is_file", "the output is not a folder", str(folder), remedy="name a folder")
    if os.path.ismount(folder):
        message = "the output is the root of a file system, which cannot be replaced"
        return Problem("output_is_mount", message, str(folder), remedy="name a folder in it")
    try:
        if not any(folder.iterdir()):
            return None
    except OSError as error:
        raise storage_error(folder, error) from error
    if not force:
        remedy = "choose another output, or replace it with `force=True`"
        return Problem("output_exists", "the output already exists", str(folder), remedy=remedy)
    if not replaceable(folder):
        message = "the folder has files that do not belong to a model of this format, so it is not replaced"
        return Problem("output_is_foreign", message, str(folder), remedy="choose another output")
    return None


@contextlib.contextmanager
def atomic_folder(folder: Path, *, force: bool = False, replaceable: Callable[[Path], bool]) -> Iterator[Path]:
    """Create a sibling temporary folder for the block to fill; rename it to `folder` when the block succeeds.

    The block must sync the files it writes. If it fails for any reason, including Ctrl-C, the temporary folder is removed and
    `folder` is untouched. A replaced folder is first renamed and deleted at the end, so that its content exists at every
    moment, under its own or a temporary name. Raises OutputExistsError or StorageError as `check_output_folder` does;
    StorageError if the system refuses to write.
    """
    # Path(".") has an empty name.
    folder = Path(os.path.abspath(folder))  # noqa: PTH100 - resolve() would follow links
    check_output_folder(folder, force=force, replaceable=replaceable)
    temporary, replaced = unfinished_name(folder), old_name(folder)
    try:
        temporary.mkdir()
    except OSError as error:
        raise storage_error(folder, error) from error
    try:
        with contextlib.ExitStack() as holding:
            holding.enter_context(locked(temporary))
            yield temporary
            fsync_folder(temporary)
            check_output_folder(folder, force=force, replaceable=replaceable)
            try:
                if folder.exists():
                    holding.enter_context(locked(folder))
                    folder.rename(replaced)
                temporary.rename(folder)
                fsync_folder(folder.parent)
            finally:
                if replaced.exists() and not folder.exists():
                    replaced.rename(folder)
            if replaced.exists():
                discard_folder(replaced, temporary)
    except OSError as error:
        raise storage_error(folder, error) from error
    finally:
        if temporary.exists():
            discard_folder(temporary, temporary)
