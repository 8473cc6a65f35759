"""The arrays of an open folder, mapped into memory and checked when first read."""

from __future__ import annotations

import mmap
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cluscomp_formats.atomic import storage_error
from cluscomp_formats.errors import InvalidFileError, Problem
from cluscomp_formats.hf.safetensors import LENGTH_BYTES, Entry, header_length, parse_header
from cluscomp_formats.ir import AnyArray
from cluscomp_formats.packed.payloads import ContentFault, Payload

__all__ = ["MappedShard", "StoredWeights", "open_shard"]

_DAMAGED = "the folder is damaged: copy, download or convert it again"


@dataclass(frozen=True)
class MappedShard:
    """A safetensors file: its path for messages, its mapping, where its data begins, its arrays."""

    name: str
    mapping: mmap.mmap
    data_begin: int
    entries: Mapping[str, Entry]


def open_shard(path: Path) -> MappedShard:
    """Map a safetensors file and check its header. Raises InvalidFileError, StorageError."""
    name = str(path)
    try:
        # Before opening it: opening a named pipe waits for a writer.
        if path.exists() and not path.is_file():
            raise InvalidFileError(Problem("not_a_file", "a folder, device or pipe, not a file", name))
        with path.open("rb") as stream:
            length = os.fstat(stream.fileno()).st_size
            header = header_length(stream.read(LENGTH_BYTES), length, name)
            data_begin = LENGTH_BYTES + header
            entries = parse_header(stream.read(header), length - data_begin, name)
            mapping = mmap.mmap(stream.fileno(), length, access=mmap.ACCESS_READ)
    except FileNotFoundError:
        raise InvalidFileError(Problem("missing", "no such file", name, remedy="get this part of the model too")) from None
    except OSError as error:
        raise storage_error(path, error) from error
    except ValueError:
        # mmap's answer to a file that has become shorter than `length`.
        raise InvalidFileError(Problem("file_changed", "the file was cut while being opened", name)) from None
    return MappedShard(name, mapping, data_begin, entries)


class StoredWeights:
    """Reads payloads out of mapped shards by the name of their array.

    `payloads` are set once it is known what each array holds. An array's values are checked when it is first read. The arrays
    handed out may be read-only views of a mapping, which lives as long as any of them.
    """

    def __init__(self, shards: Mapping[str, MappedShard]) -> None:
        self.payloads: Mapping[str, Payload] = {}
        self._shards = shards
        self._sound: set[str] = set()

    def __deepcopy__(self, memo: dict[int, Any]) -> StoredWeights:
        """What is mapped never changes, and cannot be copied: a copy of a model reads the same files."""
        return self

    def __contains__(self, key: object) -> bool:
        return key in self._shards

    def keys(self) -> set[str]:
        """The names of all arrays."""
        return set(self._shards)

    def entry(self, key: str) -> Entry:
        """What the header says of an array."""
        return self._shards[key].entries[key]

    def file(self, key: str) -> str:
        """The path of the file that holds an array."""
        return self._shards[key].name

    def read(self, key: str) -> AnyArray:
        """The values of an array, codes unpacked. Raises InvalidFileError."""
        payload, shard, entry = self.payloads[key], self._shards[key], self.entry(key)
        # Touching a page that is no longer there kills the process (SIGBUS), so look before every read. A file cut between
        # this look and the use of the array cannot be caught.
        if shard.mapping.size() < len(shard.mapping):
            expected = f"{len(shard.mapping)} bytes"
            fault = ContentFault("file_changed", "the file was cut while open", f"{shard.mapping.size()} bytes", expected)
            raise self._error(key, fault)
        length = entry.end - entry.begin
        stored = np.frombuffer(shard.mapping, dtype=np.uint8, count=length, offset=shard.data_begin + entry.begin)
        if key in self._sound:
            return _aligned(payload.unpack(stored))
        fault_or_none = payload.padding_fault(stored)
        if fault_or_none is not None:
            raise self._error(key, fault_or_none)
        values = _aligned(payload.unpack(stored))
        fault_or_none = payload.content_fault(values)
        if fault_or_none is not None:
            raise self._error(key, fault_or_none)
        self._sound.add(key)
        return values

    def _error(self, key: str, fault: ContentFault) -> InvalidFileError:
        owner = self.payloads[key].owner
        return InvalidFileError(
            Problem(fault.kind, fault.message, self.file(key), owner, fault.found, fault.expected, _DAMAGED)
        )


def _aligned(values: AnyArray) -> AnyArray:
    """Our writer aligns arrays to their items, but safetensors does not demand it, and kernels do."""
    return values if values.flags.aligned else values.copy()
