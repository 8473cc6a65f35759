"""One fault per test: every fault of a packed file has its own problem, which names file and tensor."""

import json
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from packed_surgery import (
    header_of,
    preamble_fields,
    problems_of,
    with_header,
    with_header_bytes,
    with_preamble,
    with_section,
)

from cluscomp_formats import check_payloads, tiled_codes
from cluscomp_formats.errors import InvalidFileError, Problem, StorageError
from cluscomp_formats.ir import Array, ClusteredWeight, Codebook, DenseTensor, Model, Outliers, Stage
from cluscomp_formats.packed import open_packed, read_header, write_packed
from cluscomp_formats.registry import detect, open_model

# Sections, in file order.
BOOLS, CODEBOOK, CODES, ROW_SCALE, POSITIONS, VALUES, NORM, TOKENIZER = range(8)


def sample() -> Model:
    codebook = Codebook("book", Array.of(np.array([[1, 2], [3, 4], [5, 6]], dtype=np.float16)))
    outliers = Outliers(Array.of(np.array([1, 4], dtype=np.uint32)), Array.of(np.array([1, 2], dtype=np.float32)))
    codes = Array.of(np.array([[0, 1], [2, 1], [0, 2]], dtype=np.uint16) % 3)
    scale = Array.of(np.ones(3, dtype=np.float32))
    tensors = {
        "attn": ClusteredWeight("attn", (3, 3), (Stage(codebook, codes),), row_scale=scale, outliers=outliers),
        "norm": DenseTensor("norm", Array.of(np.ones(5, dtype=np.float32))),
        "active": DenseTensor("active", Array.of(np.array([True, False]))),
    }
    files = {"tokenizer.json": Array.of(np.frombuffer(b"{}", dtype=np.uint8))}
    return Model({"hidden_size": 3}, tensors, files, {"seed": 1})


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.clus"


@pytest.fixture
def data(path: Path) -> bytes:
    write_packed(sample(), path)
    return path.read_bytes()


def kinds(problems: tuple[Problem, ...]) -> list[tuple[str, str | None]]:
    return [(problem.kind, problem.tensor) for problem in problems]


# The preamble.


@pytest.mark.parametrize(
    ("field", "change", "kind"),
    [
        (1, lambda _: 0, "bad_version"),
        (1, lambda _: 2, "newer_version"),
        (2, lambda _: 1, "unknown_flags"),
        (7, lambda _: bytes(15) + b"\1", "reserved_not_zero"),
        (3, lambda length: length + 1, "truncated"),
        (3, lambda length: length - 1, "trailing_bytes"),
        (4, lambda offset: offset + 1, "bad_header_offset"),
        (4, lambda _: 0, "bad_header_offset"),
        (4, lambda _: 2**64 - 64, "bad_header_length"),
        (5, lambda length: length + 1, "bad_header_length"),
        (5, lambda _: 2**64 - 1, "header_too_long"),
        (6, lambda crc: crc ^ 1, "checksum_mismatch"),
    ],
)
def test_preamble_field(path: Path, data: bytes, field: int, change: Callable[[Any], Any], kind: str) -> None:
    changed = with_preamble(data, field, change(preamble_fields(data)[field]))
    assert kind in {problem.kind for problem in problems_of(path, changed, check=False)}


def test_all_problems_of_the_preamble_come_together(path: Path, data: bytes) -> None:
    changed = with_preamble(with_preamble(data, 2, 4), 7, b"\1" * 16)
    assert kinds(problems_of(path, changed)) == [("unknown_flags", "preamble"), ("reserved_not_zero", "preamble")]


def test_preamble_checksum(path: Path, data: bytes) -> None:
    (problem,) = problems_of(path, data[:60] + b"\0\0\0\0" + data[64:])
    assert (problem.kind, problem.tensor) == ("checksum_mismatch", "preamble")


