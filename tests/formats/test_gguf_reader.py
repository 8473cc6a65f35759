"""Damaged and hostile native files: each is rejected with its own problem, without harm."""

from __future__ import annotations

import json
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from clustered_models import with_clusters
from gguf_surgery import REMOVED, json_key, rewrite
from hypothesis import given, settings
from hypothesis import strategies as st
from model_builders import tiny_llama

from cluscomp_export.sources import open_source
from cluscomp_formats.errors import ClusCompError, InvalidFileError, UnsupportedError
from cluscomp_formats.gguf import looks_gguf, open_gguf, write_dense_gguf, write_gguf
from cluscomp_formats.gguf.container import _PLAIN_TYPES
from cluscomp_formats.gguf.spec import GGML_TYPES
from cluscomp_formats.packed import read_header, write_packed
from cluscomp_formats.sections.header import header_value
from cluscomp_formats.sections.tiles import tile_codes


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sound") / "m.gguf"
    write_gguf(with_clusters(tiny_llama()), path)
    return path


def problems_of(path: Path, *, check: bool = True) -> set[tuple[str, str | None]]:
    """Return the kind and place of the problems found; fails if there are none."""
    with pytest.raises(InvalidFileError) as caught:
        open_gguf(path, check=check)
    assert all(problem.file == str(path) for problem in caught.value.problems)
    return {(problem.kind, problem.tensor) for problem in caught.value.problems}


KEYS = ["version", "row_order", "digest", "config", "provenance", "layout", "sections", "crc32"]


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("value", [REMOVED, 7, "text", [1.5], ["a"], '{"a": 1}', '["x"]', "\u00e9"])
def test_a_key_missing_or_of_another_kind(sound: Path, tmp_path: Path, key: str, value: Any) -> None:
    path = rewrite(sound, tmp_path / "m.gguf", {f"cluscomp.{key}": value})
    kinds = {kind for kind, _ in problems_of(path)}
    assert kinds <= {"bad_key", "bad_json", "not_canonical", "newer_version", "bad_digest", "missing_tensor", "unknown_tensor"}


def test_a_newer_version(sound: Path, tmp_path: Path) -> None:
    path = rewrite(sound, tmp_path / "m.gguf", {"cluscomp.version": 2})
    assert problems_of(path) == {("newer_version", "cluscomp.version")}


def test_another_order_of_rows(sound: Path, tmp_path: Path) -> None:
    path = rewrite(sound, tmp_path / "m.gguf", {"cluscomp.row_order": "llama.cpp"})
    assert problems_of(path) == {("bad_key", "cluscomp.row_order")}


def test_another_alignment(sound: Path, tmp_path: Path) -> None:
    assert problems_of(rewrite(sound, tmp_path / "m.gguf", alignment=32)) == {("bad_key", "general.alignment")}


def test_a_file_of_another_architecture_is_not_ours(sound: Path, tmp_path: Path) -> None:
    path = rewrite(sound, tmp_path / "m.gguf", architecture="llama")
    assert not looks_gguf(path)
    assert problems_of(path) == {("not_native", "general.architecture")}


def test_a_self_test_that_is_no_object(sound: Path, tmp_path: Path) -> None:
    path = rewrite(sound, tmp_path / "m.gguf", {"cluscomp.self_test": "3"})
    assert problems_of(path) == {("bad_key", "cluscomp.self_test")}


