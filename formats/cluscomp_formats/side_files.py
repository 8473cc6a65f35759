"""Side files of the formats that are folders: tokenizer and the like lie beside the weights, as they are."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cluscomp_formats.atomic import storage_error
from cluscomp_formats.errors import InvalidFileError, Problem
from cluscomp_formats.ir import AnyArray, Array, Model
from cluscomp_formats.packed.payload_stream import read_checked
from cluscomp_formats.packed.payloads import Payload
from cluscomp_formats.packed.spec import file_name_fault

__all__ = ["json_bytes", "open_side_files", "side_file_problems", "write_json", "write_side_files", "write_synced"]

_MAX_FILE_NAME_BYTES = 255


def side_file_problems(model: Model, taken: Collection[str], file: str) -> Iterator[Problem]:
    """Side files that cannot lie beside the format's own files, which are called `taken`."""
    for name in model.files:
        if _is_taken(name, taken):
            message = "the name of a side file is that of a file of the format"
            yield Problem("bad_name", message, file, name, remedy="leave the side file out")
        elif len(name.encode(errors="replace")) > _MAX_FILE_NAME_BYTES:
            message = f"the name of a side file is longer than {_MAX_FILE_NAME_BYTES} bytes"
            yield Problem("bad_name", message, file, name[:200])


def write_side_files(model: Model, folder: Path, output: Path, advance: Callable[[int], None]) -> None:
    """Write the model's side files into `folder`, synced; messages speak of `output`. `advance` gets bytes."""
    for name in sorted(model.files):
        array = model.files[name]
        content = read_checked(Payload(name, "bytes", array.dtype, array.shape), array, output)
        write_synced(folder / name, content.tobytes())
        advance(content.nbytes)


def json_bytes(value: Mapping[str, Any]) -> bytes:
    """JSON for people to read, with sorted keys."""
    text = json.dumps(value, indent=2, sort_keys=True, allow_nan=False)
    return f"{text}\n".encode()


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write `json_bytes`, synced."""
    write_synced(path, json_bytes(value))


def write_synced(path: Path, content: bytes) -> None:
    """Write a file and have it on the disk."""
    with path.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def open_side_files(folder: Path, names: Any, taken: Collection[str], file: str) -> tuple[dict[str, Array], list[Problem]]:
    """The side files that a record in `file` lists, read when asked for, and what is wrong with the list."""
    problems: list[Problem] = []
    files: dict[str, Array] = {}
    for name in names if isinstance(names, list) else [None]:
        if not isinstance(name, str):
            problems.append(Problem("wrong_type", "files is not a list of strings", file, found=repr(names)[:200]))
            continue
        fault = "is taken" if name in files or _is_taken(name, taken) else file_name_fault(name)
        if fault is not None:
            problems.append(Problem("bad_name", f"the name of a side file {fault}", file, found=repr(name)[:200]))
        elif not _is_file(folder / name):
            message = "a side file is not there"
            problems.append(Problem("missing", message, str(folder / name), remedy="get this part of the model too"))
        else:
            files[name] = _lazy_file(folder / name)
    return files, problems


def _is_taken(name: str, taken: Collection[str]) -> bool:
    """Whether a name is one of the format's own, in any case: file systems may not tell."""
    folded = name.casefold()
    return folded in {own.casefold() for own in taken} or folded.endswith(".safetensors")


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:
        # The name is longer than the system takes: names have up to 512 bytes, on most systems 255.
        return False


def _lazy_file(path: Path) -> Array:
    length = path.stat().st_size

    def load() -> AnyArray:
        try:
            content = np.fromfile(path, dtype=np.uint8)
        except OSError as error:
            raise storage_error(path, error) from error
        if content.size != length:
            found, expected = f"{content.size} bytes", f"{length} bytes"
            raise InvalidFileError(Problem("file_changed", "the file changed while open", str(path), None, found, expected))
        return content

    return Array((length,), "uint8", load)
