"""Side files of folder formats: the tokenizer and similar files are stored next to the weights, unchanged."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cluscomp_formats.errors import InvalidFileError, Problem, StorageError
from cluscomp_formats.files.model_folder import read_inside
from cluscomp_formats.ir import Array, Model
from cluscomp_formats.limits import SIDE_FOLDER, side_file_name_fault

__all__ = [
    "MAX_SIDE_FILES_BYTES",
    "MAX_SIDE_FILE_BYTES",
    "json_bytes",
    "names_in",
    "open_side_files",
    "read_side_file",
    "side_file_problems",
    "write_json",
    "write_synced",
]

MAX_SIDE_FILE_BYTES = 1 << 28
"""256 MB; the largest tokenizers have about 40 MB."""
MAX_SIDE_FILES_BYTES = 1 << 31
"""2 GB, for all side files together, which are kept in memory."""

_MAX_FILE_NAME_BYTES = 255
_GET_ALL = "download this file of the model as well"


def side_file_problems(model: Model, taken: Collection[str], file: str) -> Iterator[Problem]:
    """Yield a problem for each side file that conflicts with the format's own files, whose names are `taken`."""
    folders = {name.partition("/")[0].casefold() for name in model.files if "/" in name}
    for name in model.files:
        if _is_taken(name, taken) or name.casefold() in folders:
            message = "a side file has the name of a file of the format"
            yield Problem("bad_name", message, file, name, remedy="omit the side file")
        elif len(name.encode(errors="replace")) > _MAX_FILE_NAME_BYTES:
            message = f"the name of a side file is longer than {_MAX_FILE_NAME_BYTES} bytes"
            yield Problem("bad_name", message, file, name[:200])


def json_bytes(value: Mapping[str, Any]) -> bytes:
    """Return indented JSON with sorted keys, for people."""
    text = json.dumps(value, indent=2, sort_keys=True, allow_nan=False)
    return f"{text}\n".encode()


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write `json_bytes(value)` and fsync."""
    write_synced(path, json_bytes(value))


def write_synced(path: Path, content: bytes) -> None:
    """Write a file and fsync it."""
    with path.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def read_side_file(folder: Path, name: str, others: Mapping[str, Array]) -> Array:
    """Read a side file of a model's folder into memory, as uint8 `[bytes]`; later changes of the file have no effect.

    Raises InvalidFileError if it is not a file, is longer than `MAX_SIDE_FILE_BYTES`, exceeds `MAX_SIDE_FILES_BYTES` together
    with the `others`, or is a link out of the folder (see `read_inside`); StorageError if the system refuses to read it.
    """
    most = min(MAX_SIDE_FILE_BYTES, MAX_SIDE_FILES_BYTES - sum(array.nbytes for array in others.values()))
    return Array.of(np.frombuffer(read_inside(folder, name, most, _GET_ALL), dtype=np.uint8))


def open_side_files(folder: Path, names: Any, taken: Collection[str], file: str) -> tuple[dict[str, Array], list[Problem]]:
    """Return the side files that a record in `file` lists, and the problems of the list and of the files."""
    problems: list[Problem] = []
    files: dict[str, Array] = {}
    for name in names if isinstance(names, list) else [None]:
        if not isinstance(name, str):
            problems.append(Problem("wrong_type", "files is not a list of strings", file, found=repr(names)[:200]))
            continue
        fault = "is taken" if name in files or _is_taken(name, taken) else side_file_name_fault(name)
        if fault is not None:
            problems.append(Problem("bad_name", f"the name of a side file {fault}", file, found=repr(name)[:200]))
        else:
            try:
                files[name] = read_side_file(folder, name, files)
            except (InvalidFileError, StorageError) as error:
                problems += error.problems
    return files, problems


def _is_taken(name: str, taken: Collection[str]) -> bool:
    """Return whether a name is that of a file or folder of the format, ignoring case, as some file systems do."""
    first, slash, _ = name.casefold().partition("/")
    return first in {own.casefold() for own in taken} or (not slash and first.endswith(".safetensors"))


def names_in(folder: Path) -> Iterator[str]:
    """Yield the names of everything in a model's folder, as names of side files; a folder that is nested deeper ends in a
    slash.

    Raises OSError if a folder cannot be read.
    """
    for path in folder.iterdir():
        if path.is_dir() and SIDE_FOLDER.fullmatch(path.name) and not path.is_symlink():
            yield from (f"{path.name}/{inner.name}" + "/" * inner.is_dir() for inner in path.iterdir())
        else:
            yield path.name + "/" * path.is_dir()