def test_tensors_and_sections_that_do_not_match(sound: Path, tmp_path: Path) -> None:
    codes = "blk.0.attn_q.codes"
    path = rewrite(sound, tmp_path / "1.gguf", tensors={codes: REMOVED})
    assert problems_of(path) == {("missing_tensor", codes)}
    path = rewrite(sound, tmp_path / "2.gguf", tensors={"extra": np.zeros(4, np.float32)})
    assert problems_of(path) == {("unknown_tensor", "extra")}
    names = gguf.GGUFReader(sound).fields["cluscomp.sections"].contents()
    path = rewrite(sound, tmp_path / "3.gguf", {"cluscomp.sections": [names[0], *names[:1], *names[2:]]})
    assert problems_of(path) == {("section_shared", names[0]), ("unknown_tensor", names[1])}
    path = rewrite(sound, tmp_path / "4.gguf", {"cluscomp.sections": [names[1], names[0], *names[2:]]})
    assert {kind for kind, _ in problems_of(path)} <= {"section_length", "wrong_form", "checksum_mismatch"}
    path = rewrite(sound, tmp_path / "5.gguf", {"cluscomp.crc32": [1, 2]})
    assert problems_of(path) == {("bad_key", "cluscomp.crc32")}


def test_a_tensor_of_another_type_or_shape(sound: Path, tmp_path: Path) -> None:
    name = "blk.0.attn_q.codes"
    stored = next(tensor for tensor in gguf.GGUFReader(sound).tensors if tensor.name == name).data
    halves = rewrite(sound, tmp_path / "1.gguf", tensors={name: np.array(stored).view(np.float16)})
    assert problems_of(halves) == {("wrong_form", name)}
    turned = rewrite(sound, tmp_path / "2.gguf", tensors={name: np.array(stored).reshape(8, 36)})
    assert problems_of(turned) == {("wrong_form", name)}
    shorter = rewrite(sound, tmp_path / "3.gguf", tensors={name: np.array(stored)[:20]})
    assert {kind for kind, _ in problems_of(shorter)} == {"section_length"}


def test_changed_values(sound: Path, tmp_path: Path) -> None:
    name = "blk.0.attn_v.outlier_values"
    path = rewrite(sound, tmp_path / "m.gguf", tensors={name: np.array([3.0, -5.0], np.float32)})
    open_gguf(path)
    assert {kind for kind, _ in problems_of(path)} == {"checksum_mismatch"}


def test_a_code_past_its_codebook(sound: Path, tmp_path: Path) -> None:
    """The checksum is correct, so that only the check of the range can fail."""
    reader = gguf.GGUFReader(sound)
    names = reader.fields["cluscomp.sections"].contents()
    checksums = reader.fields["cluscomp.crc32"].contents()
    number = names.index("blk.0.attn_k.codes")
    # 3-bit codes for 5 clusters.
    codes = tile_codes(np.full((24, 3), 7, np.uint16), 3).view(np.int8)
    checksums[number] = zlib.crc32(codes.tobytes())
    path = rewrite(sound, tmp_path / "m.gguf", {"cluscomp.crc32": checksums}, {names[number]: codes})
    assert {kind for kind, _ in problems_of(path)} == {"code_out_of_range"}


def changed_layout(sound: Path, path: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    layout = json_key(sound, "cluscomp.layout")
    change(layout)
    return rewrite(sound, path, {"cluscomp.layout": layout})


V = "model.layers.0.self_attn.v_proj.weight"


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (lambda layout: layout.pop("files"), "bad_key"),
        (lambda layout: layout.update(more={}), "bad_key"),
        (lambda layout: layout["codebooks"].pop("kv"), "unknown_codebook"),
        (lambda layout: layout["codebooks"].update(unused=layout["codebooks"]["kv"]), "unused_codebook"),
        (lambda layout: layout["tensors"].pop(V), "section_unused"),
        (lambda layout: layout["tensors"][V].update(group_axis="up"), "bad_group_axis"),
        (lambda layout: layout["tensors"][V].update(shape=[8, 25]), "bad_tensor"),
        (lambda layout: layout["tensors"][V].update(stages=[]), "bad_tensor"),
        (lambda layout: layout["tensors"][V]["stages"][0].update(codes=10_000), "bad_section"),
        (lambda layout: layout["files"].update({"../evil": layout["files"].pop("notes.txt")}), "bad_name"),
    ],
)
def test_a_layout_that_lies(sound: Path, tmp_path: Path, change: Callable[[dict[str, Any]], None], kind: str) -> None:
    assert kind in {found for found, _ in problems_of(changed_layout(sound, tmp_path / "m.gguf", change))}


