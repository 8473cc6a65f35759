"""The registry of formats: those of this package and those of plug-ins; see `docs/plugins.md`.

A file's format is recognised by its content, never by its suffix. Formats are imported and plug-ins searched on first use.
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
"""Subpackages with a `FORMAT` each, in the order in which files are tested and formats are listed."""

ENTRY_POINTS = "cluscomp_formats"
"""The entry-point group in which packages register a `Format`."""


@functools.cache
def formats() -> tuple[Format, ...]:
    """Return all formats: the built-in ones, then those of plug-ins, sorted by the name of the entry point.

    Searches plug-ins once per process. A plug-in that cannot be used is omitted, with a warning that names its package.
    """
    # Imported here because it takes a fifth of this package's import time.
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
    """Return the format of an entry point, or the reason why it cannot be used."""
    try:
        loaded = entry.load()
    except Exception as error:  # noqa: BLE001 - a broken plug-in must not break the built-in formats
        return f"{entry.value} cannot be imported ({type(error).__name__}: {error})"
    if not isinstance(loaded, Format):
        return f"{entry.value} is a {type(loaded).__name__}, not a cluscomp_formats.Format"
    if loaded.name in taken:
        return f"there is already a format called {loaded.name!r}: {taken[loaded.name].description}"
    return loaded


def describe_formats() -> str:
    """Return the names and descriptions of all formats in one line, for messages."""
    return "; ".join(f"{fmt.name}: {fmt.description}" for fmt in formats())


def find_format(name: str) -> Format:
    """Return a format by name. Raises InvalidRequestError, listing the known names, if there is none."""
    for fmt in formats():
        if fmt.name == name:
            return fmt
    expected = ", ".join(fmt.name for fmt in formats())
    raise InvalidRequestError(Problem("unknown_format", "no such format", found=repr(name), expected=expected))


def detect(path: Path) -> Format | None:
    """Return the format of `path` by its content, None if no format recognises it."""
    return next((fmt for fmt in formats() if _recognises(fmt, path)), None)


def _recognises(fmt: Format, path: Path) -> bool:
    try:
        return fmt.matches(path)
    except Exception as error:  # noqa: BLE001 - a broken plug-in must not break the built-in formats
        warnings.warn(
            f"the format {fmt.name!r} failed to test whether {path} is its own ({type(error).__name__}: {error}), so it is "
            "skipped; update or uninstall its package",
            stacklevel=4,
        )
        return False


def open_model(path: Path) -> Model:
    """Open a model in any format.

    Raises InvalidFileError if there is no such file, no format recognises it, or it is damaged; StorageError if the system
    refuses to read it.
    """
    check_there(path)
    fmt = detect(path)
    if fmt is None:
        if not path.is_dir():
            # Formats that cannot read the first bytes only return False; opening the file raises the cause.
            os.close(open_regular(path))
        remedy = f"convert an uncompressed model first: cluscomp-export convert {quote(str(path))} model.clus"
        message = "not a codebook model in any known format"
        raise InvalidFileError(Problem("unknown_format", message, str(path), None, None, describe_formats(), remedy))
    return fmt.open(path)
