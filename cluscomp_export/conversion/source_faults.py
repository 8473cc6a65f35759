"""Errors about the content of a model, which writers and the runtime find, name the file that the model was read from."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from cluscomp_formats.errors import InvalidFileError, SelfTestError

__all__ = ["faults_of"]


@contextlib.contextmanager
def faults_of(source: Path) -> Iterator[None]:
    """Add the path `source` to the problems of errors that name no file."""
    try:
        yield
    except (InvalidFileError, SelfTestError) as error:
        raise type(error)([replace(problem, file=problem.file or str(source)) for problem in error.problems]) from error
