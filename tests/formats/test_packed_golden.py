"""Golden files: old files stay readable, the writer still makes the same bytes, and an independent reader agrees.

The reader here follows `docs/packed-format.md` with struct, json, zlib, hashlib and integers; it uses none of our code.
"""

import hashlib
import json
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest

from cluscomp_formats.packed import open_packed, read_header, write_packed
from tools.make_golden import EXPECTED, MODELS

GOLDEN = Path(__file__).parents[1] / "golden"
Matrix = list[list[float]]


def expected(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((GOLDEN / EXPECTED).read_text(encoding="utf-8"))[name]
    return found


def f32(value: float) -> float:
    """Round to float32."""
    rounded: float = struct.unpack("<f", struct.pack("<f", value))[0]
    return rounded


STRUCT_CODES = {
    "float64": "d", "float32": "f", "float16": "e", "int64": "q", "int32": "i", "int16": "h", "int8": "b",
    "uint64": "Q", "uint32": "I", "uint16": "H", "uint8": "B", "bool": "?",
}  # fmt: skip


class IndependentReader:
    """A reader that follows the specification, section by section."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        magic, version, flags, file_length, offset, length, crc, reserved, own_crc = struct.unpack("<8sIIQQQI16sI", data[:64])
        assert (magic, version, flags, reserved) == (b"\xc1CLUS\r\n\x1a", 1, 0, bytes(16))
        assert file_length == len(data) == offset + length
        assert own_crc == zlib.crc32(data[:60])
        assert crc == zlib.crc32(data[offset:])
        self.header = json.loads(data[offset:])

    def section(self, number: int) -> bytes:
        entry = self.header["sections"][number]
        content = self.data[entry["offset"] : entry["offset"] + entry["length"]]
        assert entry["offset"] % 64 == 0
        assert zlib.crc32(content) == entry["crc32"]
        return content

    def array(self, entry: dict[str, Any]) -> list[Any]:
        """Return the values in row-major order; bfloat16 is widened."""
        raw = self.section(entry["section"])
        if entry["dtype"] == "bfloat16":
            halves = [raw[at : at + 2] for at in range(0, len(raw), 2)]
            return [struct.unpack("<f", b"\0\0" + half)[0] for half in halves]
        code = STRUCT_CODES[entry["dtype"]]
        return list(struct.unpack(f"<{len(raw) // struct.calcsize(code)}{code}", raw))

    def codes(self, number: int, across: int, groups: int, axis: str, num_clusters: int) -> list[int]:
        """Return the codes `[across, groups]` in row-major order."""
        if axis == "out":
            return self.tiled_codes(number, across, groups, num_clusters)
        count = across * groups
        bits = max(1, (num_clusters - 1).bit_length())
        raw = self.section(number)
        assert len(raw) == (count * bits + 7) // 8
        stream = int.from_bytes(raw, "little")
        codes = [(stream >> (bits * index)) & ((1 << bits) - 1) for index in range(count)]
        assert stream >> (bits * count) == 0
        assert max(codes) < num_clusters
        return codes

    def tiled_codes(self, number: int, in_features: int, groups: int, num_clusters: int) -> list[int]:
        bits = max(1, (num_clusters - 1).bit_length())
        raw = self.section(number)
        quads = (in_features + 3) // 4
        assert len(raw) == quads * (groups + groups % 2) * bits // 2
        found = {}
        padding = 0
        for t in range((groups + 15) // 16):
            width = min(16, groups + groups % 2 - 16 * t)
            for q in range(quads):
                begin = t * quads * 8 * bits + q * width * bits // 2
                record = int.from_bytes(raw[begin : begin + width * bits // 2], "little")
                for g in range(width):
                    for c in range(4):
                        code = record >> (bits * (4 * g + c)) & ((1 << bits) - 1)
                        if 4 * q + c < in_features and 16 * t + g < groups:
                            found[4 * q + c, 16 * t + g] = code
                        else:
                            padding |= code
        assert padding == 0
        assert max(found.values()) < num_clusters
        return [found[channel, group] for channel in range(in_features) for group in range(groups)]

    def weight(self, tensor: dict[str, Any]) -> list[float]:
        """Return a clustered weight, row-major `[out_features, in_features]`, with every step rounded to float32."""
        rows, columns = tensor["shape"]
        total: Matrix = [[0.0] * columns for _ in range(rows)]
        along = rows if tensor["group_axis"] == "out" else columns
        across = columns if tensor["group_axis"] == "out" else rows
        for stage in tensor["stages"]:
            codebook = self.header["codebooks"][stage["codebook"]]
            num_clusters, dim = codebook["shape"]
            centroids = self.array(codebook)
            groups = (along + dim - 1) // dim
            codes = self.codes(stage["codes"], across, groups, tensor["group_axis"], num_clusters)
            for a in range(across):
                for b in range(along):
                    value = f32(centroids[codes[a * groups + b // dim] * dim + b % dim])
                    i, j = (b, a) if tensor["group_axis"] == "out" else (a, b)
                    total[i][j] = f32(total[i][j] + value)
        for i, scale in enumerate(self.array(tensor["row_scale"]) if "row_scale" in tensor else []):
            total[i] = [f32(value * f32(scale)) for value in total[i]]
        for j, scale in enumerate(self.array(tensor["column_scale"]) if "column_scale" in tensor else []):
            for i in range(rows):
                total[i][j] = f32(total[i][j] * f32(scale))
        if "outliers" in tensor:
            outliers = tensor["outliers"]
            for position, value in zip(self.array(outliers["positions"]), self.array(outliers["values"]), strict=True):
                i, j = divmod(position, columns)
                total[i][j] = f32(total[i][j] + f32(value))
        return [value for row in total for value in row]

    def tensor(self, name: str) -> list[float]:
        tensor = self.header["tensors"][name]
        return self.weight(tensor) if tensor["kind"] == "clustered" else [f32(v) for v in self.array(tensor["values"])]

    def digest(self) -> str:
        def text(value: Any) -> bytes:
            return json.dumps(value, sort_keys=True, separators=(",", ":")).encode() + b"\n"

        total = hashlib.sha256(b"cluscomp-digest-1\n" + text(self.header["config"]))
        used = set()
        for name, tensor in sorted(self.header["tensors"].items()):

            def add(entry: dict[str, Any], description: dict[str, Any]) -> None:
                total.update(text({**description, "dtype": entry["dtype"], "shape": entry["shape"]}))
                total.update(self.section(entry["section"]))

            if tensor["kind"] == "dense":
                add(tensor["values"], {"tensor": name, "part": "values"})
                continue
            for stage in tensor["stages"]:
                if stage["codebook"] not in used:
                    used.add(stage["codebook"])
                    add(self.header["codebooks"][stage["codebook"]], {"codebook": stage["codebook"]})
            for stage in tensor["stages"]:
                num_clusters, dim = self.header["codebooks"][stage["codebook"]]["shape"]
                along, across = tensor["shape"] if tensor["group_axis"] == "out" else tensor["shape"][::-1]
                shape = [across, (along + dim - 1) // dim]
                description = {
                    "tensor": name,
                    "part": "codes",
                    "codebook": stage["codebook"],
                    "dtype": "uint16",
                    "shape": shape,
                }
                total.update(text({**description, "group_axis": tensor["group_axis"], "weight_shape": tensor["shape"]}))
                codes = self.codes(stage["codes"], *shape, tensor["group_axis"], num_clusters)
                total.update(struct.pack(f"<{len(codes)}H", *codes))
            for part in ("row_scale", "column_scale"):
                if part in tensor:
                    add(tensor[part], {"tensor": name, "part": part})
            if "outliers" in tensor:
                add(tensor["outliers"]["positions"], {"tensor": name, "part": "outlier_positions"})
                add(tensor["outliers"]["values"], {"tensor": name, "part": "outlier_values"})
        return f"sha256:{total.hexdigest()}"


@pytest.mark.parametrize("name", MODELS)
def test_reads_the_golden_file(name: str) -> None:
    path = GOLDEN / f"{name}.clus"
    model = open_packed(path, check=True)
    assert model.digest() == expected(name)["digest"] == read_header(path).digest
    decoded = {key: hashlib.sha256(tensor.decode().astype("<f4")).hexdigest() for key, tensor in model.tensors.items()}
    assert decoded == expected(name)["tensors"]
    assert {key: hashlib.sha256(array.read()).hexdigest() for key, array in model.files.items()} == expected(name)["files"]
    original = MODELS[name]()
    assert model.config == original.config
    assert model.provenance == original.provenance
    assert model.self_test == original.self_test


@pytest.mark.parametrize("name", MODELS)
def test_writes_the_golden_bytes(name: str, tmp_path: Path) -> None:
    path = tmp_path / "again.clus"
    write_packed(MODELS[name](), path)
    assert path.read_bytes() == (GOLDEN / f"{name}.clus").read_bytes()
    assert hashlib.sha256(path.read_bytes()).hexdigest() == expected(name)["file"]


@pytest.mark.parametrize("name", MODELS)
def test_independent_reader_agrees(name: str) -> None:
    reader = IndependentReader((GOLDEN / f"{name}.clus").read_bytes())
    assert reader.digest() == expected(name)["digest"] == reader.header["digest"]
    assert set(reader.header["tensors"]) == set(expected(name)["tensors"])
    for tensor, digest in expected(name)["tensors"].items():
        values = reader.tensor(tensor)
        assert hashlib.sha256(struct.pack(f"<{len(values)}f", *values)).hexdigest() == digest, tensor
    for file, digest in expected(name)["files"].items():
        assert hashlib.sha256(reader.section(reader.header["files"][file])).hexdigest() == digest


def test_every_golden_file_is_expected_and_there() -> None:
    names = json.loads((GOLDEN / EXPECTED).read_text(encoding="utf-8")).keys()
    assert names == MODELS.keys()
    assert {path.stem for path in GOLDEN.glob("*.clus")} == set(names)
