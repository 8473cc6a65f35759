"""One kind of damage to a folder per test; each is detected and named."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluscomp_formats.errors import InvalidFileError, Problem, StorageError
from cluscomp_formats.hf import open_hf, write_hf
from cluscomp_formats.hf import reader as reader_module
from cluscomp_formats.ir import Array, ClusteredWeight, Codebook, DenseTensor, Model, Outliers, Stage

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


def model() -> Model:
    """A weight of 5 3-bit codes with every optional array, a norm, flags, and a side file."""
    codebook = Codebook("book", Array.of(np.arange(12, dtype=np.float16).reshape(6, 2)))
    codes = Array.of(np.array([[0], [1], [2], [3], [5]], dtype=np.uint16))
    outliers = Outliers(Array.of(np.array([1, 7], np.uint32)), Array.of(np.ones(2, np.float32)))
    row_scale = Array.of(np.ones(2, np.float32))
    weight = ClusteredWeight("m.weight", (2, 5), (Stage(codebook, codes),), "out", row_scale, None, outliers)
    tensors = {
        "m.weight": weight,
        "norm": DenseTensor("norm", Array.of(np.ones(4, np.float32))),
        "flags": DenseTensor("flags", Array.of(np.array([True, False]))),
    }
    return Model({"n": 1}, tensors, {"tokenizer.json": Array.of(np.frombuffer(b"{}", np.uint8))})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_hf(model(), tmp_path / "m")
    return tmp_path / "m"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    write_hf(model(), tmp_path / "s", shard_bytes=30)
    assert (tmp_path / "s" / INDEX).exists()
    return tmp_path / "s"


def problems_of(folder: Path, *, check: bool = True) -> tuple[Problem, ...]:
    """Return the problems of a folder, after checking that they name files inside it; fails if there are none."""
    with pytest.raises(InvalidFileError) as caught:
        open_hf(folder, check=check)
    assert all((problem.file or "").startswith(str(folder)) for problem in caught.value.problems)
    return caught.value.problems


def kinds(problems: tuple[Problem, ...]) -> list[tuple[str, str | None]]:
    return [(problem.kind, problem.tensor) for problem in problems]


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    value = json.loads(path.read_bytes())
    path.write_text(json.dumps(value if (changed := change(value)) is None else changed))


def set_in(*where: Any) -> Callable[[Any], None]:
    """Return a change that sets the value (last argument) at a path (the other arguments); Ellipsis deletes it."""
    *path, last, new = where

    def change(value: Any) -> None:
        for key in path:
            value = value[key]
        if new is ...:
            del value[last]
        else:
            value[last] = new

    return change


def header_of(data: bytes) -> dict[str, Any]:
    header: dict[str, Any] = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return header


def with_header(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the header of a safetensors file in place; its length and the data stay correct."""
    data = path.read_bytes()
    header = header_of(data)
    change(header)
    with_header_bytes(path, json.dumps(header).encode())


def with_header_bytes(path: Path, header: bytes) -> None:
    data = path.read_bytes()
    rest = data[8 + int.from_bytes(data[:8], "little") :]
    header += b" " * (-len(header) % 8)
    path.write_bytes(len(header).to_bytes(8, "little") + header + rest)


def with_array(path: Path, key: str, content: bytes) -> None:
    """Replace the bytes of an array by the same number of others."""
    data = bytearray(path.read_bytes())
    begin, end = header_of(data)[key]["data_offsets"]
    start = 8 + int.from_bytes(data[:8], "little")
    assert len(content) == end - begin
    data[start + begin : start + end] = content
    path.write_bytes(data)


# config.json


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"", "bad_json"),
        (b"{", "bad_json"),
        (b"\xff", "bad_json"),
        (b'{"x": NaN}', "bad_json"),
        (b'{"x": 1e999}', "bad_json"),
        (b"[" * 100_000, "bad_json"),
        (b'{"a": 1, "a": 2}', "duplicate_key"),
        (b"[]", "wrong_type"),
        (b"{}", "not_cluscomp"),
        (b'{"quantization_config": {"quant_method": "gptq"}}', "not_cluscomp"),
    ],
)
def test_configuration_that_is_none(folder: Path, content: bytes, kind: str) -> None:
    (folder / "config.json").write_bytes(content)
    assert [problem.kind for problem in problems_of(folder)] == [kind]


