"""The arrays of an open folder, mapped when asked for and checked when first read."""

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
    """An open safetensors file: where its data begins, its arrays, its own metadata."""

    file: StoredFile
    data_begin: int
    entries: Mapping[str, Entry]
    metadata: Mapping[str, str]

    @property
    def name(self) -> str:
        """Its path, for messages."""
        return self.file.name

    def read(self, key: str) -> AnyArray:
        """The stored bytes of an array, uint8 `[bytes]`, mapped. Raises InvalidFileError, StorageError."""
        entry = self.entries[key]
        return self.file.read(self.data_begin + entry.begin, entry.end - entry.begin, key)


def open_shard(path: Path) -> MappedShard:
    """Open a safetensors file and check its header. Raises InvalidFileError, StorageError."""
    file = StoredFile(path, "get this part of the model too")
    length = header_length(file.copy(0, LENGTH_BYTES), file.length, file.name)
    data_begin = LENGTH_BYTES + length
    header = parse_header(file.copy(LENGTH_BYTES, length), file.length - data_begin, file.name)
    return MappedShard(file, data_begin, header.entries, header.metadata)


class StoredWeights:
    """Reads payloads out of open shards by the name of their array.

    `payloads` are set once it is known what each array holds. An array's values are checked when it is first read. The arrays
    handed out may be read-only views of the files.
    """

    def __init__(self, shards: Mapping[str, MappedShard]) -> None:
        self.payloads: Mapping[str, Payload] = {}
        self._shards = shards
        self._sound: set[str] = set()

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
        payload, stored = self.payloads[key], self._shards[key].read(key)
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
