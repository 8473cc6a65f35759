"""Write model folders in one pass: each payload is read once, checked, packed, hashed and written before the next."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluscomp_formats.errors import InvalidRequestError, Problem
from cluscomp_formats.files.atomic_folder import atomic_folder, check_output_folder
from cluscomp_formats.files.side_files import json_bytes, side_file_problems, write_json, write_synced
from cluscomp_formats.hf.quantization import join_config
from cluscomp_formats.hf.reader import holds_only_model, open_hf
from cluscomp_formats.hf.spec import CONFIG, INDEX, OWN_FILES, RECORD, SINGLE, VERSION
from cluscomp_formats.ir import DigestBuilder, Model
from cluscomp_formats.progress import Progress, silent
from cluscomp_formats.safetensors.spec import MAX_HEADER_BYTES, Entry
from cluscomp_formats.safetensors.writer import header_bytes, lay_out
from cluscomp_formats.sections.digest import NO_DIGEST, check_claim, hash_payload
from cluscomp_formats.sections.model_problems import json_problems, model_problems
from cluscomp_formats.sections.payload_stream import (
    SelfTest,
    WriteReport,
    read_checked,
    stored_pieces,
    write_side_files,
)
from cluscomp_formats.sections.stored_arrays import StoredArray, stored_arrays
from cluscomp_formats.strict_json import canonical_json

__all__ = ["SHARD_BYTES", "hf_size", "write_hf"]

SHARD_BYTES = 5_000_000_000
"""Largest size of a shard in bytes, unless a single array is larger."""


def write_hf(
    model: Model,
    folder: Path,
    *,
    force: bool = False,
    self_test: SelfTest | None = None,
    on_progress: Progress = silent,
    shard_bytes: int = SHARD_BYTES,
) -> WriteReport:
    """Write `model` as a folder, atomically, with about one payload in memory at a time.

    If `self_test` is given, it is called with the model as opened from the finished payloads, and its result is stored as the
    self-test record; otherwise `model.self_test` is stored. `on_progress` is called with payload bytes done and in total. An
    empty folder can be filled; with `force`, a folder of this format without other files is replaced.

    Raises OutputExistsError if the output exists and must not be replaced; StorageError if the system refuses to read or write;
    InvalidFileError if the model's digest does not match its recorded one; InvalidRequestError if the format cannot store the
    model. Names, configuration and shapes are checked before anything is written; values (codes out of range, NaN in a
    codebook, unsorted outliers) are checked before the output appears. Each payload's loader is called once; its exceptions are
    passed on, except OSError, which becomes a StorageError that names the tensor.
    """
    check_output_folder(folder, force=force, replaceable=holds_only_model)
    if shard_bytes < 1:
        problem = Problem("bad_option", "the shard size is out of range", found=str(shard_bytes), expected="at least 1 byte")
        raise InvalidRequestError(problem)
    arrays = list(stored_arrays(model))
    problems = list(_request_problems(model, arrays, str(folder)))
    if problems:
        raise InvalidRequestError(problems)
    with atomic_folder(folder, force=force, replaceable=holds_only_model) as temporary:
        progress = _Progress(_payload_bytes(model, arrays), on_progress)
        shards = _shards(arrays, shard_bytes)
        digest = _write_shards(temporary, shards, model, folder, progress)
        if len(shards) > 1:
            write_json(temporary / INDEX, _index_value(shards))
        write_side_files(model, temporary, folder, progress.advance)
        write_json(temporary / CONFIG, join_config(model, digest))
        _write_record(temporary, model, model.self_test if self_test is None else None)
        if self_test is not None:
            record = self_test(open_hf(temporary))
            faults = list(json_problems({"self_test": record}, str(folder)))
            if faults:
                raise InvalidRequestError(faults)
            _write_record(temporary, model, record)
        file_bytes = sum(path.stat().st_size for path in temporary.rglob("*") if path.is_file())
    return WriteReport(folder, digest, file_bytes, progress.total, len(arrays) + len(model.files))


def hf_size(model: Model) -> int:
    """Return the bytes of all files of the folder of `model`, including its self-test record; reads no payload."""
    arrays = list(stored_arrays(model))
    shards = _shards(arrays, SHARD_BYTES)
    total = _payload_bytes(model, arrays) + sum(len(header_bytes(shard.entries())) for shard in shards)
    if len(shards) > 1:
        total += len(json_bytes(_index_value(shards)))
    return total + len(json_bytes(join_config(model, NO_DIGEST))) + len(_record_bytes(model, model.self_test))


def _payload_bytes(model: Model, arrays: Sequence[StoredArray]) -> int:
    return sum(array.payload.stored_bytes for array in arrays) + sum(file.nbytes for file in model.files.values())


@dataclass
class _Progress:
    total: int
    callback: Progress
    done: int = 0

    def advance(self, count: int) -> None:
        self.done += count
        self.callback("writing", self.done, self.total)


@dataclass(frozen=True)
class _Shard:
    name: str
    arrays: Sequence[StoredArray]

    def entries(self) -> dict[str, Entry]:
        """Return the dtype, shape and position of each array."""
        return lay_out({array.key: (array.dtype, array.shape) for array in self.arrays})


def _shards(arrays: Sequence[StoredArray], shard_bytes: int) -> list[_Shard]:
    """Divide the arrays, in canonical order, into shards of limited size, at least one."""
    parts: list[list[StoredArray]] = [[]]
    length = 0
    for array in arrays:
        if parts[-1] and length + array.payload.stored_bytes > shard_bytes:
            parts.append([])
            length = 0
        parts[-1].append(array)
        length += array.payload.stored_bytes
    if len(parts) == 1:
        return [_Shard(SINGLE, parts[0])]
    return [_Shard(f"model-{number:05}-of-{len(parts):05}.safetensors", part) for number, part in enumerate(parts, 1)]


def _index_value(shards: Sequence[_Shard]) -> dict[str, Any]:
    total = sum(array.payload.stored_bytes for shard in shards for array in shard.arrays)
    weight_map = {array.key: shard.name for shard in shards for array in shard.arrays}
    return {"metadata": {"total_size": total}, "weight_map": weight_map}


def _write_shards(folder: Path, shards: Sequence[_Shard], model: Model, output: Path, progress: _Progress) -> str:
    """Write the shards one after the other. Return the model's digest."""
    builder = DigestBuilder(model.config)
    # hashlib releases the interpreter lock, so a payload is hashed while it is packed and written.
    with ThreadPoolExecutor(max_workers=1) as hasher:
        for shard in shards:
            entries = shard.entries()
            header = header_bytes(entries)
            with (folder / shard.name).open("xb") as stream:
                stream.write(header)
                for array in shard.arrays:
                    values = read_checked(array.payload, array.array, output)
                    hashing = hasher.submit(hash_payload, builder, array.payload, array.array, values)
                    # Arrays are read in the digest's order, but stored in an order that aligns them.
                    stream.seek(len(header) + entries[array.key].begin)
                    for piece in stored_pieces(array.payload, values):
                        stream.write(piece)
                        progress.advance(piece.nbytes)
                    hashing.result()
                    del values, piece
                stream.flush()
                os.fsync(stream.fileno())
    digest = builder.digest()
    check_claim(model, digest)
    return digest