def test_newer_version_says_upgrade(path: Path, data: bytes) -> None:
    (problem,) = problems_of(path, with_preamble(data, 1, 7))
    assert problem.found == "version 7"
    assert problem.remedy == "upgrade cluscomp-export"


def test_trailing_bytes(path: Path, data: bytes) -> None:
    (problem,) = problems_of(path, data + b"\0")
    assert problem.kind == "trailing_bytes"
    assert problem.expected == str(len(data))


# Files of other types.


@pytest.mark.parametrize(
    ("start", "looks_like"),
    [
        (b"GGUF\3\0\0\0", "GGUF"),
        (b"PK\3\4\x14\0\0\0", "zip archive"),
        (b"\x80\2}q\0.", "pickle"),
        (b"\x60\1\0\0\0\0\0\0{\"a\":", "safetensors"),
        (b"\x93NUMPY\1\0", "NumPy"),
        (b"\x1f\x8b\x08\0\0\0", "gzip"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        (b"<!DOCTYPE html>", "HTML"),
        (b'{"model_type"', "JSON"),
        (bytes(100), "an incomplete write"),
        (b"\xc1CLUS\n\x1a\1\0", "transfer as text"),
        (b"\xc1CLUS\r\r\n\x1a", "transfer as text"),
        ("\xc1CLUS\r\n".encode(), "transfer as text"),
        (b"MZ\x90\0\3\0\0\0", "4d 5a 90"),
    ],
)  # fmt: skip
def test_says_what_another_file_looks_like(path: Path, start: bytes, looks_like: str) -> None:
    (problem,) = problems_of(path, start)
    assert problem.kind == "bad_magic"
    assert looks_like in str(problem.found)


def test_empty_file_folder_pipe_and_nothing(tmp_path: Path) -> None:
    assert problems_of(tmp_path / "empty", b"")[0].kind == "empty"
    with pytest.raises(InvalidFileError) as folder:
        open_packed(tmp_path)
    assert folder.value.problems[0].kind == "is_folder"
    with pytest.raises(InvalidFileError) as device:
        open_packed(Path("/dev/null"))
    assert device.value.problems[0].kind == "not_a_file"
    with pytest.raises(InvalidFileError) as nothing:
        open_packed(tmp_path / "nothing")
    assert nothing.value.problems[0].kind == "missing"


def test_the_system_refusing_is_a_storage_error(path: Path, data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(StorageError) as caught:
        open_packed(path)
    assert caught.value.problems[0].file == str(path)


def test_registry_finds_the_format_by_content(path: Path, data: bytes, tmp_path: Path) -> None:
    renamed = path.rename(tmp_path / "model.bin")
    found = detect(renamed)
    assert found is not None
    assert found.name == "packed"
    assert open_model(renamed).digest() == sample().digest()
    mangled = tmp_path / "mangled.clus"
    mangled.write_bytes(data.replace(b"\r\n", b"\n"))
    with pytest.raises(InvalidFileError, match="binary mode"):
        open_model(mangled)
    for other in (tmp_path, tmp_path / "nothing"):
        assert detect(other) is None


# The header's text.


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        (b"", "bad_json"),
        (b"{", "bad_json"),
        (b'{"a":"\xc3\xa9"}', "bad_json"),
        (b"[" * 100_000, "bad_json"),
        (b"[" * 80 + b"]" * 80, "bad_json"),
        (b'{"a":' * 50_000 + b"1" + b"}" * 50_000, "bad_json"),
        (b'{"config":{"x":NaN}}', "bad_json"),
        (b'{"config":{"x":-Infinity}}', "bad_json"),
        (b'{"config":{"x":1e999}}', "bad_json"),
        (b'{"a":' + b"9" * 5000 + b"}", "bad_json"),
        (b'{"a":18446744073709551616}', "bad_json"),
        (b'{"a":"\\ud800"}', "bad_json"),
        (b'{"\\udfff":1}', "bad_json"),
        (b'{"a":1,"a":2}', "duplicate_key"),
        (b'{"config":{"b":1,"b":1}}', "duplicate_key"),
        (b'{"b":1,"a":2}', "not_canonical"),
        (b'{"a": 1}', "not_canonical"),
        (b'{"a":1.50}', "not_canonical"),
        (b'{"a":"\\u0041"}', "not_canonical"),
        (b"[]", "wrong_type"),
        (b"null", "wrong_type"),
        (b"{}", "missing_key"),
    ],
)
def test_header_text(path: Path, data: bytes, text: bytes, kind: str) -> None:
    (problem,) = problems_of(path, with_header_bytes(data, text), check=False)
    assert (problem.kind, problem.tensor) == (kind, "header")


