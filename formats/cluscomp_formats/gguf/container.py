"""Parse the GGUF container, metadata and tensor directory, defensively.

Follows the GGUF specification, versions 2 and 3, little-endian (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md).
gguf-py's own reader trusts every length and offset in the file. This parser checks each against the file's size before it is
used, so that no damaged file can crash the reader, make it allocate unlimited memory, or return bytes of another tensor. The
numbers and block sizes of quantised types are gguf-py's.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from cluscomp_formats.errors import ClusCompError, InvalidFileError, Problem, UnsupportedError
from cluscomp_formats.files.regular_file import open_regular
from cluscomp_formats.files.stored_file import Stamp

__all__ = ["MAGIC", "Container", "StoredTensor", "architecture_of", "gguf_package", "read_container"]

MAGIC = b"GGUF"

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
"""Metadata value types by number, as struct formats."""

_PLAIN_TYPES = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    30: ("BF16", 1, 2),
}
"""ggml types without blocks, by number: name, weights per block, bytes per block. Native files use only these, so that reading
them does not need gguf-py."""

MAX_METADATA_BYTES = 1 << 28
"""256 MB; the metadata of the largest vocabularies has about 30 MB."""
_STRING, _ARRAY = 8, 9
_MAX_DIMS = 4
_MIN_PAIR_BYTES = 8 + 1 + 4 + 1
_MIN_TENSOR_BYTES = 8 + 1 + 4 + 8 + 4 + 8
_DEFAULT_ALIGNMENT = 32
_DAMAGED = "download the file again, and compare its checksum"


@dataclass(frozen=True)
class StoredTensor:
    """One entry of the tensor directory.

    `shape` is row-major; `offset` is in bytes from the start of the file; `stamp` is that of the file.
    """

    name: str
    shape: tuple[int, ...]
    type_name: str
    type_number: int
    path: Path
    offset: int
    nbytes: int
    bits_per_weight: float
    stamp: Stamp


@dataclass(frozen=True)
class Container:
    """The content of a GGUF file: metadata and tensor directory."""

    metadata: dict[str, Any]
    tensors: dict[str, StoredTensor]


def gguf_package() -> Any:
    """Return the package gguf. Raises UnsupportedError if it is not installed."""
    try:
        import gguf
    except ImportError as error:
        remedy = "pip install cluscomp-export[gguf]"
        raise UnsupportedError(Problem("no_gguf", "GGUF files need the package gguf", remedy=remedy)) from error
    return gguf


def read_container(path: Path) -> Container:
    """Parse a file's metadata and tensor directory, without reading tensors.

    Raises InvalidFileError if the file is not GGUF, truncated or damaged; UnsupportedError if it has another version or byte
    order, or tensor types that gguf-py does not know.
    """
    with os.fdopen(open_regular(path), "rb") as stream:
        cursor = _Cursor(path, stream)
        if cursor.size == 0:
            found = "an empty file"
            raise InvalidFileError(Problem("bad_magic", "not a GGUF file", str(path), None, found, repr(MAGIC)))
        start = cursor.take(len(MAGIC), "the magic")
        if start != MAGIC:
            raise InvalidFileError(Problem("bad_magic", "not a GGUF file", str(path), None, repr(start), repr(MAGIC)))
        _check_version(path, cursor.number("<I", "the version"))
        num_tensors, num_pairs = cursor.number("<Q", "the tensor count"), cursor.number("<Q", "the metadata count")
        cursor.need(num_pairs * _MIN_PAIR_BYTES, f"{num_pairs} metadata entries")
        metadata: dict[str, Any] = {}
        for _ in range(num_pairs):
            key = cursor.name("a metadata key")
            if key in metadata:
                cursor.fail("duplicate_key", f"the metadata key {key!r} occurs twice")
            metadata[key] = cursor.value(cursor.number("<I", f"the type of {key}"), key)
        cursor.need(num_tensors * _MIN_TENSOR_BYTES, f"{num_tensors} tensors")
        entries = [_read_entry(cursor) for _ in range(num_tensors)]
        return Container(metadata, _place(path, entries, cursor.at, cursor.stamp, _alignment(cursor, metadata)))


def architecture_of(path: Path) -> str | None:
    """Return `general.architecture` of a GGUF file, None if `path` is not a GGUF file or has no such key.

    Reads the file only up to that key. Never raises: opening the file reports its errors.
    """
    try:
        with os.fdopen(open_regular(path), "rb") as stream:
            cursor = _Cursor(path, stream)
            if cursor.take(4, "the magic") != MAGIC:
                return None
            _check_version(path, cursor.number("<I", "the version"))
            cursor.number("<Q", "the tensor count")
            for _ in range(cursor.number("<Q", "the metadata count")):
                key = cursor.name("a metadata key")
                value = cursor.value(cursor.number("<I", key), key)
                if key == "general.architecture":
                    return value if isinstance(value, str) else None
    except (ClusCompError, OSError, ValueError):
        return None
    return None


class _Cursor:
    """Reads untrusted bytes sequentially; every read is first checked against the end of the file."""

    def __init__(self, path: Path, stream: BinaryIO) -> None:
        self.path, self.stream, self.at = path, stream, 0
        status = os.fstat(stream.fileno())
        self.size = status.st_size
        self.stamp: Stamp = (status.st_size, status.st_mtime_ns)

    def fail(self, kind: str, message: str, found: str | None = None, expected: str | None = None) -> NoReturn:
        raise InvalidFileError(Problem(kind, message, str(self.path), None, found, expected, _DAMAGED))

    def need(self, size: int, what: str) -> None:
        """Raise unless the file has `size` more bytes; called before anything of that size is read or allocated."""
        left = self.size - self.at
        if size > left:
            self.fail("truncated", f"the file ends within {what}", f"{left} bytes left", f"at least {size}")
        if self.at + size > MAX_METADATA_BYTES:
            # A sparse file can have any length, so the file's length does not limit memory.
            message = "metadata and tensor directory are too long"
            self.fail("metadata_too_long", message, f"{self.at + size} bytes", f"at most {MAX_METADATA_BYTES}")

    def take(self, size: int, what: str) -> bytes:
        self.need(size, what)
        piece = self.stream.read(size)
        if len(piece) < size:
            self.fail("file_changed", f"the file was truncated while {what} was read")
        self.at += size
        return piece

    def number(self, layout: str, what: str) -> Any:
        return struct.unpack(layout, self.take(struct.calcsize(layout), what))[0]

    def string(self, what: str) -> str:
        """Read a string of the metadata. Invalid UTF-8, which tokens may have, is preserved as surrogates."""
        return self.take(self.number("<Q", what), what).decode("utf-8", "surrogateescape")

    def name(self, what: str) -> str:
        """Read a key or tensor name, which must be non-empty, valid UTF-8 and printable."""
        text = self.string(what)
        if not text or not text.isprintable():
            self.fail("bad_name", f"{what} is empty or not printable text", ascii(text[:80]))
        return text

    def value(self, type_number: int, key: str) -> Any:
        """Read a metadata value; arrays become lists. Nested arrays are rejected, as in ggml."""
        if type_number == _STRING:
            return self.string(key)
        if type_number in _SCALARS:
            return self.number(_SCALARS[type_number], key)
        if type_number != _ARRAY:
            self.fail("bad_value_type", f"the metadata key {key!r} has an unknown type", str(type_number), "0 to 12")
        item_type, count = self.number("<I", key), self.number("<Q", key)
        if item_type == _STRING:
            self.need(8 * count, f"{count} strings of {key}")
            return [self.string(key) for _ in range(count)]
        if item_type not in _SCALARS:
            self.fail("bad_value_type", f"the array {key!r} has items of an unknown type", str(item_type), "a scalar or string")
        layout = _SCALARS[item_type]
        payload = self.take(count * struct.calcsize(layout), f"{count} items of {key}")
        return [item for (item,) in struct.iter_unpack(layout, payload)]


def _check_version(path: Path, version: int) -> None:
    if version in (2, 3):
        return
    if version & 0xFFFF == 0 and version:
        message, remedy = "a big-endian GGUF file", "convert it with gguf-convert-endian, which comes with gguf-py"
        raise UnsupportedError(Problem("big_endian", message, str(path), expected="little-endian", remedy=remedy))
    remedy = "convert the model again with a current llama.cpp"
    problem = Problem("bad_version", "this GGUF version is not supported", str(path), None, str(version), "2 or 3", remedy)
    raise UnsupportedError(problem)


def _alignment(cursor: _Cursor, metadata: dict[str, Any]) -> int:
    alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    if type(alignment) is not int or alignment <= 0 or alignment & (alignment - 1):
        cursor.fail("bad_alignment", "general.alignment is not a power of two", ascii(alignment))
    return alignment


@dataclass(frozen=True)
class _Entry:
    """A directory entry as stored: `offset` is relative to the start of the data section."""

    name: str
    shape: tuple[int, ...]
    type_number: int
    offset: int


def _read_entry(cursor: _Cursor) -> _Entry:
    name = cursor.name("a tensor name")
    num_dims = cursor.number("<I", f"the shape of {name}")
    if not 1 <= num_dims <= _MAX_DIMS:
        cursor.fail("bad_shape", f"the tensor {name} has a bad number of dimensions", str(num_dims), f"1 to {_MAX_DIMS}")
    # ggml stores the fastest-varying dimension first.
    shape = tuple(cursor.number("<Q", f"the shape of {name}") for _ in range(num_dims))[::-1]
    return _Entry(name, shape, cursor.number("<I", f"the type of {name}"), cursor.number("<Q", f"the offset of {name}"))


def _place(path: Path, entries: list[_Entry], header_end: int, stamp: Stamp, alignment: int) -> dict[str, StoredTensor]:
    """Return the tensors of the entries, after checking that each is inside the file, aligned and not overlapping others."""
    size = stamp[0]
    start = -(-header_end // alignment) * alignment
    problems: list[Problem] = []
    unsupported: list[Problem] = []
    tensors: dict[str, StoredTensor] = {}
    end, last = start, "the header"
    for entry in sorted(entries, key=lambda entry: entry.offset):

        def wrong(kind: str, message: str, found: object, expected: object, name: str = entry.name) -> None:
            problems.append(Problem(kind, message, str(path), name, str(found), str(expected), _DAMAGED))

        layout = _block_layout(entry.type_number)
        if layout is None:
            expected = "a type gguf-py knows"
            message, found = "this tensor type is not supported", str(entry.type_number)
            unsupported.append(Problem("unsupported_type", message, str(path), entry.name, found, expected))
            continue
        type_name, block_weights, block_bytes = layout
        count = 1
        for length in entry.shape:
            count *= length
        if entry.name in tensors:
            wrong("duplicate_tensor", "two tensors have this name", "2", "1")
        elif count == 0 or entry.shape[-1] % block_weights:
            wrong("bad_shape", "the rows are empty or not whole blocks", list(entry.shape), f"rows of n x {block_weights}")
        else:
            nbytes, offset = count // block_weights * block_bytes, start + entry.offset
            if entry.offset % alignment:
                wrong("misaligned", "the tensor's offset is not aligned", entry.offset, f"a multiple of {alignment}")
            elif offset + nbytes > size:
                wrong("truncated", "the tensor reaches past the end of the file", f"{size} bytes", f"{offset + nbytes}")
            elif offset < end:
                wrong("overlap", f"the tensor overlaps {last}", f"offset {offset}", f"{end} or more")
            else:
                bits = 8 * block_bytes / block_weights
                tensors[entry.name] = StoredTensor(
                    entry.name, entry.shape, type_name, entry.type_number, path, offset, nbytes, bits, stamp
                )
                end, last = offset + nbytes, entry.name
    if problems:
        raise InvalidFileError(problems)
    if unsupported:
        raise UnsupportedError(unsupported)
    return {entry.name: tensors[entry.name] for entry in entries}


def _block_layout(type_number: int) -> tuple[str, int, int] | None:
    """Return the name, weights per block and bytes per block of a ggml type, None if gguf-py does not know the number.

    Raises UnsupportedError for a quantised type if gguf-py is not installed.
    """
    if type_number in _PLAIN_TYPES:
        return _PLAIN_TYPES[type_number]
    gguf = gguf_package()
    try:
        ggml_type = gguf.GGMLQuantizationType(type_number)
    except ValueError:
        return None
    return (ggml_type.name, *gguf.GGML_QUANT_SIZES[ggml_type])
