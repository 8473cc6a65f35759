"""Open model folders. Folders are untrusted; `docs/hf-format.md` says what is checked when."""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from cluscomp_formats.errors import ClusCompError, InvalidFileError, Problem
from cluscomp_formats.files.model_folder import read_inside
from cluscomp_formats.files.regular_file import MAX_JSON_BYTES, check_there, read_whole
from cluscomp_formats.files.side_files import names_in, open_side_files
from cluscomp_formats.hf.assembly import build_model
from cluscomp_formats.hf.quantization import MEMBER, Quantization, parse_quantization, split_config
from cluscomp_formats.hf.spec import CONFIG, INDEX, METHOD, OWN_FILES, RECORD, SINGLE, VERSION
from cluscomp_formats.ir import Array, Model
from cluscomp_formats.limits import file_name_fault
from cluscomp_formats.safetensors.mapped_shards import MappedShard, StoredWeights, open_shard
from cluscomp_formats.strict_json import StrictJsonError, parse_strict

__all__ = ["holds_only_model", "looks_hf", "open_hf"]

_SHARD = re.compile(r"model-\d{5,}-of-\d{5,}\.safetensors", re.ASCII)

RECORD_MEMBERS = ("files", "provenance", "self_test", "version")


def open_hf(folder: Path, *, check: bool = False, weights_only: bool = False) -> Model:
    """Open a model folder as a lazy model.

    The structure is checked immediately, and the problems of each step are reported together. A payload's values are checked
    when it is first read, which may raise InvalidFileError; with `check`, all payloads and the digest are checked immediately.
    The files stay open and are mapped on demand: they may be replaced or deleted while the model is in use, but must not be
    changed in place. With `weights_only`, the folder needs only the configuration and the weights, the files that transformers
    downloads; the model then has no side files, provenance and self-test record.

    Raises InvalidFileError if the folder is not valid; StorageError if it cannot be read.
    """
    check_there(folder)
    if not folder.is_dir():
        raise InvalidFileError(Problem("not_a_folder", "a file, not a folder", str(folder)))
    path = folder / CONFIG
    config, ours = split_config(_read_object(folder, CONFIG))
    quantization = parse_quantization(ours, str(path))
    stored = StoredWeights(_open_shards(folder))
    model = build_model(config, quantization, stored, str(path))
    if not weights_only:
        model = _with_records(model, folder)
    if check:
        _check_content(model, quantization, str(path))
    return model


def looks_hf(folder: Path) -> bool:
    """Return whether `folder` is a folder of this format, by the `quant_method` in its configuration. Never raises."""
    try:
        config = json.loads(read_whole(folder / CONFIG))
    except (ClusCompError, ValueError, RecursionError):
        return False
    quantization = config.get(MEMBER) if isinstance(config, dict) else None
    return isinstance(quantization, dict) and quantization.get("quant_method") == METHOD


def holds_only_model(folder: Path) -> bool:
    """Return whether a folder is of this format without other files, so that deleting it loses only the model. Never raises."""
    try:
        record = json.loads(read_whole(folder / RECORD))
        known = {*OWN_FILES, *record["files"]}
        ours = [name in known or _SHARD.fullmatch(name) is not None for name in names_in(folder)]
    except (ClusCompError, OSError, ValueError, RecursionError, KeyError, TypeError):
        return False
    return all(ours) and looks_hf(folder)


def _read_object(folder: Path, file: str) -> dict[str, Any]:
    """Return the content of a JSON file in the folder.

    Raises InvalidFileError if it is missing or malformed; StorageError if it cannot be read.
    """
    name = str(folder / file)
    try:
        value = parse_strict(read_inside(folder, file, MAX_JSON_BYTES, "download this file of the model as well"))
    except StrictJsonError as error:
        raise InvalidFileError(Problem(error.kind, str(error), name)) from None
    if not isinstance(value, dict):
        raise InvalidFileError(Problem("wrong_type", "not a JSON object", name, found=f"a {type(value).__name__}"))
    return value