def test_header_too_long_is_not_even_read(path: Path, data: bytes) -> None:
    problems = problems_of(path, with_preamble(data, 5, (1 << 26) + 1))
    assert "header_too_long" in {problem.kind for problem in problems}


# The header's content.

ATTN = ("tensors", "attn")
Change = Callable[[dict[str, Any]], Any]


def put(*keys: Any) -> Change:
    """Set the member at the path `keys[:-1]` to `keys[-1]`."""

    def change(header: dict[str, Any]) -> None:
        target: Any = header
        for key in keys[:-2]:
            target = target[key]
        target[keys[-2]] = keys[-1]

    return change


def drop(*keys: Any) -> Change:
    def change(header: dict[str, Any]) -> None:
        target: Any = header
        for key in keys[:-1]:
            target = target[key]
        del target[keys[-1]]

    return change


def rename(*keys: Any) -> Change:
    def change(header: dict[str, Any]) -> None:
        target: Any = header
        for key in keys[:-2]:
            target = target[key]
        target[keys[-1]] = target.pop(keys[-2])

    return change


@pytest.mark.parametrize(
    ("change", "kind", "tensor"),
    [
        (put("extra", 1), "unknown_key", "header"),
        (drop("config"), "missing_key", "header"),
        (put("config", []), "wrong_type", "header"),
        (put("provenance", None), "wrong_type", "header"),
        (put("self_test", "yes"), "wrong_type", "header"),
        (put("sections", {}), "wrong_type", "header"),
        (put("tensors", []), "wrong_type", "header"),
        (put("digest", "sha256:12"), "bad_digest", "header"),
        (put("digest", None), "bad_digest", "header"),
        (put("sections", CODES, "offset", -64), "bad_integer", "sections[2]"),
        (put("sections", CODES, "length", True), "bad_integer", "sections[2]"),
        (put("sections", CODES, "length", 2.0), "bad_integer", "sections[2]"),
        (put("sections", CODES, "length", 2**63), "bad_integer", "sections[2]"),
        (put("sections", CODES, "crc32", 2**32), "bad_integer", "sections[2]"),
        (put("sections", CODES, "crc32", "0"), "bad_integer", "sections[2]"),
        (put("sections", CODES, "note", ""), "unknown_key", "sections[2]"),
        (drop("sections", CODES, "crc32"), "missing_key", "sections[2]"),
        (put("sections", CODES, "offset", 193), "section_misaligned", "sections[2]"),
        (put("sections", CODES, "offset", 128), "section_overlap", "sections[2]"),
        (put("sections", CODES, "offset", 256), "section_hole", "sections[2]"),
        (put("sections", TOKENIZER, "length", 2**40), "header_misplaced", "header"),
        (put(*ATTN, "kind", "sparse"), "unknown_kind", "attn"),
        (put(*ATTN, "kind", ["dense"]), "unknown_kind", "attn"),
        (drop(*ATTN, "kind"), "unknown_kind", "attn"),
        (put(*ATTN, 7), "wrong_type", "attn"),
        (put(*ATTN, "rotation", 1), "unknown_key", "attn"),
        (drop(*ATTN, "stages"), "missing_key", "attn"),
        (put(*ATTN, "stages", []), "bad_tensor", "attn"),
        (put(*ATTN, "stages", 0, "codebook", "other"), "unknown_codebook", "attn"),
        (put(*ATTN, "stages", 0, "codebook", 1), "wrong_type", "attn"),
        (put(*ATTN, "group_axis", "both"), "bad_group_axis", "attn"),
        (put(*ATTN, "group_axis", ["in"]), "bad_group_axis", "attn"),
        (put(*ATTN, "shape", [3]), "bad_shape", "attn"),
        (put(*ATTN, "shape", [3, -3]), "bad_shape", "attn"),
        (put(*ATTN, "shape", [3.0, 3]), "bad_shape", "attn"),
        (put(*ATTN, "shape", [True, 3]), "bad_shape", "attn"),
        (put(*ATTN, "shape", [0, 3]), "bad_tensor", "attn"),
        (put(*ATTN, "shape", [3, 2**62]), "section_length", "attn"),
        (put(*ATTN, "shape", [3, 30]), "section_length", "attn"),
        (put(*ATTN, "shape", [4, 3]), "bad_tensor", "attn"),
        (put(*ATTN, "row_scale", "dtype", "int32"), "bad_tensor", "attn"),
        (put(*ATTN, "row_scale", "dtype", "float16"), "section_length", "attn"),
        (put(*ATTN, "row_scale", "dtype", "complex64"), "unknown_dtype", "attn"),
        (put(*ATTN, "row_scale", "dtype", ["float32"]), "unknown_dtype", "attn"),
        (put(*ATTN, "row_scale", "shape", [4]), "bad_tensor", "attn"),
        (put(*ATTN, "row_scale", None), "wrong_type", "attn"),
        (put(*ATTN, "outliers", "positions", "dtype", "int32"), "bad_tensor", "attn"),
        (put(*ATTN, "outliers", "values", "shape", [1]), "bad_tensor", "attn"),
        (drop(*ATTN, "outliers", "values"), "missing_key", "attn"),
        (drop(*ATTN, "outliers"), "section_unused", "sections[4]"),
        (put("tensors", "norm", "values", "section", 8), "bad_section", "norm"),
        (put("tensors", "norm", "values", "section", -1), "bad_section", "norm"),
        (put("tensors", "norm", "values", "section", True), "bad_section", "norm"),
        (put("tensors", "norm", "values", "section", ROW_SCALE), "section_shared", "norm"),
        (put("files", "tokenizer.json", NORM), "section_shared", "tokenizer.json"),
        (put("tensors", "norm", "values", "shape", [6]), "section_length", "norm"),
        (put("tensors", "norm", "values", "shape", [2**61, 2**61]), "bad_shape", "norm"),
        (put("tensors", "norm", "values", "shape", [2**62, 0, 2**62]), "bad_shape", "norm"),
        (put("tensors", "norm", "values", "shape", [1] * 9), "bad_shape", "norm"),
        (put("tensors", "norm", "values", "shape", 5), "wrong_type", "norm"),
        (drop("tensors", "norm"), "section_unused", "sections[6]"),
        (rename("tensors", "norm", "aaaa"), "section_order", "aaaa"),
        (put("codebooks", "book", "shape", [6]), "bad_codebook", "book"),
        (put("codebooks", "book", "shape", [0, 2]), "bad_codebook", "book"),
        (put("codebooks", "book", "shape", [65537, 2]), "bad_codebook", "book"),
        (put("codebooks", "book", "dtype", "int16"), "bad_codebook", "book"),
        (put("codebooks", "book", "shape", [4, 2]), "section_length", "book"),
        (put("codebooks", "spare", {"dtype": "float16", "section": 0, "shape": [1, 1]}), "unused_codebook", "spare"),
        (rename("tensors", "norm", ""), "bad_name", ""),
        (rename("tensors", "norm", "no\nrm"), "bad_name", "no\nrm"),
        (rename("tensors", "norm", "n" * 513), "bad_name", "n" * 200 + "..."),
        (rename("codebooks", "book", "\x7f"), "bad_name", "\x7f"),
        (rename("files", "tokenizer.json", "../passwd"), "bad_name", "../passwd"),
        (rename("files", "tokenizer.json", "/etc/passwd"), "bad_name", "/etc/passwd"),
        (rename("files", "tokenizer.json", "a\\b"), "bad_name", "a\\b"),
        (rename("files", "tokenizer.json", "C:evil"), "bad_name", "C:evil"),
        (rename("files", "tokenizer.json", ".."), "bad_name", ".."),
        (rename("files", "tokenizer.json", "."), "bad_name", "."),
    ],
)
def test_header_content(path: Path, data: bytes, change: Change, kind: str, tensor: str) -> None:
    changed = with_header(data, change)
    assert (kind, tensor) in kinds(problems_of(path, changed, check=False))
    with pytest.raises(InvalidFileError):
        read_header(path)


