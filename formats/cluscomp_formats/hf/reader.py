"""Open model folders. Every folder is taken for hostile until checked; see `docs/hf-format.md` for what is checked when."""

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

    The structure is checked at once and the problems of each step are reported together; a payload's values when it is first
    read, which then may raise InvalidFileError, or all of them and the digest now if `check`. The files stay open and are
    mapped array by array: they may be replaced or deleted while the model is in use, but must not be changed in place. With
    `weights_only` the folder needs no more than configuration and weights, which is what transformers downloads; the model
    has no side files, provenance and self-test record then.

    Raises InvalidFileError, StorageError.
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
    """Whether `folder` is a model folder of ours, by the `quant_method` in its configuration. Never raises."""
    try:
        config = json.loads(read_whole(folder / CONFIG))
    except (ClusCompError, ValueError, RecursionError):
        return False
    quantization = config.get(MEMBER) if isinstance(config, dict) else None
    return isinstance(quantization, dict) and quantization.get("quant_method") == METHOD


def holds_only_model(folder: Path) -> bool:
    """Whether a folder is of this format and holds nothing else, so that deleting it loses only the model. Never raises."""
    try:
        record = json.loads(read_whole(folder / RECORD))
        known = {*OWN_FILES, *record["files"]}
        ours = [name in known or _SHARD.fullmatch(name) is not None for name in names_in(folder)]
    except (ClusCompError, OSError, ValueError, RecursionError, KeyError, TypeError):
        return False
    return all(ours) and looks_hf(folder)


def _read_object(folder: Path, file: str) -> dict[str, Any]:
    """The content of one of the folder's JSON files. Raises InvalidFileError, StorageError."""
    name = str(folder / file)
    try:
        value = parse_strict(read_inside(folder, file, MAX_JSON_BYTES, "get this part of the model too"))
    except StrictJsonError as error:
        raise InvalidFileError(Problem(error.kind, str(error), name)) from None
    if not isinstance(value, dict):
        raise InvalidFileError(Problem("wrong_type", "not a JSON object", name, found=f"a {type(value).__name__}"))
    return value


def _open_shards(folder: Path) -> dict[str, MappedShard]:
    """The shard of each array. Raises InvalidFileError with the problems of all shards, StorageError."""
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
                message = "the index has the array in another file, or not at all"
                problems.append(Problem("misplaced_tensor", message, shard.name, key, name, weight_map.get(key)))
    if not problems:
        message = "the index has an array its file does not hold"
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
    """The model with what `cluscomp.json` says and lists. Raises InvalidFileError with every problem found, StorageError."""
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
    """Read everything. Raises InvalidFileError with every payload that is faulty, or for a wrong digest."""
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
