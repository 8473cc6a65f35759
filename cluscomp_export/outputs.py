"""Checks, before the job, that a command does not write to its inputs or write two outputs to one place."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from cluscomp_export.sources import source_files
from cluscomp_formats.errors import InvalidRequestError, Problem
from cluscomp_formats.files.atomic import storage_error

__all__ = ["check_apart"]


def check_apart(outputs: Iterable[Path | None], inputs: Iterable[Path | None]) -> None:
    """Check the outputs of a command against its inputs and against each other. None stands for an output or input not given.

    An output must not be an input or a file of an input model, also through links. It must not be inside an input folder or
    contain an input. Two outputs must not be the same, or one inside the other. Raises InvalidRequestError, StorageError.
    """
    wanted = [path for path in outputs if path is not None]
    given = [path for path in inputs if path is not None and os.path.lexists(path)]
    problems = [problem for output in wanted for path in given if (problem := _clash(output, path)) is not None]
    for number, output in enumerate(wanted):
        for other in wanted[:number]:
            if _within(output, other) or _within(other, output):
                message, remedy = "two outputs of this command have the same place", "name another file for one of them"
                problems.append(Problem("one_output", message, str(output), found=str(other), remedy=remedy))
    if problems:
        raise InvalidRequestError(problems[0])


def _clash(output: Path, path: Path) -> Problem | None:
    """The conflict between an output and an input, if any. Raises StorageError."""
    kind, message, remedy = "output_is_source", "the output is one of the inputs", "name another output"
    found = path
    if not _same(output, path):
        if _within(output, path):
            kind, message = "output_in_source", "the output is inside the source's folder, which is never changed"
            remedy = f"name a place outside {path}"
        elif _within(path, output):
            kind, message = "source_in_output", "the source is inside the output"
        else:
            file = _same_file(output, path)
            if file is None:
                return None
            message, found = "the output is a file of the source", file
    return Problem(kind, message, str(output), found=str(found), remedy=remedy)


def _same_file(output: Path, path: Path) -> Path | None:
    """The file of an input that is also the output, through a link as in the cache of the Hugging Face Hub."""
    if not os.path.lexists(output):
        return None
    try:
        return next((file for file in _files(path) if _same(output, file)), None)
    except OSError as error:
        raise storage_error(path, error) from error


def _files(path: Path) -> Iterator[Path]:
    if not path.is_dir():
        yield from source_files(path)
        return
    for folder, names, files in os.walk(path):
        yield from (Path(folder, name) for name in files)
        if Path(folder) != path:
            # No format has deeper folders.
            names.clear()


def _within(path: Path, folder: Path) -> bool:
    """Whether `path` is `folder` or inside it."""
    return _real(path).is_relative_to(_real(folder))


def _same(first: Path, second: Path) -> bool:
    if _real(first) == _real(second):
        return True
    try:
        # A hard link, or a name that the file system treats as the same.
        return first.samefile(second)
    except (OSError, ValueError):
        return False


def _real(path: Path) -> Path:
    try:
        return Path(os.path.realpath(path))
    except (OSError, ValueError):
        # The writer reports invalid names.
        return path