def test_all_problems_come_together(path: Path, data: bytes) -> None:
    def change(header: dict[str, Any]) -> None:
        header["tensors"]["norm"]["values"]["dtype"] = "float8"
        header["tensors"]["attn"]["kind"] = "sparse"
        header["sections"][CODES]["crc32"] = -1

    found = kinds(problems_of(path, with_header(data, change)))
    assert found == [("bad_integer", "sections[2]"), ("unknown_kind", "attn"), ("unknown_dtype", "norm")]


def test_a_shared_section_is_reported_with_the_one_left_over(path: Path, data: bytes) -> None:
    changed = with_header(data, put("tensors", "norm", "values", {"dtype": "float32", "section": ROW_SCALE, "shape": [3]}))
    assert kinds(problems_of(path, changed)) == [("section_shared", "norm"), ("section_unused", "sections[6]")]


# The sections' content: detected when the section is read, or immediately with check=True.


def float_bytes(*values: float) -> bytes:
    return np.array(values, dtype=np.float32).tobytes()


# Codes are 2 bits wide. Those of group 0, (0, 2, 0), and of group 1, (1, 1, 2), are stored as 00 00 10 00, 00 10 01 01.
@pytest.mark.parametrize(
    ("section", "content", "problem"),
    [
        (CODES, bytes([0b00001100, 0b00100101]), ("code_out_of_range", "attn")),
        (CODES, bytes([0b01001000, 0b00100101]), ("bad_padding", "attn")),
        (CODEBOOK, np.array([1, 2, np.nan, 4, 5, 6], dtype=np.float16).tobytes(), ("not_finite", "book")),
        (CODEBOOK, np.array([1, 2, 3, 4, 5, -np.inf], dtype=np.float16).tobytes(), ("not_finite", "book")),
        (ROW_SCALE, float_bytes(1, np.inf, 1), ("not_finite", "attn")),
        (VALUES, float_bytes(np.nan, 1), ("not_finite", "attn")),
        (POSITIONS, np.array([4, 1], dtype=np.uint32).tobytes(), ("outliers_unsorted", "attn")),
        (POSITIONS, np.array([4, 4], dtype=np.uint32).tobytes(), ("outliers_unsorted", "attn")),
        (POSITIONS, np.array([1, 9], dtype=np.uint32).tobytes(), ("outlier_out_of_range", "attn")),
        (BOOLS, b"\1\2", ("bad_bool", "active")),
        (NORM, float_bytes(1, 1, 1, 1, 2), ("digest_mismatch", "header")),
    ],
)
def test_section_content(path: Path, data: bytes, section: int, content: bytes, problem: tuple[str, str]) -> None:
    found = problems_of(path, with_section(data, section, content))
    assert kinds(found) == [problem]
    if problem[0] != "digest_mismatch":
        with pytest.raises(InvalidFileError) as caught:
            check_payloads(open_packed(path))
        assert caught.value.problems == found


