"""Any damage gives InvalidFileError or the unchanged model, never another exception or another model."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_surgery import preamble_fields, with_header_bytes

from cluscomp_formats.errors import InvalidFileError
from cluscomp_formats.ir import Array, ClusteredWeight, Codebook, DenseTensor, Model, Stage
from cluscomp_formats.packed import open_packed, write_packed


def small_model() -> Model:
    codebook = Codebook("c", Array.of(np.array([[1, 2], [3, 4], [5, 6]], dtype=np.float16)))
    codes = Array.of(np.array([[0, 1], [2, 1], [0, 2]], dtype=np.uint16))
    tensors = {
        "w": ClusteredWeight("w", (3, 3), (Stage(codebook, codes),), row_scale=Array.of(np.ones(3, dtype=np.float32))),
        "d": DenseTensor("d", Array.of(np.arange(3, dtype=np.int8))),
    }
    files = {"tokenizer.json": Array.of(np.frombuffer(b"{}", dtype=np.uint8))}
    return Model({"n": 3}, tensors, files, {"seed": 1}, {"version": 1})


def content_of(model: Model) -> tuple[object, ...]:
    files = {name: array.read().tobytes() for name, array in model.files.items()}
    decoded = {name: tensor.decode().tobytes() for name, tensor in model.tensors.items()}
    return model.digest(), files, decoded, model.provenance, model.self_test


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("damage") / "model.clus"
    write_packed(small_model(), path)
    return path.read_bytes()


def accepted(path: Path, data: bytes) -> bool:
    """Return whether the file opens, in which case the model must be unchanged."""
    path.write_bytes(data)
    try:
        model = open_packed(path, check=True)
    except InvalidFileError as error:
        if not error.problems or any(problem.file != str(path) for problem in error.problems):
            pytest.fail(f"problems without the file's name: {error.problems}")
        return False
    assert content_of(model) == content_of(small_model())
    return True


@pytest.mark.parametrize("flip", [0x01, 0x80, 0xFF])
def test_every_byte_is_covered(data: bytes, tmp_path: Path, flip: int) -> None:
    assert accepted(tmp_path / "m.clus", data)
    for position in range(len(data)):
        damaged = bytearray(data)
        damaged[position] ^= flip
        assert not accepted(tmp_path / "m.clus", bytes(damaged)), position


def test_truncation_at_every_length(data: bytes, tmp_path: Path) -> None:
    for length in range(len(data)):
        assert not accepted(tmp_path / "m.clus", data[:length]), length


def test_bytes_inserted_or_removed_anywhere(data: bytes, tmp_path: Path) -> None:
    for position in range(0, len(data), 7):
        assert not accepted(tmp_path / "m.clus", data[:position] + b"\0" + data[position:]), position
        assert not accepted(tmp_path / "m.clus", data[:position] + data[position + 1 :]), position


@settings(max_examples=300, deadline=None)
@given(changes=st.lists(st.tuples(st.integers(0, 10_000), st.binary(min_size=1, max_size=9)), min_size=1, max_size=4))
def test_random_damage(data: bytes, tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[int, bytes]]) -> None:
    damaged = data
    for position, content in changes:
        at = position % len(data)
        damaged = damaged[:at] + content + damaged[at + len(content) :]
    assert accepted(tmp_path_factory.getbasetemp() / "random.clus", damaged) == (damaged == data)


TOKENS = [
    b"null",
    b"true",
    b"-1",
    b"0",
    b"1",
    b"7",
    b"1e9",
    b"9223372036854775808",
    b'""',
    b'"out"',
    b"[]",
    b"{}",
    b"[0]",
    b"NaN",
]


@settings(max_examples=500, deadline=None)
@given(draw=st.data())
def test_random_lies_in_a_header_with_right_checksums(
    data: bytes, tmp_path_factory: pytest.TempPathFactory, draw: st.DataObject
) -> None:
    """One value of the header is replaced by another, with correct checksums."""
    header = data[preamble_fields(data)[4] :]
    starts = [at + 1 for at, byte in enumerate(header) if byte in b":[,"]
    start = draw.draw(st.sampled_from(starts))
    end = min((at for at in range(start, len(header)) if header[at] in b",]}"), default=len(header))
    path = tmp_path_factory.getbasetemp() / "lies.clus"
    path.write_bytes(with_header_bytes(data, header[:start] + draw.draw(st.sampled_from(TOKENS)) + header[end:]))
    try:
        model = open_packed(path, check=True)
    except InvalidFileError:
        return
    # A model that opens can be decoded. The digest was checked, so nothing that it covers has changed.
    for name, tensor in small_model().tensors.items():
        assert model.tensors[name].decode().tobytes() == tensor.decode().tobytes()