def test_another_configuration_is_not_what_the_digest_says(sound: Path, tmp_path: Path) -> None:
    config = {**json_key(sound, "cluscomp.config"), "rope_theta": 5.0}
    path = rewrite(sound, tmp_path / "m.gguf", {"cluscomp.config": config})
    open_gguf(path)
    assert problems_of(path) == {("digest_mismatch", "header")}


def test_cut_anywhere(sound: Path, tmp_path: Path) -> None:
    data = sound.read_bytes()
    path = tmp_path / "m.gguf"
    # Every 97th byte, and all near the end.
    for length in [*range(0, len(data), 97 * len(data) // 20_000), *range(len(data) - 70, len(data))]:
        path.write_bytes(data[:length])
        looks_gguf(path)
        with pytest.raises(InvalidFileError):
            open_gguf(path)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_changed_byte_is_found(sound: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    content = bytearray(sound.read_bytes())
    header_end = min(tensor.data_offset for tensor in gguf.GGUFReader(sound).tensors)
    at = data.draw(st.integers(0, int(header_end) - 1) | st.integers(0, len(content) - 1))
    content[at] ^= data.draw(st.integers(1, 255))
    path = tmp_path_factory.mktemp("changed") / "m.gguf"
    path.write_bytes(content)
    looks_gguf(path)
    try:
        found = open_gguf(path, check=True)
    except ClusCompError:
        return
    # Only data unrelated to the weights may change undetected: other programs' keys, provenance, names, padding.
    assert found.digest() == open_gguf(sound).digest()


def test_things_that_are_no_files(tmp_path: Path) -> None:
    assert not looks_gguf(tmp_path)
    assert not looks_gguf(tmp_path / "missing")
    (tmp_path / "empty").touch()
    assert not looks_gguf(tmp_path / "empty")
    for path in (tmp_path, tmp_path / "missing", tmp_path / "empty"):
        with pytest.raises(InvalidFileError):
            open_gguf(path)


def test_a_damaged_file_of_ours_is_reported_as_ours(sound: Path, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(sound.read_bytes()[:5000])
    with pytest.raises(InvalidFileError) as caught:
        open_source(path)
    assert caught.value.problems[0].kind == "truncated"


def test_a_file_cut_while_open(sound: Path, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(sound.read_bytes())
    model = open_gguf(path)
    with path.open("r+b") as stream:
        stream.truncate(1000)
    with pytest.raises(InvalidFileError) as caught:
        model.tensors[V].decode()
    assert caught.value.problems[0].kind == "file_changed"


def test_the_layout_key_is_the_packed_headers_description(sound: Path, tmp_path: Path) -> None:
    write_packed(open_gguf(sound), tmp_path / "m.clus")
    value = json.loads(json.dumps(header_value(read_header(tmp_path / "m.clus"))))
    assert json_key(sound, "cluscomp.layout") == {key: value[key] for key in ("codebooks", "files", "tensors")}


def test_reading_needs_no_gguf_package(sound: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = open_gguf(sound).digest()
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert open_gguf(sound, check=True).digest() == expected


def test_writing_says_which_package_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    for write in (write_gguf, write_dense_gguf):
        with pytest.raises(UnsupportedError) as caught:
            write(tiny_llama(), tmp_path / "m.gguf")
        assert "pip install cluscomp-export[gguf]" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_the_types_of_native_files_are_those_of_gguf_py() -> None:
    assert {
        int(kind): (kind.name, *gguf.GGML_QUANT_SIZES[kind])
        for kind in gguf.GGMLQuantizationType
        if kind.name in GGML_TYPES.values()
    } == _PLAIN_TYPES