def _open_shards(folder: Path) -> dict[str, MappedShard]:
    """Return the shard of each array.

    Raises InvalidFileError with the problems of all shards; StorageError if one cannot be read.
    """
    single, index = os.path.lexists(folder / SINGLE), os.path.lexists(folder / INDEX)
    if single and index:
        message = "there are two sets of weights"
        raise InvalidFileError(Problem("ambiguous_weights", message, str(folder), found=f"{SINGLE} and {INDEX}"))
    if not index:
        shard = open_shard(folder / SINGLE)
        return dict.fromkeys(shard.entries, shard)
    weight_map = _read_index(folder)
    problems: list[Problem] = []
    found: dict[str, MappedShard] = {}
    for name in sorted(set(weight_map.values())):
        try:
            shard = open_shard(folder / name)
        except InvalidFileError as error:
            problems += error.problems
            continue
        for key in shard.entries:
            if weight_map.get(key) == name:
                found[key] = shard
            else:
                message = "the index does not have this array, or has it in another file"
                problems.append(Problem("misplaced_tensor", message, shard.name, key, name, weight_map.get(key)))
    if not problems:
        message = "the index has an array that its file does not have"
        problems += [
            Problem("missing_tensor", message, str(folder / INDEX), key, expected=name)
            for key, name in weight_map.items()
            if key not in found
        ]
    if problems:
        raise InvalidFileError(problems)
    return found


def _read_index(folder: Path) -> dict[str, str]:
    path = folder / INDEX
    weight_map = _read_object(folder, INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        message = "weight_map is missing or empty"
        raise InvalidFileError(Problem("bad_index", message, str(path), None, type(weight_map).__name__, "name -> file"))
    problems = []
    for key, name in weight_map.items():
        fault = _shard_name_fault(name)
        if fault is not None:
            expected = "the plain name of a .safetensors file"
            problems.append(Problem("bad_shard_name", f"the name of a shard {fault}", str(path), key, repr(name), expected))
    if problems:
        raise InvalidFileError(problems)
    return weight_map


def _shard_name_fault(name: Any) -> str | None:
    if not isinstance(name, str):
        return "is not a string"
    fault = file_name_fault(name)
    return fault or (None if name.endswith(".safetensors") else "does not end in .safetensors")


def _with_records(model: Model, folder: Path) -> Model:
    """Return the model with the records and side files of `cluscomp.json`.

    Raises InvalidFileError with every problem found; StorageError if a file cannot be read.
    """
    path = folder / RECORD
    record = _read_object(folder, RECORD)
    version = record.get("version")
    if type(version) is int and version > VERSION:
        message, remedy = "written by a newer version", "upgrade cluscomp-export"
        raise InvalidFileError(Problem("newer_version", message, str(path), None, str(version), str(VERSION), remedy))
    names, provenance, self_test = (record.get(member) for member in ("files", "provenance", "self_test"))
    problems = []
    if sorted(record) != sorted(RECORD_MEMBERS) or version != VERSION or type(version) is not int:
        expected = f"{', '.join(RECORD_MEMBERS)}; version {VERSION}"
        problems.append(Problem("bad_record", "malformed record", str(path), None, ", ".join(record)[:200], expected))
    elif not isinstance(provenance, dict) or not (self_test is None or isinstance(self_test, dict)):
        problems.append(Problem("wrong_type", "provenance or self_test is not an object", str(path)))
    files, faults = open_side_files(folder, names, OWN_FILES, str(path))
    problems += faults
    if problems:
        raise InvalidFileError(problems)
    return replace(model, files=files, provenance=provenance or {}, self_test=self_test)


def _check_content(model: Model, quantization: Quantization, file: str) -> None:
    """Read all payloads. Raises InvalidFileError with every faulty payload, or if the digest does not match."""
    problems = [problem for _, array in model.payloads() for problem in _read_problems(array)]
    if problems:
        raise InvalidFileError(problems)
    digest = model.digest()
    if digest != quantization.digest:
        message, remedy = "the content does not match the digest", "copy, download or convert it again"
        raise InvalidFileError(Problem("digest_mismatch", message, file, MEMBER, digest, quantization.digest, remedy))


def _read_problems(array: Array) -> tuple[Problem, ...]:
    try:
        array.read()
    except InvalidFileError as error:
        return error.problems
    return ()