QUANTIZATION: dict[str, tuple[Callable[[Any], None], str]] = {
    "newer version": (set_in("version", 2), "newer_version"),
    "no version": (set_in("version", ...), "bad_version"),
    "version zero": (set_in("version", 0), "bad_version"),
    "version true": (set_in("version", True), "bad_version"),
    "unknown key": (set_in("surprise", 1), "unknown_key"),
    "no digest": (set_in("digest", ...), "missing_key"),
    "malformed digest": (set_in("digest", "sha256:12"), "bad_digest"),
    "another digest": (set_in("digest", "sha256:" + "0" * 64), "digest_mismatch"),
    "weights a list": (set_in("weights", []), "wrong_type"),
    "malformed added": (set_in("added", {"n": 1}), "bad_added"),
    "malformed added to a part": (set_in("added", {"text_config": {"dtype": "int8"}}), "bad_added"),
    "nothing added": (set_in("added", {"text_config": {}}), "bad_added"),
    "weight a list": (set_in("weights", "m.weight", []), "wrong_type"),
    "weight with unknown key": (set_in("weights", "m.weight", "bias", 1), "unknown_key"),
    "weight without shape": (set_in("weights", "m.weight", "shape", ...), "missing_key"),
    "shape of one length": (set_in("weights", "m.weight", "shape", [10]), "bad_shape"),
    "negative length": (set_in("weights", "m.weight", "shape", [-2, 5]), "bad_shape"),
    "float length": (set_in("weights", "m.weight", "shape", [2.0, 5]), "bad_shape"),
    "giant length": (set_in("weights", "m.weight", "shape", [2, 1 << 62]), "bad_shape"),
    "shape that fits no codes": (set_in("weights", "m.weight", "shape", [3, 5]), "bad_tensor"),
    "shape that fits no outliers": (set_in("weights", "m.weight", "shape", [2, 6]), "wrong_form"),
    "unknown axis": (set_in("weights", "m.weight", "group_axis", "up"), "bad_group_axis"),
    "other axis": (set_in("weights", "m.weight", "group_axis", "in"), "wrong_form"),
    "no codebooks": (set_in("weights", "m.weight", "codebooks", []), "bad_codebooks"),
    "codebook number": (set_in("weights", "m.weight", "codebooks", [1]), "bad_codebooks"),
    "codebook without name": (set_in("weights", "m.weight", "codebooks", [""]), "bad_name"),
    "missing codebook": (set_in("weights", "m.weight", "codebooks", ["other"]), "missing_tensor"),
    "missing stage": (set_in("weights", "m.weight", "codebooks", ["book", "book"]), "missing_tensor"),
    "unknown array": (set_in("weights", "m.weight", "extra_arrays", ["bias"]), "bad_extra_arrays"),
    "half of the outliers": (set_in("weights", "m.weight", "extra_arrays", ["outlier_values"]), "bad_extra_arrays"),
    "missing scale": (
        set_in("weights", "m.weight", "extra_arrays", ["column_scale"]),
        "missing_tensor",
    ),
    "weight without name": (set_in("weights", "", {}), "bad_name"),
    "weight that is not there": (
        set_in("weights", "x", {"shape": [1, 1], "group_axis": "in", "codebooks": ["book"], "extra_arrays": []}),
        "missing_tensor",
    ),
    "two names of one weight": (
        set_in("weights", "m", {"shape": [2, 5], "group_axis": "out", "codebooks": ["book"], "extra_arrays": []}),
        "claimed_twice",
    ),
}


@pytest.mark.parametrize("case", QUANTIZATION)
def test_quantization_config(folder: Path, case: str) -> None:
    change, kind = QUANTIZATION[case]
    edit(folder / "config.json", lambda config: change(config["quantization_config"]))
    assert {problem.kind for problem in problems_of(folder)} == {kind}


def test_the_configuration_enters_the_digest(folder: Path) -> None:
    edit(folder / "config.json", set_in("n", 2))
    assert kinds(problems_of(folder)) == [("digest_mismatch", "quantization_config")]
    assert open_hf(folder).config == {"n": 2}


# Weights: the container.


def entry(begin: int, end: int, shape: list[int], dtype: str = "U8") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


