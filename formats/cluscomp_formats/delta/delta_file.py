"""Deltas: what training changed of a clustered model, its codes aside. The specification is `docs/delta-format.md`.

A delta holds the new values of the parameters (`parameters.py`) that changed, as they are stored in the model. Nothing is
computed when it is applied, so the result is the same bit for bit wherever and to whichever format of the model that is done.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cluscomp_formats.errors import InvalidFileError, InvalidRequestError, Problem
from cluscomp_formats.files.atomic import atomic_write
from cluscomp_formats.files.regular_file import first_bytes
from cluscomp_formats.ir import CODEBOOK_DTYPES, DTYPES, FLOAT_DTYPES, AnyArray, Array, Model, float32_to_bfloat16
from cluscomp_formats.limits import name_fault
from cluscomp_formats.parameters import KINDS, kind_of, parameters, with_parameters
from cluscomp_formats.safetensors.mapped_shards import MappedShard, open_shard
from cluscomp_formats.safetensors.reader import LENGTH_BYTES, header_bytes, lay_out
from cluscomp_formats.sections.model_problems import json_problems
from cluscomp_formats.sections.payloads import is_finite
from cluscomp_formats.strict_json import StrictJsonError, canonical_json, parse_canonical

__all__ = ["Delta", "changes", "combine", "is_delta", "open_delta", "write_delta"]

FORMAT = "cluscomp-delta"
VERSION = 1
METADATA = ("base", "format", "record", "result", "sha256", "version")
"""Members of `__metadata__`, in the order in which they are stored."""

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_BEGINNING = re.compile(rb'\{"__metadata__":\{"base":"[^"]{,80}","format":"cluscomp-delta",')
_BEGINNING_BYTES = 200
_FETCH_AGAIN = "copy or download it again"


@dataclass(frozen=True)
class Delta:
    """Parameters with new values.

    `base` is the digest of the model they belong to, `result` that of the model that has them. `arrays` are the new values by
    name. `record` is a JSON object about how they came about; `file` is where they were read.
    """

    base: str
    result: str
    arrays: Mapping[str, Array]
    record: Mapping[str, Any]
    file: str | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all values."""
        return sum(array.nbytes for array in self.arrays.values())

    def apply(self, model: Model, digest: str | None = None) -> Model:
        """The model with these values; nothing but the digest is computed.

        `digest` is that of `model` where it is known; else what its file claims, else it is computed, which reads the whole
        model. Raises InvalidFileError if the delta belongs to another model or does not fit this one.
        """
        found = digest or model.claimed_digest or model.digest()
        if found != self.base:
            message, remedy = "the delta belongs to another model", "apply it to the model it was trained on, in any format"
            raise InvalidFileError(Problem("other_base", message, self.file, None, found, self.base, remedy))
        known = parameters(model)
        problems = [problem for name, array in self.arrays.items() for problem in self._misfits(name, array, known.get(name))]
        if problems:
            raise InvalidFileError(problems)
        return replace(with_parameters(model, self.arrays), claimed_digest=self.result)

    def _misfits(self, name: str, array: Array, base: Array | None) -> list[Problem]:
        if base is None:
            message = "the model has no such codebook, row scale or norm"
            return [Problem("unknown_parameter", message, self.file, name)]
        if (array.dtype, array.shape) == (base.dtype, base.shape):
            return []
        found, expected = (f"{values.dtype} {list(values.shape)}" for values in (array, base))
        return [Problem("wrong_form", "the model has this in another form", self.file, name, found, expected)]


def changes(base: Model, changed: Model) -> dict[str, Array]:
    """The parameters of `changed` that differ, in any bit, from those of `base`, in memory."""
    old = parameters(base)
    arrays = {}
    for name, array in parameters(changed).items():
        values = array.read()
        if values.tobytes() != old[name].read().tobytes():
            arrays[name] = Array.of(values.copy(), array.dtype)
    return arrays