def _write_record(folder: Path, model: Model, self_test: Mapping[str, Any] | None) -> None:
    write_synced(folder / RECORD, _record_bytes(model, self_test))


def _record_bytes(model: Model, self_test: Mapping[str, Any] | None) -> bytes:
    # Written in one line, because a self-test record has thousands of numbers.
    value = {"version": VERSION, "files": sorted(model.files), "provenance": model.provenance, "self_test": self_test}
    return f"{canonical_json(value)}\n".encode()


def _request_problems(model: Model, arrays: Sequence[StoredArray], file: str) -> Iterator[Problem]:
    """Yield the problems of the model that can be found without reading payloads."""
    yield from model_problems(model, [(array.payload, array.array) for array in arrays], file)
    yield from side_file_problems(model, OWN_FILES, file)
    owners: dict[str, str] = {"__metadata__": "the safetensors format"}
    for array in arrays:
        if owners.setdefault(array.key, array.payload.owner) != array.payload.owner:
            found, expected = f"{array.key}, also of {owners[array.key]}", "names that differ"
            message = "two arrays would be stored with the same name"
            yield Problem("name_collision", message, file, array.payload.owner, found, expected)
    # Offsets with the longest possible text.
    header = header_bytes({array.key: Entry(array.dtype, array.shape, 1 << 62, 1 << 62) for array in arrays})
    if len(header) > MAX_HEADER_BYTES:
        yield Problem("header_too_long", "the header is too long", file, None, str(len(header)), f"at most {MAX_HEADER_BYTES}")