@pytest.mark.parametrize("content", [bytes([0b00001100, 0b00100101]), bytes([0b01001000, 0b00100101])])
def test_codes_are_checked_before_they_are_mapped(path: Path, data: bytes, content: bytes) -> None:
    found = problems_of(path, with_section(data, CODES, content))
    stage = open_packed(path).clustered["attn"].stages[0]
    for _ in range(2):
        with pytest.raises(InvalidFileError) as caught:
            tiled_codes(stage)
        assert caught.value.problems == found


@pytest.mark.parametrize("section", range(8))
def test_damage_is_found_when_the_section_is_read_and_not_before(path: Path, data: bytes, section: int) -> None:
    place = header_of(data)["sections"][section]
    damaged = bytearray(data)
    damaged[place["offset"]] ^= 0x80
    owner = ["active", "book", "attn", "attn", "attn", "attn", "norm", "tokenizer.json"][section]
    assert kinds(problems_of(path, bytes(damaged))) == [("checksum_mismatch", owner)]
    model = open_packed(path)
    arrays = [array for _, array in model.payloads()] + [model.files["tokenizer.json"]]
    for number, array in enumerate(arrays):
        if number == section:
            with pytest.raises(InvalidFileError) as caught:
                array.read()
            assert kinds(caught.value.problems) == [("checksum_mismatch", owner)]
        else:
            array.read()