def combine(model: Model, deltas: Sequence[Delta], weights: Sequence[float], digest: str) -> Model:
    """`model` plus the weighted sum of the differences of several deltas from it (task arithmetic, arXiv 2212.04089).

    `base + sum_i weight_i * (new_i - base)` is computed in float64, in the order given, and rounded to the nearest value of
    the dtype of storage, to bfloat16 by way of float32. One delta of weight 1 is applied as it is. `digest` is that of `model`.
    Raises InvalidFileError as `Delta.apply` does, InvalidRequestError for other than one finite weight per delta or a result
    out of range.
    """
    if len(weights) != len(deltas) or not deltas or not all(np.isfinite(weights)):
        found, expected = f"{len(weights)} for {len(deltas)} deltas", "one finite number for each delta"
        raise InvalidRequestError(Problem("bad_option", "the weights do not fit", found=found, expected=expected))
    applied = [delta.apply(model, digest) for delta in deltas]
    if tuple(weights) == (1,):
        return applied[0]
    base = parameters(model)
    arrays = {}
    for name in sorted(set().union(*(delta.arrays for delta in deltas))):
        old = _to_float64(base[name])
        total = old.copy()
        for delta, weight in zip(deltas, weights, strict=True):
            if name in delta.arrays:
                total += weight * (_to_float64(delta.arrays[name]) - old)
        arrays[name] = Array.of(_rounded(total, base[name].dtype, name), base[name].dtype)
    return with_parameters(model, arrays)


def _to_float64(array: Array) -> npt.NDArray[np.float64]:
    return (array.to_float32() if array.dtype == "bfloat16" else array.read()).astype(np.float64)


def _rounded(values: npt.NDArray[np.float64], dtype: str, name: str) -> AnyArray:
    stored = DTYPES[dtype]
    with np.errstate(all="ignore"):
        if dtype == "bfloat16":
            rounded: AnyArray = float32_to_bfloat16(values.astype(np.float32))
        else:
            rounded = (np.rint(values) if stored.kind == "i" else values).astype(stored)
        in_range = np.rint(values) == rounded if stored.kind == "i" else is_finite(rounded, dtype)
    if not in_range.all():
        message, remedy = f"the weighted sum leaves the range of {dtype}", "give smaller weights"
        raise InvalidRequestError(Problem("out_of_range", message, None, name, remedy=remedy))
    return rounded


def write_delta(delta: Delta, path: Path, *, force: bool = False) -> int:
    """Write a delta, atomically; its size in bytes.

    Raises OutputExistsError, StorageError, InvalidRequestError for what the format cannot hold.
    """
    arrays = dict(sorted(delta.arrays.items()))
    problems = list(json_problems({"record": delta.record}, str(path)))
    problems += [problem for name, array in arrays.items() for problem in _faults(name, array, str(path))]
    if problems:
        raise InvalidRequestError(problems)
    entries = lay_out({name: (array.dtype, array.shape) for name, array in arrays.items()})
    metadata = {
        "base": delta.base,
        "format": FORMAT,
        "record": canonical_json(delta.record),
        "result": delta.result,
        "version": str(VERSION),
    }
    metadata["sha256"] = _checksum(metadata, arrays)
    with atomic_write(path, force=force) as stream:
        stream.write(header_bytes(entries, metadata))
        for name in entries:
            stream.write(arrays[name].read().reshape(-1).view(np.uint8).data)
        return stream.tell()


def is_delta(path: Path) -> bool:
    """Whether a file begins as a delta does. Does not raise."""
    return _BEGINNING.match(first_bytes(path, LENGTH_BYTES + _BEGINNING_BYTES), LENGTH_BYTES) is not None


def open_delta(path: Path) -> Delta:
    """Open a delta and check all of it; values stay on the disk until they are asked for.

    Raises InvalidFileError with every problem found, StorageError.
    """
    shard = open_shard(path)
    base, result, record = _read_metadata(shard)
    arrays = {
        name: Array(entry.shape, entry.dtype, functools.partial(_values, shard, name)) for name, entry in shard.entries.items()
    }
    problems = [problem for name, array in arrays.items() for problem in _faults(name, array, shard.name)]
    if problems:
        raise InvalidFileError(problems)
    checksum = _checksum({key: text for key, text in shard.metadata.items() if key != "sha256"}, arrays)
    if checksum != shard.metadata["sha256"]:
        message = "the content is not what the checksum says"
        raise InvalidFileError(
            Problem("checksum_mismatch", message, shard.name, None, checksum, shard.metadata["sha256"], _FETCH_AGAIN)
        )
    return Delta(base, result, arrays, record, shard.name)


