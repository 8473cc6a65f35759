"""Containers taken apart leniently and put together without checking anything, to make files that lie."""

from __future__ import annotations

import contextlib
import hashlib
import json
import struct
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

DTYPE_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32"}
DTYPE_NAMES |= {"I16": "int16", "I8": "int8", "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool"}
PACKED_PREAMBLE = struct.Struct("<8sIIQQQI16s")
_MEMBER = struct.Struct("<HI")
_GGUF_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<B", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9


def compact(value: Any) -> bytes:
    """JSON as our formats want it."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def join_members(members: dict[str, bytes]) -> bytes:
    """A folder as one string of bytes."""
    parts = []
    for name, content in members.items():
        encoded = name.encode("utf-8", "surrogatepass")[:0xFFFF]
        parts += [_MEMBER.pack(len(encoded), len(content)), encoded, content]
    return b"".join(parts)


def split_members(data: bytes) -> dict[str, bytes]:
    """The files of a folder; whatever the bytes, there is an answer."""
    members: dict[str, bytes] = {}
    at = 0
    while at + _MEMBER.size <= len(data):
        name_length, length = _MEMBER.unpack_from(data, at)
        at += _MEMBER.size
        name = data[at : at + name_length].decode("utf-8", "replace")
        members[name] = data[at + name_length : at + name_length + length]
        at += name_length + length
    return members


def write_members(data: bytes, folder: Path) -> None:
    """The files in a folder and those below it; those whose names no folder can hold are left out."""
    for name, content in split_members(data).items():
        parts = name.split("/")
        if {"", ".", ".."}.isdisjoint(parts) and not set(name) & set("\\\0") and len(name.encode()) < 200:
            # A file may be where another member wants a folder.
            with contextlib.suppress(OSError):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_bytes(content)


@dataclass
class PackedParts:
    """A packed file: its header as JSON value or bytes, and the contents of its sections."""

    header: Any
    sections: list[bytes]

    @classmethod
    def of(cls, data: bytes) -> PackedParts:
        """Raises ValueError, KeyError, TypeError or struct.error for files damaged too much."""
        header = json.loads(data[PACKED_PREAMBLE.unpack_from(data)[4] :])
        return cls(header, [data[s["offset"] : s["offset"] + s["length"]] for s in header["sections"]])

    def place(self) -> None:
        """Make the header's sections true."""
        at, placed = 64, []
        for content in self.sections:
            placed.append({"offset": at, "length": len(content), "crc32": zlib.crc32(content)})
            at = -(-(at + len(content)) // 64) * 64
        self.header["sections"] = placed

    def to_bytes(self) -> bytes:
        header = self.header if isinstance(self.header, bytes) else compact(self.header)
        body = b"".join(content + bytes(-len(content) % 64) for content in self.sections)
        return seal_packed(bytes(64) + body, header)


def seal_packed(data: bytes, header: bytes) -> bytes:
    """Everything before the header with that header after it, and a preamble that fits."""
    fields = (b"\xc1CLUS\r\n\x1a", 1, 0, len(data) + len(header), len(data), len(header), zlib.crc32(header), bytes(16))
    body = PACKED_PREAMBLE.pack(*fields)
    return body + struct.pack("<I", zlib.crc32(body)) + data[64:] + header


def split_safetensors(data: bytes) -> tuple[Any, bytes]:
    """Header and data. Raises ValueError."""
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def join_safetensors(header: Any, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else compact(header)
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data


def safetensors_of(arrays: dict[str, tuple[str, list[int], bytes]]) -> bytes:
    """A file of arrays by name: dtype, shape, bytes."""
    header, data = {}, b""
    for name, (dtype, shape, content) in arrays.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(content)]}
        data += content
    return join_safetensors(header, data)


def seal_delta(data: bytes) -> bytes:
    """A delta with the checksum that its content has, if it can be taken apart; see `docs/delta-format.md`."""
    try:
        header, content = split_safetensors(data)
        metadata = {key: value for key, value in header["__metadata__"].items() if key != "sha256"}
        arrays = {name: entry for name, entry in header.items() if name != "__metadata__"}
        forms = {name: [DTYPE_NAMES[entry["dtype"]], entry["shape"]] for name, entry in arrays.items()}
        checksum = hashlib.sha256(compact([metadata, forms]) + b"\n")
        for name in sorted(arrays):
            begin, end = arrays[name]["data_offsets"]
            checksum.update(content[begin:end])
        header["__metadata__"]["sha256"] = checksum.hexdigest()
        return join_safetensors(header, content)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError):
        return data


@dataclass
class GgufTensor:
    name: bytes
    dims: list[int]
    type: int
    offset: int


