"""A Hugging Face checkpoint folder on disk: `config.json`, safetensors files with or without an index, side files.

Tensors are lazy. Opening reads the headers of the files one by one and keeps no file open; a payload is mapped, alone, when it
is needed. Side files are small and read immediately. Nothing is ever unpickled.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from cluscomp_export.sources.foreign import ADAPTER_CONFIG, adapter_problem
from cluscomp_export.sources.side_files import read_side_files
from cluscomp_export.sources.special_floats import load_config
from cluscomp_formats.errors import InvalidFileError, Problem, UnsupportedError
from cluscomp_formats.files.model_folder import read_inside
from cluscomp_formats.files.stored_file import Stamp, read_again
from cluscomp_formats.ir import DTYPES, AnyArray, Array
from cluscomp_formats.safetensors.mapped_shards import open_shard
from cluscomp_formats.safetensors.spec import Entry
from cluscomp_formats.strict_json import json_faults
from cluscomp_formats.tokens import with_tokenizer

__all__ = [
    "CONFIG",
    "INDEX",
    "PICKLED_SUFFIXES",
    "Checkpoint",
    "open_checkpoint",
    "pickled_problem",
    "read_config",
]

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

PICKLED_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")

_SHARD = re.compile(r"-\d+-of-\d+\.safetensors$")

_CONVERT_PICKLED = (
    "on a machine where the file may be trusted, run in Python: "
    "from transformers import AutoModelForCausalLM; "
    "AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER, safe_serialization=True)"
)

_T = TypeVar("_T")


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: configuration, lazy tensors and side files by name, and its weight files."""

    config: dict[str, Any]
    tensors: dict[str, Array]
    files: dict[str, Array]
    weight_files: tuple[Path, ...]