def _values(shard: MappedShard, name: str) -> AnyArray:
    entry = shard.entries[name]
    # A copy: small, aligned, and sound even if the file is cut later.
    values: AnyArray = shard.read(name).copy().view(DTYPES[entry.dtype]).reshape(entry.shape)
    return values


def _read_metadata(shard: MappedShard) -> tuple[str, str, Mapping[str, Any]]:
    """Digests of base and result, and the record. Raises InvalidFileError."""
    metadata = shard.metadata
    beginning = shard.file.copy(LENGTH_BYTES, _BEGINNING_BYTES)

    def fail(kind: str, message: str, found: object, expected: str, remedy: str | None = None) -> InvalidFileError:
        return InvalidFileError(Problem(kind, message, shard.name, "__metadata__", str(found)[:200], expected, remedy))

    if metadata.get("format") != FORMAT or _BEGINNING.match(beginning) is None:
        expected = f"format {FORMAT}, second in __metadata__, which comes first"
        raise fail("not_a_delta", "this is no delta", beginning, expected, "tune a model to make one")
    version = metadata.get("version", "")
    if re.fullmatch(r"[1-9][0-9]{0,8}", version) is None:
        raise fail("bad_version", "there is no such version", version, str(VERSION))
    if int(version) > VERSION:
        raise fail("newer_version", "written by a newer version", version, str(VERSION), "upgrade cluscomp-export")
    if sorted(metadata) != list(METADATA):
        raise fail("bad_metadata", "members are missing or unknown", ", ".join(sorted(metadata)), ", ".join(METADATA))
    for member in ("base", "result"):
        if _DIGEST.fullmatch(metadata[member]) is None:
            expected = "sha256: and 64 hexadecimal digits"
            raise fail("bad_digest", f"the digest {member} is malformed", metadata[member], expected)
    try:
        record = parse_canonical(metadata["record"].encode())
    except StrictJsonError as error:
        raise fail(error.kind, f"the record: {error}", metadata["record"], "canonical JSON") from None
    if not isinstance(record, dict):
        raise fail("wrong_type", "the record is not an object", metadata["record"], "a JSON object")
    return metadata["base"], metadata["result"], record


def _faults(name: str, array: Array, file: str) -> list[Problem]:
    """What is wrong with one array by itself, at most one problem."""
    fault = name_fault(name.partition(".")[2])
    if kind_of(name) not in KINDS or fault is not None:
        expected = f"one of {', '.join(KINDS)}, a point, and a name"
        return [Problem("bad_name", f"the name {fault or 'is of no known kind'}", file, name[:200], expected=expected)]
    dtypes, rank = (CODEBOOK_DTYPES, 2) if kind_of(name) == "codebook" else (FLOAT_DTYPES, 1)
    if array.dtype not in dtypes or len(array.shape) != rank:
        found, expected = f"{array.dtype} {list(array.shape)}", f"{', '.join(dtypes)} of {rank} dimensions"
        return [Problem("wrong_form", f"this is no {kind_of(name)}", file, name, found, expected)]
    bad = array.size - int(np.count_nonzero(is_finite(array.read(), array.dtype)))
    if bad:
        found = f"{bad} of {array.size} values"
        return [Problem("not_finite", "the values are NaN or infinite", file, name, found, "finite values")]
    return []


def _checksum(metadata: Mapping[str, str], arrays: Mapping[str, Array]) -> str:
    """SHA-256, in hexadecimal digits, over metadata, dtypes, shapes and values."""
    forms = {name: [array.dtype, list(array.shape)] for name, array in arrays.items()}
    checksum = hashlib.sha256(f"{canonical_json([dict(metadata), forms])}\n".encode())
    for name in sorted(arrays):
        checksum.update(arrays[name].read().reshape(-1).view(np.uint8).data)
    return checksum.hexdigest()
