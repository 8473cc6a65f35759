"""The arrays of open safetensors files, mapped on demand and checked when they are first read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cluscomp_formats.errors import InvalidFileError, Problem
from cluscomp_formats.files.stored_file import StoredFile
from cluscomp_formats.ir import AnyArray
from cluscomp_formats.safetensors.reader import header_length, parse_header
from cluscomp_formats.safetensors.spec import LENGTH_BYTES, Entry
from cluscomp_formats.sections.payloads import ContentFault, Payload

__all__ = ["MappedShard", "StoredWeights", "open_shard"]

_DAMAGED = "the folder is damaged: copy, download or convert it again"


@dataclass(frozen=True)
class MappedShard:
    """An open safetensors file: the offset of its data in bytes, its arrays, and its metadata."""

    file: StoredFile
    data_begin: int
    entries: Mapping[str, Entry]
    metadata: Mapping[str, str]

    @property
    def name(self) -> str:
        """Path of the file, for messages."""
        return self.file.name

    def read(self, key: str) -> AnyArray:
        """Return the stored bytes of an array, uint8 `[bytes]`, as a read-only view of the file.

        Raises InvalidFileError if the file was truncated; StorageError if it cannot be mapped.
        """
        entry = self.entries[key]
        return self.file.read(self.data_begin + entry.begin, entry.end - entry.begin, key)


def open_shard(path: Path) -> MappedShard:
    """Open a safetensors file and check its header.

    Raises InvalidFileError if it is missing or malformed; StorageError if it cannot be read.
    """
    file = StoredFile(path, "download this file of the model as well")
    length = header_length(file.copy(0, LENGTH_BYTES), file.length, file.name)
    data_begin = LENGTH_BYTES + length
    header = parse_header(file.copy(LENGTH_BYTES, length), file.length - data_begin, file.name)
    return MappedShard(file, data_begin, header.entries, header.metadata)


class StoredWeights:
    """Reads payloads from open shards, by the names of their arrays.

    `payloads` must be set before values are read. An array's values are checked when it is first read. The returned arrays may
    be read-only views of the files.
    """

    def __init__(self, shards: Mapping[str, MappedShard]) -> None:
        self.payloads: Mapping[str, Payload] = {}
        self._shards = shards
        self._checked: set[str] = set()

    def __contains__(self, key: object) -> bool:
        return key in self._shards

    def keys(self) -> set[str]:
        """Return the names of all arrays."""
        return set(self._shards)

    def entry(self, key: str) -> Entry:
        """Return the header's entry of an array."""
        return self._shards[key].entries[key]

    def file(self, key: str) -> str:
        """Return the path of an array's file."""
        return self._shards[key].name

    def read(self, key: str) -> AnyArray:
        """Return the values of an array, with codes unpacked. Raises InvalidFileError if they violate a rule."""
        payload, stored = self.payloads[key], self._shards[key].read(key)
        if key in self._checked:
            return _aligned(payload.unpack(stored))
        fault_or_none = payload.padding_fault(stored)
        if fault_or_none is not None:
            raise self._error(key, fault_or_none)
        values = _aligned(payload.unpack(stored))
        fault_or_none = payload.content_fault(values)
        if fault_or_none is not None:
            raise self._error(key, fault_or_none)
        self._checked.add(key)
        return values

    def _error(self, key: str, fault: ContentFault) -> InvalidFileError:
        owner = self.payloads[key].owner
        return InvalidFileError(
            Problem(fault.kind, fault.message, self.file(key), owner, fault.found, fault.expected, _DAMAGED)
        )


def _aligned(values: AnyArray) -> AnyArray:
    """Copy an unaligned array: kernels require alignment. Our writer aligns arrays, but the format does not require it."""
    return values if values.flags.aligned else values.copy()