@dataclass
class _Headers:
    """What the headers of the weight files declare, and their problems."""

    tensors: dict[str, Array] = field(default_factory=dict)
    owner: dict[str, str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    unsupported: list[Problem] = field(default_factory=list)


def open_checkpoint(folder: Path, weights: Path | None = None) -> Checkpoint:
    """Open the checkpoint in `folder`; `weights` is its only safetensors file, if that has an unusual name.

    Raises InvalidFileError with every problem found, UnsupportedError for tensors with a dtype that the IR does not have.
    """
    problems: list[Problem] = []
    config = _or_problems(read_config, folder, problems)
    index: dict[str, str] | None = None
    shards: list[Path] = []
    if weights is not None:
        shards = [weights]
        if os.path.lexists(folder / INDEX) and _is_one_of_several(weights, _or_problems(_read_index, folder, problems)):
            remedy = f"name the folder instead: {folder}"
            problems.append(Problem("one_of_several", "the file is only a part of a checkpoint", str(weights), remedy=remedy))
    elif os.path.lexists(folder / SINGLE):
        # The same order of preference as transformers.
        shards = [folder / SINGLE]
    elif os.path.lexists(folder / INDEX):
        index = _or_problems(_read_index, folder, problems)
        shards = [folder / name for name in sorted(set((index or {}).values()))]
    else:
        problems.append(_no_weights(folder))

    files = _or_problems(partial(read_side_files, config=config), folder, problems)
    headers = _Headers(problems=problems)
    for shard in shards:
        _read_header(shard, headers)
    if index is not None:
        _check_index(folder / INDEX, index, headers)
    if headers.problems:
        raise InvalidFileError(headers.problems)
    if headers.unsupported:
        raise UnsupportedError(headers.unsupported)
    return Checkpoint(
        config or {}, headers.tensors, with_tokenizer(files or {}, str((config or {}).get("model_type"))), tuple(shards)
    )


def _or_problems(read: Callable[[Path], _T], path: Path, problems: list[Problem]) -> _T | None:
    """`read(path)`, or None after adding its problems to `problems`, so that other problems are reported as well."""
    try:
        return read(path)
    except InvalidFileError as error:
        problems.extend(error.problems)
        return None


def read_config(folder: Path) -> dict[str, Any]:
    """The content of the folder's `config.json`, with numbers that are not finite in the form of transformers.

    Raises InvalidFileError if it is missing, not a file, not JSON or not an object.
    """
    return _read_json_object(folder, CONFIG, "copy the model's config.json next to its weights", load_config)


def _read_json_object(folder: Path, name: str, remedy: str, loads: Callable[[bytes], Any] = json.loads) -> dict[str, Any]:
    path = folder / name
    stored = read_inside(folder, name, remedy=remedy)
    try:
        content = loads(stored)
    except (ValueError, RecursionError) as error:
        problem = Problem("bad_json", "cannot be read as JSON", str(path), found=str(error), remedy=remedy)
        raise InvalidFileError(problem) from error
    if not isinstance(content, dict):
        found = f"a JSON {type(content).__name__}"
        raise InvalidFileError(Problem("bad_json", "not a JSON object", str(path), found=found, expected="an object"))
    fault = next(json_faults(content, "the value"), None)
    if fault is not None:
        message, expected = "contains a value that no format can store", "64-bit integers, finite numbers, valid Unicode"
        raise InvalidFileError(Problem("bad_json", message, str(path), None, f"{fault[0]} is {fault[1]}", expected, remedy))
    return content


def _read_index(folder: Path) -> dict[str, str]:
    """The index's `weight_map`: file name by tensor name. Every file name is checked to stay inside the folder."""
    path, remedy = folder / INDEX, "download the checkpoint again"
    weight_map = _read_json_object(folder, INDEX, remedy).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        found = "nothing" if weight_map is None else "an empty object" if weight_map == {} else type(weight_map).__name__
        expected = "an object that maps tensor names to file names"
        raise InvalidFileError(Problem("bad_index", "weight_map is missing or empty", str(path), None, found, expected, remedy))
    problems = []
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or not _is_plain_name(name):
            expected = "the name of a .safetensors file in the same folder"
            message = "the index names a file outside the folder, or of another type"
            problems.append(Problem("bad_shard_name", message, str(path), tensor, repr(name), expected, remedy))
    if problems:
        raise InvalidFileError(problems)
    return weight_map


def _is_one_of_several(weights: Path, index: dict[str, str] | None) -> bool:
    files = set((index or {}).values())
    return weights.name in files and len(files) > 1


def _is_plain_name(name: str) -> bool:
    """Whether a file name from an untrusted index cannot lead out of its folder, on any platform."""
    return name.endswith(".safetensors") and not any(character in name for character in "/\\:\0")


def _no_weights(folder: Path) -> Problem:
    """Why there is nothing to read in the folder: only pickles, an adapter, differently named files, or no weights at all."""
    pickled = sorted(path.name for path in folder.glob("*") if path.suffix in PICKLED_SUFFIXES)
    if pickled:
        return pickled_problem(folder, pickled)
    if (folder / ADAPTER_CONFIG).exists():
        return adapter_problem(folder)
    others = sorted(path.name for path in folder.glob("*.safetensors") if not path.name.startswith("consolidated"))
    if not others:
        remedy = "download the weights; only plans can do without"
    elif _SHARD.search(others[0]):
        remedy = f"download {INDEX} as well, which lists the files of the model"
    else:
        remedy = f"name the file itself instead of its folder: {others[0]}"
    found = ", ".join(others[:4]) or "no weights"
    return Problem("missing", "no weights under the usual names", str(folder), None, found, f"{SINGLE} or {INDEX}", remedy)


def pickled_problem(path: Path, names: Sequence[str]) -> Problem:
    """The problem of pickled weights, with the way to convert them."""
    message = "the weights are pickled; reading a pickle runs the code in it, so this tool never does"
    return Problem("pickled_checkpoint", message, str(path), None, ", ".join(names[:4]), SINGLE, _CONVERT_PICKLED)


def _read_header(path: Path, headers: _Headers) -> None:
    try:
        shard = open_shard(path)
    except InvalidFileError as error:
        _sort_problems(error, headers)
        return
    for name, entry in shard.entries.items():
        if name in headers.owner:
            found = f"{headers.owner[name]} and {path.name}"
            message = "two files contain a tensor of this name"
            headers.problems.append(Problem("duplicate_tensor", message, str(path), name, found, "one file"))
            continue
        headers.owner[name] = path.name
        load = partial(_read_tensor, path, shard.file.stamp, name, entry, shard.data_begin + entry.begin)
        headers.tensors[name] = Array(entry.shape, entry.dtype, load)


def _sort_problems(error: InvalidFileError, headers: _Headers) -> None:
    """Unknown dtypes may be valid elsewhere, such as float8; every other problem is damage."""
    for problem in error.problems:
        if problem.kind == "unknown_dtype":
            message, remedy = "this dtype is not supported", "start from the unquantised checkpoint"
            headers.unsupported.append(replace(problem, kind="unsupported_dtype", message=message, remedy=remedy))
        else:
            headers.problems.append(problem)


def _read_tensor(path: Path, stamp: Stamp, name: str, entry: Entry, begin: int) -> AnyArray:
    """Map one payload."""
    content = read_again(path, stamp, begin, entry.end - entry.begin, name)
    values = content.view(DTYPES[entry.dtype]).reshape(entry.shape)
    return values if values.flags.aligned else values.copy()


def _check_index(path: Path, index: dict[str, str], headers: _Headers) -> None:
    """Check the index against what the files declare. A tensor that only its file lists is read, as in transformers."""
    unreadable = {problem.file for problem in (*headers.problems, *headers.unsupported)}
    for name, shard in index.items():
        owner = headers.owner.get(name)
        if owner is None and str(path.with_name(shard)) not in unreadable:
            message = "the index lists a tensor that its file does not contain"
            remedy = "download the checkpoint again"
            headers.problems.append(Problem("missing_tensor", message, str(path), name, expected=shard, remedy=remedy))
        elif owner is not None and owner != shard:
            message = "the index lists the tensor in another file than the one that contains it"
            headers.problems.append(Problem("misplaced_tensor", message, str(path), name, owner, shard))
