"""Write a folder so that it is either complete or not there."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

from cluscomp_formats.errors import OutputExistsError, Problem
from cluscomp_formats.files.atomic import check_place, fsync_folder, storage_error
from cluscomp_formats.files.leftovers import clear_leftovers, discard_folder, held, old_name, put_back, unfinished_name

__all__ = ["atomic_folder", "check_output_folder"]


def check_output_folder(folder: Path, *, force: bool, replaceable: Callable[[Path], bool]) -> None:
    """Refuse an output folder that must not be made; call before any long work.

    An empty folder may be filled. With `force` one with content is replaced if `replaceable(folder)`: what else it might
    hold is never deleted. A folder that a killed attempt was about to replace gets its name back; what else such attempts have
    left is cleared away if the folder may be made. Raises OutputExistsError, StorageError.
    """
    # The name of "." is empty.
    folder = Path(os.path.abspath(folder))  # noqa: PTH100 - resolve() would follow links
    put_back(folder)
    status = check_place(folder)
    if status is not None:
        problem = _in_the_way(status, folder, force=force, replaceable=replaceable)
        if problem is not None:
            raise OutputExistsError(problem)
    clear_leftovers(folder, folder=True)
    probe = unfinished_name(folder)
    try:
        # Permissions do not tell all: think of network file systems.
        with contextlib.suppress(FileExistsError):
            probe.mkdir()
            probe.rmdir()
    except OSError as error:
        raise storage_error(folder, error) from error


def _in_the_way(status: os.stat_result, folder: Path, *, force: bool, replaceable: Callable[[Path], bool]) -> Problem | None:
    """What is at the place of a folder to be made and must not be replaced. Raises StorageError."""
    if not stat.S_ISDIR(status.st_mode):
        return Problem("output_is_file", "the output is not a folder", str(folder), remedy="name a folder")
    if os.path.ismount(folder):
        message = "the output is where a file system begins, which cannot be replaced"
        return Problem("output_is_mount", message, str(folder), remedy="name a folder in it")
    try:
        if not any(folder.iterdir()):
            return None
    except OSError as error:
        raise storage_error(folder, error) from error
    if not force:
        remedy = "choose another output, or pass --force to replace it"
        return Problem("output_exists", "the output already exists", str(folder), remedy=remedy)
    if not replaceable(folder):
        message = "the folder holds other files than a model of this format; it is not replaced"
        return Problem("output_is_foreign", message, str(folder), remedy="choose another output")
    return None


@contextlib.contextmanager
def atomic_folder(folder: Path, *, force: bool = False, replaceable: Callable[[Path], bool]) -> Iterator[Path]:
    """Make a sibling temporary folder to be filled; rename it to `folder` when the block succeeds.

    The block syncs the files it writes. When it fails, for whatever reason, Ctrl-C included, the temporary folder is removed
    and `folder` is untouched. A folder that is replaced steps aside first and is deleted last, so that its content is
    there, under its own or the temporary name, at every moment. Raises OutputExistsError, StorageError.
    """
    # The name of "." is empty.
    folder = Path(os.path.abspath(folder))  # noqa: PTH100 - resolve() would follow links
    check_output_folder(folder, force=force, replaceable=replaceable)
    temporary, replaced = unfinished_name(folder), old_name(folder)
    try:
        temporary.mkdir()
    except OSError as error:
        raise storage_error(folder, error) from error
    try:
        with contextlib.ExitStack() as holding:
            holding.enter_context(held(temporary))
            yield temporary
            fsync_folder(temporary)
            check_output_folder(folder, force=force, replaceable=replaceable)
            try:
                if folder.exists():
                    holding.enter_context(held(folder))
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
