"""Which formats there are: those of this package and those other packages bring; see `docs/plugins.md`.

A file's format is found by its content, never by its suffix. Nothing is looked up before the first question.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING

from cluscomp_formats.errors import InvalidFileError, InvalidRequestError, Problem
from cluscomp_formats.files.regular_file import check_there, open_regular
from cluscomp_formats.format import Format
from cluscomp_formats.ir import Model

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

__all__ = ["BUILTIN", "ENTRY_POINTS", "describe_formats", "detect", "find_format", "formats", "open_model"]

BUILTIN = ("packed", "hf", "gguf", "onnx")
"""Packages of this one, each with a `FORMAT` of its name, in the order in which a file is held against them and people see
them. Imported when they are asked for."""

ENTRY_POINTS = "cluscomp_formats"
"""The group of entry points under which packages offer a `Format`."""


@functools.cache
def formats() -> tuple[Format, ...]:
    """All formats: ours, then those of other packages by name of the entry point.

    Looks for the latter once per process. One that cannot be used is left out with a warning that says whose it is.
    """
    # Here: it takes a fifth of the time of importing this package.
    from importlib.metadata import entry_points

    found: list[Format] = [import_module(f"cluscomp_formats.{name}").FORMAT for name in BUILTIN]
    for entry in sorted(entry_points(group=ENTRY_POINTS), key=lambda entry: (entry.name, entry.value)):
        fmt = _plugin(entry, {fmt.name: fmt for fmt in found})
        if isinstance(fmt, Format):
            found.append(fmt)
        else:
            owner = entry.dist.name if entry.dist else "an unknown package"
            warnings.warn(
                f"the format plug-in {entry.name!r} of {owner} is not used: {fmt}; update or uninstall {owner}", stacklevel=2
            )
    return tuple(found)


def _plugin(entry: EntryPoint, taken: Mapping[str, Format]) -> Format | str:
    """The format an entry point offers, or why it cannot be used."""
    try:
        loaded = entry.load()
    except Exception as error:  # noqa: BLE001 - other people's code must not take our own formats along
        return f"{entry.value} cannot be imported ({type(error).__name__}: {error})"
    if not isinstance(loaded, Format):
        return f"{entry.value} is a {type(loaded).__name__}, not a cluscomp_formats.Format"
    if loaded.name in taken:
        return f"there is a format called {loaded.name!r} already, {taken[loaded.name].description}"
    return loaded


def describe_formats() -> str:
    """All formats in a line, for messages."""
    return "; ".join(f"{fmt.name}: {fmt.description}" for fmt in formats())


def find_format(name: str) -> Format:
    """The format of that name. Raises InvalidRequestError, listing the names there are."""
    for fmt in formats():
        if fmt.name == name:
            return fmt
    expected = ", ".join(fmt.name for fmt in formats())
    raise InvalidRequestError(Problem("unknown_format", "no such format", found=repr(name), expected=expected))


def detect(path: Path) -> Format | None:
    """The format `path` is in by its content, or None if no format recognises it."""
    return next((fmt for fmt in formats() if _recognises(fmt, path)), None)


def _recognises(fmt: Format, path: Path) -> bool:
    try:
        return fmt.matches(path)
    except Exception as error:  # noqa: BLE001 - as for its import
        warnings.warn(
            f"the format {fmt.name!r} cannot tell whether {path} is its own ({type(error).__name__}: {error}); "
            "taken for no; update or uninstall the package that brings it",
            stacklevel=4,
        )
        return False


def open_model(path: Path) -> Model:
    """Open a model in any format. Raises InvalidFileError, StorageError."""
    check_there(path)
    fmt = detect(path)
    if fmt is None:
        if not path.is_dir():
            # Those who look at the first bytes do not say why they cannot.
            os.close(open_regular(path))
        remedy = f"an uncompressed model is converted first: cluscomp-export convert {quote(str(path))} model.clus"
        message = "not a codebook model in any known format"
        raise InvalidFileError(Problem("unknown_format", message, str(path), None, None, describe_formats(), remedy))
    return fmt.open(path)
