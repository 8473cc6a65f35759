"""Which formats there are; a file's format is found by its content, never by its suffix."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cluscomp_formats.errors import InvalidFileError, InvalidRequestError, Problem
from cluscomp_formats.ir import Model

__all__ = ["Format", "detect", "find_format", "format_names", "open_model", "register"]


@dataclass(frozen=True)
class Format:
    """A way to store a model: how to recognise it and how to open it.

    `matches(path)` looks at a file's first bytes or a folder's content and must not raise on any input. `open(path)`
    validates and returns a lazy model; it raises InvalidFileError with every problem found.
    """

    name: str
    description: str
    matches: Callable[[Path], bool]
    open: Callable[[Path], Model]


_FORMATS: dict[str, Format] = {}


def register(fmt: Format) -> None:
    """Add a format. Raises ValueError if the name is taken: formats never replace each other silently."""
    if fmt.name in _FORMATS:
        raise ValueError(f"a format called {fmt.name!r} is already registered: {_FORMATS[fmt.name].description}")
    _FORMATS[fmt.name] = fmt


def format_names() -> tuple[str, ...]:
    """Names of all registered formats, in the order they were registered."""
    return tuple(_FORMATS)


def find_format(name: str) -> Format:
    """The format of that name. Raises InvalidRequestError, listing the names there are."""
    if name not in _FORMATS:
        expected = ", ".join(_FORMATS)
        raise InvalidRequestError(Problem("unknown_format", "no such format", found=repr(name), expected=expected))
    return _FORMATS[name]


def detect(path: Path) -> Format | None:
    """The format `path` is in by its content, or None if no registered format recognises it."""
    return next((fmt for fmt in _FORMATS.values() if fmt.matches(path)), None)


def open_model(path: Path) -> Model:
    """Open a model in any registered format. Raises InvalidFileError."""
    if not path.exists():
        raise InvalidFileError(Problem("missing", "no such file or folder", str(path)))
    fmt = detect(path)
    if fmt is None:
        described = "; ".join(f"{fmt.name}: {fmt.description}" for fmt in _FORMATS.values())
        raise InvalidFileError(Problem("unknown_format", "not a model in any known format", str(path), expected=described))
    return fmt.open(path)