def test_damage_in_several_sections_comes_together(path: Path, data: bytes) -> None:
    damaged = bytearray(data)
    for section in (BOOLS, NORM):
        damaged[header_of(data)["sections"][section]["offset"]] ^= 1
    assert kinds(problems_of(path, bytes(damaged))) == [("checksum_mismatch", "active"), ("checksum_mismatch", "norm")]


def test_padding_must_be_zero(path: Path, data: bytes) -> None:
    place = header_of(data)["sections"][NORM]
    damaged = bytearray(data)
    damaged[place["offset"] + place["length"]] = 1
    assert kinds(problems_of(path, bytes(damaged))) == [("bad_padding", "norm")]


def test_a_wrong_digest_is_found_by_check(path: Path, data: bytes) -> None:
    changed = with_header(data, put("digest", "sha256:" + "0" * 64))
    assert kinds(problems_of(path, changed)) == [("digest_mismatch", "header")]
    assert open_packed(path).digest() == sample().digest() != read_header(path).digest


def test_a_file_cut_while_open_is_an_error_not_a_crash(path: Path, data: bytes) -> None:
    model = open_packed(path)
    with path.open("r+b") as stream:
        stream.truncate(128)
    with pytest.raises(InvalidFileError) as caught:
        model.tensors["norm"].decode()
    assert kinds(caught.value.problems) == [("file_changed", "norm")]


def test_claims_of_giant_sizes_allocate_nothing(path: Path, data: bytes) -> None:
    """Shapes are compared with the section's length in Python integers, which cannot overflow."""
    import tracemalloc

    def change(header: dict[str, Any]) -> None:
        header["tensors"]["attn"]["shape"] = [2**40, 2**20]
        header["tensors"]["norm"]["values"]["shape"] = [2**20, 2**20]

    changed = with_header(data, change)
    tracemalloc.start()
    problems_of(path, changed)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10_000_000


def test_surgery_itself_is_sound(path: Path, data: bytes) -> None:
    """Changing nothing gives the same bytes, so the tests above see only their own change."""
    assert with_header(data, lambda _: None) == data
    assert with_preamble(data, 1, 1) == data
    content = data[header_of(data)["sections"][CODES]["offset"] :][:2]
    assert content == bytes([0b00001000, 0b00100101])
    assert with_section(data, CODES, content) == data
    assert zlib.crc32(content) == header_of(data)["sections"][CODES]["crc32"]
    assert json.loads(data[preamble_fields(data)[4] :]) == header_of(data)