HEADERS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "metadata a list": (set_in("__metadata__", []), "bad_header"),
    "metadata of numbers": (set_in("__metadata__", {"format": 1}), "bad_header"),
    "entry a list": (set_in("norm", []), "bad_entry"),
    "entry without dtype": (set_in("norm", "dtype", ...), "bad_entry"),
    "entry with more": (set_in("norm", "name", "x"), "bad_entry"),
    "unknown dtype": (set_in("norm", "dtype", "F8_E4M3"), "unknown_dtype"),
    "dtype a list": (set_in("norm", "dtype", ["F32"]), "unknown_dtype"),
    "shape a number": (set_in("norm", "shape", 4), "bad_shape"),
    "negative length": (set_in("norm", "shape", [-4]), "bad_shape"),
    "float length": (set_in("norm", "shape", [4.0]), "bad_shape"),
    "boolean length": (set_in("norm", "shape", [4, True]), "bad_shape"),
    "nine dimensions": (set_in("norm", "shape", [1] * 8 + [4]), "bad_shape"),
    "giant length": (set_in("norm", "shape", [1 << 70]), "bad_json"),
    "shape of too many bytes": (set_in("norm", "shape", [1 << 40, 1 << 40]), "bad_shape"),
    "empty shape of too many bytes": (set_in("norm", "shape", [0, 1 << 62]), "bad_shape"),
    "one offset": (set_in("norm", "data_offsets", [0]), "bad_offsets"),
    "offsets turned round": (set_in("norm", "data_offsets", [16, 0]), "bad_offsets"),
    "negative offset": (set_in("norm", "data_offsets", [-16, 0]), "bad_offsets"),
    "another length": (set_in("norm", "shape", [5]), "bad_offsets"),
    "array taken out": (set_in("norm", ...), "hole"),
    "overlap": (set_in("more", entry(0, 8, [8])), "overlap"),
    "array past the end": (set_in("more", entry(10_000, 10_008, [8])), "hole"),
    "name with control character": (set_in("a\tb", entry(0, 0, [0])), "bad_name"),
    "name too long": (set_in("a" * 600, entry(0, 0, [0])), "bad_name"),
    "dense and clustered": (set_in("m.weight", entry(0, 0, [0])), "duplicate_tensor"),
    "one array more": (set_in("more", entry(0, 0, [0])), "digest_mismatch"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_header(folder: Path, case: str) -> None:
    change, kind = HEADERS[case]
    with_header(folder / WEIGHTS, change)
    assert kind in {problem.kind for problem in problems_of(folder)}


@pytest.mark.parametrize(
    ("header", "kind"),
    [
        (b"", "bad_json"),
        (b"{", "bad_json"),
        (b"[]", "bad_header"),
        (b" {}", "bad_header"),
        (b'{"a": 1, "a": 2}', "duplicate_key"),
        (b"\xff", "bad_json"),
        (b"{}", "trailing_bytes"),
    ],
)
def test_header_bytes(folder: Path, header: bytes, kind: str) -> None:
    with_header_bytes(folder / WEIGHTS, header)
    assert [problem.kind for problem in problems_of(folder)] == [kind]


def test_truncation_at_every_length(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    for length in range(0, len(data), 7):
        (folder / WEIGHTS).write_bytes(data[:length])
        assert [problem.kind for problem in problems_of(folder)] == ["truncated"], length


def test_trailing_bytes(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes() + b"\0")
    assert kinds(problems_of(folder)) == [("trailing_bytes", None)]


def test_a_header_longer_than_allowed_is_not_read(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(b"\xff" * 64)
    assert [problem.kind for problem in problems_of(folder)] == ["header_too_long"]


@pytest.mark.parametrize("number", range(0, 4000, 37))
def test_any_flipped_byte_is_found_or_harmless(folder: Path, number: int) -> None:
    """A damaged file may only raise InvalidFileError; a model that opens must be unchanged, or the check must detect it."""
    data = bytearray((folder / WEIGHTS).read_bytes())
    data[number % len(data)] ^= 1 << (number % 8)
    (folder / WEIGHTS).write_bytes(data)
    try:
        found = open_hf(folder, check=True)
    except InvalidFileError:
        return
    assert found.digest() == model().digest()


# Weights: their values.


@pytest.mark.parametrize(
    ("key", "content", "problem"),
    [
        # 0, 1, 2, 3, 7 in three bits each; then 0, 1, 2, 3, 5 and the unused last bit set.
        ("m.codes", (0o73210).to_bytes(2, "little"), ("code_out_of_range", "m.weight")),
        ("m.codes", (0o153210).to_bytes(2, "little"), ("bad_padding", "m.weight")),
        ("m.codes", (0o43210).to_bytes(2, "little"), ("digest_mismatch", "quantization_config")),
        ("codebooks.book", np.full(12, np.nan, np.float16).tobytes(), ("not_finite", "book")),
        ("m.row_scale", np.full(2, np.inf, np.float32).tobytes(), ("not_finite", "m.weight")),
        ("m.outlier_values", np.full(2, np.nan, np.float32).tobytes(), ("not_finite", "m.weight")),
        ("m.outlier_positions", np.array([7, 1], np.uint32).tobytes(), ("outliers_unsorted", "m.weight")),
        ("m.outlier_positions", np.array([1, 10], np.uint32).tobytes(), ("outlier_out_of_range", "m.weight")),
        ("flags", b"\1\2", ("bad_bool", "flags")),
        ("norm", np.zeros(4, np.float32).tobytes(), ("digest_mismatch", "quantization_config")),
    ],
)
def test_values(folder: Path, key: str, content: bytes, problem: tuple[str, str]) -> None:
    with_array(folder / WEIGHTS, key, content)
    assert kinds(problems_of(folder)) == [problem]
    # Detected when it is read, not before.
    opened = open_hf(folder)
    if problem[0] != "digest_mismatch":
        with pytest.raises(InvalidFileError):
            opened.digest()


def test_all_faulty_payloads_come_together(folder: Path) -> None:
    with_array(folder / WEIGHTS, "flags", b"\1\2")
    with_array(folder / WEIGHTS, "m.row_scale", np.full(2, np.inf, np.float32).tobytes())
    assert kinds(problems_of(folder)) == [("bad_bool", "flags"), ("not_finite", "m.weight")]


@pytest.mark.parametrize(
    ("key", "dtype", "shape"), [("m.codes", "I8", [2]), ("m.codes", "U8", [2, 1]), ("m.codes", "U16", [1])]
)
def test_codes_in_another_form(folder: Path, key: str, dtype: str, shape: list[int]) -> None:
    with_header(folder / WEIGHTS, lambda header: header[key].update(dtype=dtype, shape=shape))
    assert kinds(problems_of(folder)) == [("wrong_form", "m.weight")]


def test_a_file_cut_while_open_is_noticed(folder: Path) -> None:
    opened = open_hf(folder)
    with (folder / WEIGHTS).open("r+b") as stream:
        stream.truncate(100)
    with pytest.raises(InvalidFileError) as caught:
        opened.digest()
    assert caught.value.problems[0].kind == "file_changed"


# Shards and their index.


@pytest.mark.parametrize(
    "name", ["../m/model.safetensors", "/etc/passwd", "a\\b.safetensors", "C:x.safetensors", "..", "x.bin", 1]
)
def test_shard_names_do_not_lead_out(sharded: Path, name: object) -> None:
    edit(sharded / INDEX, set_in("weight_map", "norm", name))
    assert kinds(problems_of(sharded)) == [("bad_shard_name", "norm")]


@pytest.mark.parametrize("weight_map", [..., {}, [], "x"])
def test_index_without_map(sharded: Path, weight_map: Any) -> None:
    edit(sharded / INDEX, set_in("weight_map", weight_map))
    assert [problem.kind for problem in problems_of(sharded)] == ["bad_index"]


def test_missing_shard(sharded: Path) -> None:
    next(sharded.glob("*-of-*.safetensors")).unlink()
    assert "missing" in {problem.kind for problem in problems_of(sharded)}


def test_index_without_an_array(sharded: Path) -> None:
    index = json.loads((sharded / INDEX).read_bytes())["weight_map"]
    # An array that shares its shard with others; otherwise the whole shard would be omitted.
    key = next(key for key, name in index.items() if list(index.values()).count(name) > 1)
    edit(sharded / INDEX, set_in("weight_map", key, ...))
    assert kinds(problems_of(sharded)) == [("misplaced_tensor", key)]


def test_index_without_a_whole_shard(sharded: Path) -> None:
    edit(sharded / INDEX, set_in("weight_map", "norm", ...))
    assert kinds(problems_of(sharded)) == [("digest_mismatch", "quantization_config")]


def test_index_with_an_array_too_many(sharded: Path) -> None:
    edit(sharded / INDEX, lambda index: index["weight_map"].update(more=index["weight_map"]["norm"]))
    assert kinds(problems_of(sharded)) == [("missing_tensor", "more")]


def test_an_array_in_two_shards(sharded: Path) -> None:
    first, second = sorted(sharded.glob("*-of-*.safetensors"))[:2]
    key = next(key for key in header_of(first.read_bytes()) if key != "__metadata__")
    with_header(second, lambda header: header.update({key: entry(0, 0, [0])}))
    assert kinds(problems_of(sharded)) == [("misplaced_tensor", key)]


def test_two_sets_of_weights(sharded: Path, folder: Path) -> None:
    shutil.copy(folder / WEIGHTS, sharded)
    assert [problem.kind for problem in problems_of(sharded)] == ["ambiguous_weights"]


# The record and the side files.

RECORDS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "newer version": (set_in("version", 2), "newer_version"),
    "no version": (set_in("version", ...), "bad_record"),
    "version 1.0": (set_in("version", 1.0), "bad_record"),
    "unknown key": (set_in("more", 1), "bad_record"),
    "no provenance": (set_in("provenance", ...), "bad_record"),
    "provenance a list": (set_in("provenance", []), "wrong_type"),
    "self-test a number": (set_in("self_test", 1), "wrong_type"),
    "files an object": (set_in("files", {}), "wrong_type"),
    "file a number": (set_in("files", [1]), "wrong_type"),
    "file leading out": (set_in("files", ["../m/config.json"]), "bad_name"),
    "file with absolute path": (set_in("files", ["/etc/passwd"]), "bad_name"),
    "file twice": (set_in("files", ["tokenizer.json", "tokenizer.json"]), "bad_name"),
    "file of the format": (set_in("files", ["config.json"]), "bad_name"),
    "missing file": (set_in("files", ["vocab.txt"]), "missing"),
    "file with the name of a shard": (set_in("files", ["model.x.safetensors"]), "bad_name"),
    "file with a name no system takes": (set_in("files", ["x" * 400]), "missing"),
    "a list": (lambda _: [], "wrong_type"),
}


@pytest.mark.parametrize("case", RECORDS)
def test_record(folder: Path, case: str) -> None:
    change, kind = RECORDS[case]
    edit(folder / "cluscomp.json", change)
    assert [problem.kind for problem in problems_of(folder)] == [kind]


def test_side_files_are_what_they_were_when_the_model_was_opened(folder: Path) -> None:
    opened = open_hf(folder)
    whole = (folder / "tokenizer.json").read_bytes()
    (folder / "tokenizer.json").write_bytes(b"")
    assert opened.files["tokenizer.json"].read().tobytes() == whole
    (folder / "tokenizer.json").unlink()
    assert opened.files["tokenizer.json"].read().tobytes() == whole


# The folder.


@pytest.mark.parametrize("name", ["config.json", "cluscomp.json", WEIGHTS])
def test_missing_files(folder: Path, name: str) -> None:
    (folder / name).unlink()
    assert [(problem.kind, problem.file) for problem in problems_of(folder)] == [("missing", str(folder / name))]


@pytest.mark.parametrize("name", ["config.json", "cluscomp.json", WEIGHTS])
def test_folders_and_pipes_in_place_of_files(folder: Path, name: str) -> None:
    (folder / name).unlink()
    (folder / name).mkdir()
    assert [problem.kind for problem in problems_of(folder)] == ["is_folder"]
    (folder / name).rmdir()
    os.mkfifo(folder / name)
    assert [problem.kind for problem in problems_of(folder)] == ["not_a_file"]


def test_no_folder(tmp_path: Path) -> None:
    for path, kind in ((tmp_path / "x", "missing"), (Path(__file__), "not_a_folder")):
        with pytest.raises(InvalidFileError) as caught:
            open_hf(path)
        assert caught.value.problems[0].kind == kind


def test_json_longer_than_allowed_is_not_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader_module, "MAX_JSON_BYTES", 10)
    assert [problem.kind for problem in problems_of(folder)] == ["file_too_long"]


@pytest.mark.parametrize("name", ["config.json", "cluscomp.json", "tokenizer.json", "model.safetensors.index.json"])
def test_a_sparse_file_of_a_terabyte_is_not_read(folder: Path, name: str) -> None:
    if name.endswith("index.json"):
        (folder / WEIGHTS).unlink()
        (folder / name).touch()
    os.truncate(folder / name, 1 << 40)
    assert [(problem.kind, problem.file) for problem in problems_of(folder)] == [("file_too_long", str(folder / name))]


@pytest.mark.parametrize("name", ["config.json", "cluscomp.json", "tokenizer.json"])
def test_links_to_files_of_the_user_are_refused(folder: Path, name: str) -> None:
    private = folder.parent / "private"
    (folder / name).rename(private)
    (folder / name).symlink_to(private)
    assert [(problem.kind, problem.file) for problem in problems_of(folder)] == [("foreign_link", str(folder / name))]


def test_the_system_refusing_is_a_storage_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(StorageError):
        open_hf(folder)
