"""The GGUF parser: what gguf-py's reader sees, and one damage per test; no damage may end in anything but our errors."""

from __future__ import annotations

import contextlib
import random
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from sources_gguf_writer import add_tensors, finish, start_writer, tiny_model, write_gguf

from cluscomp_export.sources import open_source
from cluscomp_formats.errors import ClusCompError, InvalidFileError, UnsupportedError
from cluscomp_formats.gguf.container import read_container

ALIGNMENT = 32


def string(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def pair(key: str, type_number: int, payload: bytes) -> bytes:
    return string(key) + struct.pack("<I", type_number) + payload


def entry(name: str, shape: tuple[int, ...], type_number: int, offset: int) -> bytes:
    """A directory entry; `shape` row-major."""
    dims = struct.pack(f"<{len(shape)}Q", *shape[::-1])
    return string(name) + struct.pack("<I", len(shape)) + dims + struct.pack("<IQ", type_number, offset)


def file_bytes(
    pairs: list[bytes], entries: list[bytes], data: bytes = b"", version: int = 3, counts: tuple[int, int] | None = None
) -> bytes:
    num_tensors, num_pairs = counts or (len(entries), len(pairs))
    head = b"GGUF" + struct.pack("<IQQ", version, num_tensors, num_pairs) + b"".join(pairs) + b"".join(entries)
    return head + bytes(-len(head) % ALIGNMENT) + data


def problems_of(tmp_path: Path, content: bytes) -> list[str]:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises((InvalidFileError, UnsupportedError)) as caught:
        read_container(path)
    assert all(problem.file == str(path) for problem in caught.value.problems)
    return [problem.kind for problem in caught.value.problems]


def test_reads_a_file_made_by_hand(tmp_path: Path) -> None:
    values = np.arange(6, dtype="<f4").reshape(2, 3)
    pairs = [
        pair("text", 8, string("grüße")),
        pair("small", 0, b"\xff"),
        pair("signed", 11, struct.pack("<q", -5)),
        pair("yes", 7, b"\x01"),
        pair("numbers", 9, struct.pack("<IQ", 5, 2) + struct.pack("<ii", -1, 7)),
        pair("words", 9, struct.pack("<IQ", 8, 2) + string("a") + string("")),
        pair("raw", 8, string(b"\xff")),
    ]
    path = tmp_path / "model.gguf"
    path.write_bytes(file_bytes(pairs, [entry("w", (2, 3), 0, 0)], values.tobytes()))
    container = read_container(path)
    assert container.metadata == {
        "text": "grüße",
        "small": 255,
        "signed": -5,
        "yes": True,
        "numbers": [-1, 7],
        "words": ["a", ""],
        "raw": "\udcff",
    }
    tensor = container.tensors["w"]
    assert (tensor.shape, tensor.type_name, tensor.nbytes, tensor.bits_per_weight) == ((2, 3), "F32", 24, 32)
    assert path.read_bytes()[tensor.offset :] == values.tobytes()


@pytest.mark.parametrize("type_name", ["F32", "Q8_0", "Q4_1"])
def test_sees_what_gguf_py_sees(tmp_path: Path, type_name: str) -> None:
    path = write_gguf(tmp_path / "model.gguf", tiny_model("llama"), "llama", type_name)
    container, reader = read_container(path), gguf.GGUFReader(path)
    own_keys = ("GGUF.version", "GGUF.tensor_count", "GGUF.kv_count")
    expected = {key: field.contents() for key, field in reader.fields.items() if key not in own_keys}
    assert container.metadata == expected
    assert list(container.tensors) == [tensor.name for tensor in reader.tensors]
    for tensor in reader.tensors:
        found = container.tensors[tensor.name]
        assert found.shape == tuple(int(length) for length in reversed(tensor.shape))
        assert (found.type_name, found.offset, found.nbytes) == (tensor.tensor_type.name, tensor.data_offset, tensor.n_bytes)


def test_arrays_of_every_type_match_gguf_py(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    types = gguf.GGUFValueType
    for kind in (types.UINT8, types.INT8, types.UINT16, types.INT16, types.UINT32, types.INT32, types.UINT64, types.INT64):
        writer.add_key_value(f"array.{kind.name}", [0, 1, 127], types.ARRAY, sub_type=kind)
    writer.add_array("array.floats", [0.5, -2.0])
    writer.add_array("array.bools", [True, False])
    writer.add_array("array.strings", ["", "\u2581the"])
    writer.add_tensor("t", np.zeros(32, np.float32))
    finish(writer)
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    metadata = read_container(tmp_path / "model.gguf").metadata
    for key in [key for key in metadata if key.startswith("array.")]:
        assert metadata[key] == reader.fields[key].contents(), key


GOOD_PAIR = pair("key", 4, struct.pack("<I", 1))
GOOD_ENTRY = entry("w", (2, 32), 0, 0)
DATA = bytes(256)
HUGE = 2**63

DAMAGES: dict[str, tuple[bytes, list[str]]] = {
    "empty": (b"", ["bad_magic"]),
    "magic": (b"GGML" + file_bytes([], [])[4:], ["bad_magic"]),
    "ends after magic": (b"GGUF", ["truncated"]),
    "version 1": (file_bytes([], [], version=1), ["bad_version"]),
    "version of the future": (file_bytes([], [], version=9), ["bad_version"]),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), ["big_endian"]),
    "pair count": (file_bytes([GOOD_PAIR], [], counts=(0, HUGE)), ["truncated"]),
    "tensor count": (file_bytes([], [GOOD_ENTRY], DATA, counts=(HUGE, 0)), ["truncated"]),
    "key length": (file_bytes([struct.pack("<Q", HUGE)], [], DATA), ["truncated"]),
    "empty key": (file_bytes([pair("", 4, bytes(4))], [], DATA), ["bad_name"]),
    "unprintable key": (file_bytes([pair("a\nb", 4, bytes(4))], [], DATA), ["bad_name"]),
    "key not text": (file_bytes([string(b"\xff\xfe") + struct.pack("<II", 4, 1)], [], DATA), ["bad_name"]),
    "key twice": (file_bytes([GOOD_PAIR, GOOD_PAIR], [], DATA), ["duplicate_key"]),
    "value type": (file_bytes([pair("key", 13, bytes(8))], [], DATA), ["bad_value_type"]),
    "string length": (file_bytes([pair("key", 8, struct.pack("<Q", HUGE))], [], DATA), ["truncated"]),
    "array length": (file_bytes([pair("key", 9, struct.pack("<IQ", 4, HUGE))], [], DATA), ["truncated"]),
    "array of strings length": (file_bytes([pair("key", 9, struct.pack("<IQ", 8, HUGE))], [], DATA), ["truncated"]),
    "array of arrays": (file_bytes([pair("key", 9, struct.pack("<IQ", 9, 1))], [], DATA), ["bad_value_type"]),
    "array item type": (file_bytes([pair("key", 9, struct.pack("<IQ", 99, 1))], [], DATA), ["bad_value_type"]),
    "alignment": (file_bytes([pair("general.alignment", 4, struct.pack("<I", 48))], [], DATA), ["bad_alignment"]),
    "alignment zero": (file_bytes([pair("general.alignment", 4, bytes(4))], [], DATA), ["bad_alignment"]),
    "alignment text": (file_bytes([pair("general.alignment", 8, string("32"))], [], DATA), ["bad_alignment"]),
    "no dimensions": (file_bytes([], [entry("w", (), 0, 0)], DATA), ["bad_shape"]),
    "many dimensions": (file_bytes([], [entry("w", (1,) * 5, 0, 0)], DATA), ["bad_shape"]),
    "dimension zero": (file_bytes([], [entry("w", (0, 32), 0, 0)], DATA), ["bad_shape"]),
    "dimensions overflow": (file_bytes([], [entry("w", (2**62, 32), 0, 0)], DATA), ["truncated"]),
    "row of half a block": (file_bytes([], [entry("w", (2, 16), 8, 0)], DATA), ["bad_shape"]),
    "tensor type": (file_bytes([], [entry("w", (2, 32), 77, 0)], DATA), ["unsupported_type"]),
    "offset past the end": (file_bytes([], [entry("w", (2, 32), 0, HUGE)], DATA), ["truncated"]),
    "offset unaligned": (file_bytes([], [entry("w", (32,), 0, 4)], DATA), ["misaligned"]),
    "data cut off": (file_bytes([], [GOOD_ENTRY], DATA[:-1]), ["truncated"]),
    "same name twice": (file_bytes([], [entry("w", (8,), 0, 0), entry("w", (8,), 0, 32)], DATA), ["duplicate_tensor"]),
    "overlap": (file_bytes([], [entry("w", (16,), 0, 0), entry("v", (8,), 0, 32)], DATA), ["overlap"]),
    "three at once": (
        file_bytes([], [entry("a", (0,), 0, 0), entry("b", (8,), 0, 4), entry("c", (99999,), 0, 64)], DATA),
        ["bad_shape", "misaligned", "truncated"],
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_damage_is_reported_as_what_it_is(tmp_path: Path, damage: str) -> None:
    content, kinds = DAMAGES[damage]
    assert problems_of(tmp_path, content) == kinds


def test_the_undamaged_file_of_these_tests_is_read(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(file_bytes([GOOD_PAIR], [GOOD_ENTRY], DATA))
    assert read_container(path).tensors.keys() == {"w"}


def test_a_message_names_file_tensor_found_and_expected(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(file_bytes([], [GOOD_ENTRY], DATA[:-1]))
    with pytest.raises(InvalidFileError) as caught:
        read_container(path)
    problem = caught.value.problems[0]
    size = path.stat().st_size
    assert (problem.file, problem.tensor) == (str(path), "w")
    assert (problem.found, problem.expected) == (f"{size} bytes", str(size + 1))
    assert problem.remedy is not None


def small_file(tmp_path: Path) -> bytes:
    """A readable one-layer model with a tokenizer, so that damage can reach every part of the reader."""
    model = tiny_model("llama", num_hidden_layers=1, vocab_size=8)
    path = tmp_path / "small.gguf"
    writer = start_writer(path, "llama", model.config)
    writer.add_rope_scaling_factor(2.0)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["<unk>", "<s>", "</s>", "a", "b", "c", "ab", "abc"])
    writer.add_token_scores([0.0, 0.0, 0.0, -5.0, -5.0, -5.0, -1.0, -2.0])
    writer.add_token_types([2, 3, 3, 1, 1, 1, 1, 1])
    writer.add_bos_token_id(1)
    writer.add_tensor("rope_freqs.weight", np.ones(8, np.float32))
    add_tensors(writer, model, "llama", "Q4_0")
    finish(writer)
    assert open_source(path).files
    return path.read_bytes()


def open_and_read(path: Path) -> None:
    """Whatever the file holds: success or our errors, nothing else."""
    with contextlib.suppress(ClusCompError):
        model = open_source(path)
        for tensor in model.tensors.values():
            assert tensor.decode().shape == tensor.shape


def test_truncation_anywhere_is_refused(tmp_path: Path) -> None:
    content = small_file(tmp_path)
    path = tmp_path / "cut.gguf"
    for length in (*range(4, len(content), len(content) // 80), len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(InvalidFileError):
            open_source(path)


def test_truncation_at_every_byte_of_the_header_is_refused(tmp_path: Path) -> None:
    content = file_bytes([pair("text", 8, string("text")), GOOD_PAIR], [GOOD_ENTRY, entry("v", (4,), 0, 256)], DATA + bytes(16))
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    assert len(read_container(path).tensors) == 2
    for length in range(4, len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(InvalidFileError, match=r"ends within|past the end"):
            read_container(path)


@pytest.mark.parametrize("seed", range(8))
def test_flipped_bytes_never_escape_our_errors(tmp_path: Path, seed: int) -> None:
    content = small_file(tmp_path)
    generator = random.Random(seed)  # noqa: S311 - reproducible, not secret
    path = tmp_path / "flipped.gguf"
    # Most of the damage goes to the header, where it can do something.
    header = min(tensor.offset for tensor in read_container(tmp_path / "small.gguf").tensors.values())
    for _ in range(60):
        damaged = bytearray(content)
        for _ in range(generator.randint(1, 4)):
            at = generator.randrange(4, header if generator.random() < 0.75 else len(damaged))
            damaged[at] = generator.choice((0, 1, 0x7F, 0x80, 0xFF, damaged[at] ^ (1 << generator.randrange(8))))
        path.write_bytes(damaged)
        open_and_read(path)