@dataclass
class GgufParts:
    """A GGUF file. A pair is key, type number and value; that of an array the type of its items and a list."""

    pairs: list[tuple[bytes, int, Any]]
    tensors: list[GgufTensor]
    data: bytes
    version: int = 3
    alignment: int = 64
    more_pairs: int = 0
    more_tensors: int = 0
    """By how much the counts lie."""

    @classmethod
    def of(cls, data: bytes) -> GgufParts:
        """Raises ValueError, KeyError or struct.error for files damaged too much."""
        cursor = _Cursor(data, 4)
        version, num_tensors, num_pairs = cursor.take("<I"), cursor.take("<Q"), cursor.take("<Q")
        pairs = []
        for _ in range(min(num_pairs, len(data))):
            key, kind = cursor.string(), cursor.take("<I")
            pairs.append((key, kind, cursor.value(kind)))
        tensors = []
        for _ in range(min(num_tensors, len(data))):
            name, count = cursor.string(), cursor.take("<I")
            dims = [cursor.take("<Q") for _ in range(min(count, 8))]
            tensors.append(GgufTensor(name, dims, cursor.take("<I"), cursor.take("<Q")))
        alignment = next((value for key, _, value in pairs if key == b"general.alignment"), 32)
        if type(alignment) is not int or not 0 < alignment <= 4096:
            alignment = 32
        return cls(pairs, tensors, data[-(-cursor.at // alignment) * alignment :], version, alignment)

    def get(self, key: bytes) -> Any:
        return next((value for name, _, value in self.pairs if name == key), None)

    def put(self, key: bytes, kind: int, value: Any) -> None:
        self.pairs = [pair for pair in self.pairs if pair[0] != key] + [(key, kind, value)]

    def place(self) -> None:
        """Make the checksums of a native file true."""
        names, by_name = self.get(b"cluscomp.sections"), {tensor.name: tensor for tensor in self.tensors}
        if not isinstance(names, tuple) or not isinstance(names[1], list):
            return
        sums = []
        for name in names[1]:
            tensor = by_name.get(name)
            sums.append(zlib.crc32(self.data[tensor.offset : tensor.offset + _plain_bytes(tensor)]) if tensor else 0)
        self.pairs = [(k, t, (4, sums)) if k == b"cluscomp.crc32" else (k, t, v) for k, t, v in self.pairs]

    def to_bytes(self) -> bytes:
        counts = ((len(self.tensors) + self.more_tensors) % 2**64, (len(self.pairs) + self.more_pairs) % 2**64)
        parts = [b"GGUF", struct.pack("<IQQ", self.version % 2**32, *counts)]
        for key, kind, value in self.pairs:
            parts += [_text(key), struct.pack("<I", kind % 2**32), _encoded(kind, value)]
        for tensor in self.tensors:
            dims = b"".join(struct.pack("<Q", length % 2**64) for length in tensor.dims)
            place = struct.pack("<IQ", tensor.type % 2**32, tensor.offset % 2**64)
            parts += [_text(tensor.name), struct.pack("<I", len(tensor.dims)), dims, place]
        head = b"".join(parts)
        return head + bytes(-len(head) % self.alignment) + self.data


@dataclass
class _Cursor:
    data: bytes
    at: int = field(default=0)

    def take(self, layout: str) -> Any:
        (value,) = struct.unpack_from(layout, self.data, self.at)
        self.at += struct.calcsize(layout)
        return value

    def string(self) -> bytes:
        length = self.take("<Q")
        self.at += length
        if self.at > len(self.data):
            raise ValueError("the string ends past the file")
        return self.data[self.at - length : self.at]

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            return self.take(_GGUF_SCALARS[kind])
        item, count = self.take("<I"), self.take("<Q")
        if count > len(self.data):
            raise ValueError("more items than bytes")
        return item, [self.string() if item == _STRING else self.take(_GGUF_SCALARS[item]) for _ in range(count)]


def _text(content: bytes) -> bytes:
    return struct.pack("<Q", len(content)) + content


def _encoded(kind: int, value: Any) -> bytes:
    if kind == _ARRAY:
        item, values = value if isinstance(value, tuple) else (4, [value])
        return struct.pack("<IQ", item % 2**32, len(values)) + b"".join(_encoded(item, member) for member in values)
    if isinstance(value, tuple):
        value = value[1]
    if kind == _STRING or isinstance(value, (bytes, list)):
        return _text(value if isinstance(value, bytes) else str(value).encode())
    layout = _GGUF_SCALARS.get(kind, "<I")
    if layout[1] in "fd":
        try:
            return struct.pack(layout, value)
        except OverflowError:
            return struct.pack(layout, float("inf"))
    bits = 8 * struct.calcsize(layout)
    return struct.pack(layout.upper(), int(value if value == value and abs(value) < 2**70 else 0) % 2**bits)  # noqa: PLR0124


def _plain_bytes(tensor: GgufTensor) -> int:
    size = {0: 4, 1: 2, 24: 1, 25: 2, 26: 4, 27: 8, 28: 8, 30: 2}.get(tensor.type, 1)
    for length in tensor.dims:
        size *= length
    return size
