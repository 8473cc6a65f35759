"""Write a folder so that it is either complete or not there."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from cluscomp_formats.atomic import fsync_folder, storage_error
from cluscomp_formats.errors import OutputExistsError, Problem, StorageError
from cluscomp_formats.leftovers import clear_leftovers, discard_folder, held, old_name, unfinished_name

__all__ = ["atomic_folder", "check_output_folder"]


def check_output_folder(folder: Path, *, force: bool, replaceable: Callable[[Path], bool]) -> None:
    """Refuse an output folder that must not be made; call before any long work.

    An empty folder may be filled. With `force` one with content is replaced if `replaceable(folder)`: what else it might
    hold is never deleted. Clears away what killed attempts at it have left; a folder that one of them was about to replace
    gets its name back. Raises OutputExistsError, StorageError.
    """
    clear_leftovers(folder)
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        problem = Problem("output_is_file", "the output is not a folder", str(folder), remedy="name a folder")
        raise OutputExistsError(problem)
    parent = folder.parent
    if not parent.is_dir():
        problem = Problem("no_folder", "the output's folder does not exist", str(folder), remedy=f"mkdir -p {parent}")
        raise StorageError(problem)
    if not os.access(parent, os.W_OK):
        raise StorageError(Problem("not_writable", "the output's folder is not writable", str(folder)))
    try:
        if not folder.exists() or not any(folder.iterdir()):
            return
    except OSError as error:
        raise storage_error(folder, error) from error
    if not force:
        remedy = "choose another output, or pass --force to replace it"
        raise OutputExistsError(Problem("output_exists", "the output already exists", str(folder), remedy=remedy))
    if not replaceable(folder):
        message = "the folder holds other files than a model of this format; it is not replaced"
        raise OutputExistsError(Problem("output_is_foreign", message, str(folder), remedy="choose another output"))


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
