"""Open deltas. Files are untrusted; `docs/delta-format.md` says what is checked."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cluscomp_formats.delta.delta import Delta
from cluscomp_formats.delta.spec import FORMAT, METADATA, VERSION, array_faults, checksum_of
from cluscomp_formats.errors import InvalidFileError, Problem
from cluscomp_formats.files.regular_file import first_bytes
from cluscomp_formats.ir import DTYPES, AnyArray, Array
from cluscomp_formats.safetensors.mapped_shards import MappedShard, open_shard
from cluscomp_formats.safetensors.spec import LENGTH_BYTES
from cluscomp_formats.strict_json import StrictJsonError, parse_canonical

__all__ = ["is_delta", "open_delta"]

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_BEGINNING = re.compile(rb'\{"__metadata__":\{"base":"[^"]{,80}","format":"cluscomp-delta",')
_BEGINNING_BYTES = 200
_FETCH_AGAIN = "copy or download it again"


def is_delta(path: Path) -> bool:
    """Return whether a file begins like a delta. Never raises."""
    return _BEGINNING.match(first_bytes(path, LENGTH_BYTES + _BEGINNING_BYTES), LENGTH_BYTES) is not None


def open_delta(path: Path) -> Delta:
    """Open a delta and check all of it; values are read on demand.

    Raises InvalidFileError, with every problem found, if the file is not a valid delta; StorageError if it cannot be read.
    """
    shard = open_shard(path)
    base, result, record = _read_metadata(shard)
    arrays = {
        name: Array(entry.shape, entry.dtype, functools.partial(_values, shard, name)) for name, entry in shard.entries.items()
    }
    problems = [problem for name, array in arrays.items() for problem in array_faults(name, array, shard.name)]
    if problems:
        raise InvalidFileError(problems)
    checksum = checksum_of({key: text for key, text in shard.metadata.items() if key != "sha256"}, arrays)
    if checksum != shard.metadata["sha256"]:
        message = "the content does not match the checksum"
        raise InvalidFileError(
            Problem("checksum_mismatch", message, shard.name, None, checksum, shard.metadata["sha256"], _FETCH_AGAIN)
        )
    return Delta(base, result, arrays, record, shard.name)


def _values(shard: MappedShard, name: str) -> AnyArray:
    entry = shard.entries[name]
    # Copied, so that values are aligned and remain valid if the file is truncated later; they are small.
    values: AnyArray = shard.read(name).copy().view(DTYPES[entry.dtype]).reshape(entry.shape)
    return values


def _read_metadata(shard: MappedShard) -> tuple[str, str, Mapping[str, Any]]:
    """Return the digests of base and result, and the record. Raises InvalidFileError if the metadata is malformed."""
    metadata = shard.metadata
    beginning = shard.file.copy(LENGTH_BYTES, _BEGINNING_BYTES)

    def fail(kind: str, message: str, found: object, expected: str, remedy: str | None = None) -> InvalidFileError:
        return InvalidFileError(Problem(kind, message, shard.name, "__metadata__", str(found)[:200], expected, remedy))

    if metadata.get("format") != FORMAT or _BEGINNING.match(beginning) is None:
        expected = f"format {FORMAT}, second in __metadata__, which comes first"
        raise fail("not_a_delta", "not a delta", beginning, expected, "tune a model to make one")
    version = metadata.get("version", "")
    if re.fullmatch(r"[1-9][0-9]{0,8}", version) is None:
        raise fail("bad_version", "unknown version", version, str(VERSION))
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
