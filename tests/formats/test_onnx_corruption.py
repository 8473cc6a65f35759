"""One kind of damage to an ONNX folder per test; each is detected and named."""

from __future__ import annotations

import os
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from fuzzing.onnx_mutations import wire_field
from hub_cache import hub_cache
from onnx import helper, numpy_helper
from onnx_surgery import (
    QUERY,
    data_file,
    edit,
    edit_external,
    edit_metadata,
    kinds,
    make_folder,
    model_file,
    node_of,
    problems_of,
)
from runtime_models import clustered_model, small_config

from cluscomp_export.onnx_graph import build_graph
from cluscomp_formats import registry
from cluscomp_formats.errors import MAX_PROBLEMS, ClusCompError, InvalidFileError, UnsupportedError
from cluscomp_formats.onnx import holds_only_onnx, looks_onnx, open_onnx
from cluscomp_formats.onnx.spec import MAX_MODEL_BYTES, MODEL_FILE, SUBFOLDER


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "m")


def test_a_sound_folder_is_opened_by_its_name_or_its_file(folder: Path) -> None:
    assert open_onnx(folder, check=True).digest() == open_onnx(model_file(folder), check=True).digest()
    assert registry.open_model(folder).files["tokenizer.json"].read().tobytes() == b"{}"


# What the container says.


@pytest.mark.parametrize("content", [b"", b"\x08", b"{}", b"\xff" * 100, b"\x08\x0a" + b"\x80" * 40])
def test_not_a_protobuf(folder: Path, content: bytes) -> None:
    model_file(folder).write_bytes(content)
    assert kinds(problems_of(folder)) in (["bad_protobuf"], ["bad_metadata"])
    assert not looks_onnx(folder)


def test_truncated_model(folder: Path) -> None:
    content = model_file(folder).read_bytes()
    model_file(folder).write_bytes(content[: len(content) // 2])
    assert kinds(problems_of(folder)) == ["bad_protobuf"]


def test_model_too_long(folder: Path) -> None:
    with model_file(folder).open("r+b") as stream:
        stream.truncate(MAX_MODEL_BYTES + 1)
    assert kinds(problems_of(folder)) == ["file_too_long"]
    assert not looks_onnx(folder)


def test_no_model(folder: Path) -> None:
    model_file(folder).unlink()
    assert kinds(problems_of(folder)) == ["missing"]
    assert not looks_onnx(folder)


@pytest.mark.skipif(sys.platform == "win32", reason="no named pipes")
@pytest.mark.parametrize("file_of", [model_file, data_file])
def test_a_pipe_is_not_waited_for(folder: Path, file_of: Callable[[Path], Path]) -> None:
    file_of(folder).unlink()
    os.mkfifo(file_of(folder))
    assert kinds(problems_of(folder)) == ["not_a_file"]


def test_an_onnx_file_of_others(tmp_path: Path) -> None:
    graph = helper.make_graph([], "g", [], [])
    onnx.save(helper.make_model(graph), tmp_path / "other.onnx")
    assert not looks_onnx(tmp_path / "other.onnx")
    assert kinds(problems_of(tmp_path / "other.onnx")) == ["bad_metadata"]


def overwrite(folder: Path, found: bytes, replacement: bytes) -> None:
    """Change the encoded bytes, since protobuf's interface refuses to write such values."""
    content = model_file(folder).read_bytes()
    assert found in content
    assert len(found) == len(replacement)
    model_file(folder).write_bytes(content.replace(found, replacement))


@pytest.mark.parametrize(
    "text",
    ["cluscomp.version", '"model_type":"llama"', "model.norm.weight", "model.onnx_data", "length"],
)
def test_a_text_that_is_not_utf8(folder: Path, text: str) -> None:
    """protobuf returns it as bytes."""
    overwrite(folder, text.encode(), b"\xff" + text.encode()[1:])
    assert kinds(problems_of(folder)) == ["bad_text"]


def test_an_import_that_is_not_utf8(folder: Path) -> None:
    edit(folder, lambda proto: proto.opset_import.add(domain="unicode?", version=1) and None)
    overwrite(folder, b"unicode?", b"unicode\xff")
    assert kinds(problems_of(folder)) == ["bad_imports"]


def test_a_node_whose_name_is_not_utf8(folder: Path) -> None:
    def apply(proto: onnx.ModelProto) -> None:
        codes = node_of(proto, "ClusLinear").input[2]
        proto.graph.node.append(helper.make_node("Identity", [codes], ["copy"], name="unicode?"))

    edit(folder, apply)
    overwrite(folder, b"unicode?", b"unicode\xff")
    (problem,) = problems_of(folder)
    assert problem.kind == "misused_weight"
    assert "unicode" in str(problem)


def test_the_version_of_the_container_comes_first(folder: Path) -> None:
    """`looks_onnx` checks for it."""
    content = model_file(folder).read_bytes()
    assert content[:2] == b"\x08\x0a"
    model_file(folder).write_bytes(content[2:] + content[:2])
    assert kinds(problems_of(folder)) == ["bad_protobuf"]
    assert not looks_onnx(folder)


def test_another_version_of_the_container(folder: Path) -> None:
    edit(folder, lambda proto: setattr(proto, "ir_version", 7))
    assert kinds(problems_of(folder)) == ["bad_ir_version"]


@pytest.mark.parametrize("path", ["a" * 5000, "a\0b", "/dev/null", "/dev/zero", "/proc/self/mem", "", "\ud800"])
def test_looking_at_anything_never_raises(path: str, tmp_path: Path) -> None:
    assert not looks_onnx(Path(path))
    assert not looks_onnx(tmp_path / path)
    assert not holds_only_onnx(Path(path))
    assert not holds_only_onnx(tmp_path / path)


def test_a_link_to_itself(folder: Path) -> None:
    model_file(folder).unlink()
    model_file(folder).symlink_to(model_file(folder))
    assert not looks_onnx(folder)
    assert not holds_only_onnx(folder)
    with pytest.raises(ClusCompError):
        open_onnx(folder)


NODE, ATTRIBUTE, INITIALIZER, GRAPH, SUBGRAPHS = 1, 5, 5, 7, 11


@pytest.mark.parametrize(
    ("unit", "around"),
    [
        (wire_field(NODE, b""), [GRAPH]),
        (wire_field(INITIALIZER, b""), [GRAPH]),
        (wire_field(ATTRIBUTE, b""), [NODE, GRAPH]),
        (wire_field(NODE, wire_field(ATTRIBUTE, b"")), [GRAPH]),
        (wire_field(SUBGRAPHS, b""), [ATTRIBUTE, NODE, GRAPH]),
        (wire_field(14, b""), []),
        (wire_field(25, b""), []),
    ],
    ids=["nodes", "initialisers", "attributes", "nodes with an attribute", "subgraphs", "metadata", "functions"],
)
def test_empty_messages_by_the_thousand(folder: Path, unit: bytes, around: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Two encoded bytes become 150 bytes when parsed, and would become a thousand as Python objects."""
    for module in ("reader", "graph_check"):
        monkeypatch.setattr(f"cluscomp_formats.onnx.{module}.MAX_ENTRIES", 5000)
    content = unit * 5001
    for number in around:
        content = wire_field(number, content)
    with model_file(folder).open("ab") as stream:
        # protobuf merges appended messages.
        stream.write(content)
    assert kinds(problems_of(folder)) == ["too_many_entries"]


def test_a_fault_in_every_initialiser(folder: Path) -> None:
    with model_file(folder).open("ab") as stream:
        stream.write(wire_field(GRAPH, wire_field(INITIALIZER, b"") * 50_000))
    tracemalloc.start()
    try:
        problems = problems_of(folder)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(problems) == MAX_PROBLEMS
    # One problem per entry would exceed 10 MB.
    assert peak < 5_000_000


# Metadata.


def test_no_metadata_left(folder: Path) -> None:
    edit(folder, lambda proto: proto.ClearField("metadata_props"))
    (problem,) = problems_of(folder)
    assert problem.kind == "bad_metadata"
    assert "drop its metadata" in (problem.remedy or "")


@pytest.mark.parametrize("key", ["config", "crc32", "digest", "files", "layout", "provenance", "sections", "version"])
def test_a_key_is_missing(folder: Path, key: str) -> None:
    def drop(proto: onnx.ModelProto) -> None:
        kept = [entry for entry in proto.metadata_props if entry.key != f"cluscomp.{key}"]
        proto.ClearField("metadata_props")
        proto.metadata_props.extend(kept)

    edit(folder, drop)
    (problem,) = problems_of(folder)
    assert (problem.kind, key in (problem.found or "")) == ("bad_metadata", True)


def test_a_key_twice(folder: Path) -> None:
    edit(folder, lambda proto: proto.metadata_props.add(key="cluscomp.version", value="1") and None)
    assert kinds(problems_of(folder)) == ["duplicate_key"]


def test_an_unknown_key(folder: Path) -> None:
    edit(folder, lambda proto: proto.metadata_props.add(key="cluscomp.extra", value="1") and None)
    assert kinds(problems_of(folder)) == ["bad_metadata"]


def test_keys_of_others_are_their_business(folder: Path) -> None:
    edit(folder, lambda proto: proto.metadata_props.add(key="author", value="me") and None)
    open_onnx(folder, check=True)


def test_a_newer_version(folder: Path) -> None:
    edit_metadata(folder, "version", lambda _: 2)
    assert kinds(problems_of(folder)) == ["newer_version"]


@pytest.mark.parametrize("version", [0, -1, True, "1", 1.0, [1]])
def test_no_such_version(folder: Path, version: object) -> None:
    edit_metadata(folder, "version", lambda _: version)
    assert kinds(problems_of(folder)) == ["bad_version"]


@pytest.mark.parametrize("text", ["", "{", '{"a":1,"a":2}', "NaN", '{"b":1, "a":2}', "[" * 100 + "]" * 100, "1" * 5000])
def test_not_canonical_json(folder: Path, text: str) -> None:
    def apply(proto: onnx.ModelProto) -> None:
        next(entry for entry in proto.metadata_props if entry.key == "cluscomp.config").value = text

    edit(folder, apply)
    assert len(problems_of(folder)) == 1


@pytest.mark.parametrize(
    ("key", "change", "kind"),
    [
        ("sections", lambda value: {}, "bad_metadata"),
        ("sections", lambda value: [1, *value[1:]], "bad_metadata"),
        ("sections", lambda value: [value[1], *value[1:]], "bad_metadata"),
        ("sections", lambda value: value[:-1], "bad_metadata"),
        ("crc32", lambda value: value[:-1], "bad_metadata"),
        ("crc32", lambda value: 3, "bad_metadata"),
        ("layout", lambda value: [], "bad_metadata"),
        ("layout", lambda value: {"tensors": {}}, "bad_metadata"),
        ("layout", lambda value: value["codebooks"].pop(f"{QUERY}.weight.0") and None, "unknown_codebook"),
        ("layout", lambda value: value["tensors"].pop("model.norm.weight") and None, "section_unused"),
        ("digest", lambda value: "sha256:12", "bad_digest"),
        ("config", lambda value: [], "wrong_type"),
        ("files", lambda value: "x", "wrong_type"),
        ("files", lambda value: ["../secret"], "bad_name"),
        ("files", lambda value: ["config.json"], "bad_name"),
        ("files", lambda value: ["absent.txt"], "missing"),
    ],
)
def test_metadata_of_another_form(folder: Path, key: str, change: Callable[[Any], Any], kind: str) -> None:
    edit_metadata(folder, key, change)
    assert kind in kinds(problems_of(folder))


def test_shapes_that_do_not_fit(folder: Path) -> None:
    def widen(layout: Any) -> None:
        layout["tensors"][f"{QUERY}.weight"]["shape"] = [32, 31]

    edit_metadata(folder, "layout", widen)
    assert problems_of(folder)


def test_a_code_section_claimed_by_two(folder: Path) -> None:
    def share(layout: Any) -> None:
        stages = layout["tensors"][f"{QUERY}.weight"]["stages"]
        stages[1]["codes"] = stages[0]["codes"]

    edit_metadata(folder, "layout", share)
    assert "section_shared" in kinds(problems_of(folder))


# External data.


@pytest.mark.parametrize("location", ["../model.onnx_data", "/etc/passwd", "other", "", "onnx/model.onnx_data"])
def test_data_in_another_file(folder: Path, location: str) -> None:
    edit_external(folder, f"{QUERY}.codes", "location", location)
    (problem,) = problems_of(folder)
    assert (problem.kind, problem.tensor) == ("bad_external_data", f"{QUERY}.codes")


@pytest.mark.parametrize("key", ["offset", "length"])
@pytest.mark.parametrize("text", ["-1", "", "1e3", "0x10", "٣", "9" * 30, " 1"])
def test_places_that_are_no_numbers(folder: Path, key: str, text: str) -> None:
    edit_external(folder, f"{QUERY}.codes", key, text)
    assert kinds(problems_of(folder)) == ["bad_external_data"]


@pytest.mark.parametrize("key", ["offset", "length"])
@pytest.mark.parametrize("text", ["0", "1", "64", "999999999999999999"])
def test_places_of_something_else(folder: Path, key: str, text: str) -> None:
    edit_external(folder, f"{QUERY}.codes", key, text)
    assert {*kinds(problems_of(folder))} <= {"section_misplaced", "truncated", "trailing_bytes", "section_length"}


def test_a_checksum_for_the_runtime_is_not_ours(folder: Path) -> None:
    def apply(proto: onnx.ModelProto) -> None:
        proto.graph.initializer[0].external_data.add(key="checksum", value="1")

    edit(folder, apply)
    assert kinds(problems_of(folder)) == ["bad_external_data"]


def test_inline_data(folder: Path) -> None:
    def apply(proto: onnx.ModelProto) -> None:
        tensor = next(tensor for tensor in proto.graph.initializer if tensor.name == "model.norm.weight")
        tensor.CopyFrom(numpy_helper.from_array(np.ones(32, np.float32), "model.norm.weight"))

    edit(folder, apply)
    assert kinds(problems_of(folder)) == ["bad_external_data"]


def test_inline_data_beside_external(folder: Path) -> None:
    edit(folder, lambda proto: proto.graph.initializer[0].float_data.append(1.0))
    assert kinds(problems_of(folder)) == ["wrong_form"]


def test_data_truncated_and_longer(folder: Path) -> None:
    file = data_file(folder)
    content = file.read_bytes()
    file.write_bytes(content[:-64])
    assert kinds(problems_of(folder)) == ["truncated"]
    file.write_bytes(content + bytes(64))
    assert kinds(problems_of(folder)) == ["trailing_bytes"]
    file.write_bytes(b"")
    assert kinds(problems_of(folder)) == ["truncated"]


def test_no_data(folder: Path) -> None:
    data_file(folder).unlink()
    assert kinds(problems_of(folder)) == ["missing"]


def test_a_flipped_bit_anywhere_in_the_data_is_found(folder: Path) -> None:
    content = bytearray(data_file(folder).read_bytes())
    proto = onnx.load(model_file(folder), load_external_data=False)
    for tensor in proto.graph.initializer[::9]:
        place = {entry.key: entry.value for entry in tensor.external_data}
        position = int(place["offset"]) + int(place["length"]) - 1
        content[position] ^= 1
        data_file(folder).write_bytes(content)
        assert kinds(problems_of(folder)) == ["checksum_mismatch"], tensor.name
        content[position] ^= 1


def test_a_digest_of_something_else(folder: Path) -> None:
    edit_metadata(folder, "digest", lambda _: "sha256:" + "0" * 64)
    open_onnx(folder)
    assert kinds(problems_of(folder)) == ["digest_mismatch"]


# Around it.


def test_the_file_by_its_name_in_the_current_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder / SUBFOLDER)
    assert open_onnx(Path(MODEL_FILE), check=True).files["tokenizer.json"].read().tobytes() == b"{}"


def test_links_are_followed(folder: Path) -> None:
    """The cache of the Hugging Face Hub consists of links."""
    snapshot = hub_cache(folder, folder.parent / "models--owner--name")
    assert looks_onnx(snapshot)
    assert open_onnx(snapshot, check=True).files["tokenizer.json"].read().tobytes() == b"{}"


def test_a_link_to_a_file_of_the_user_is_refused(folder: Path) -> None:
    (folder.parent / "private").write_text("{}")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").symlink_to(folder.parent / "private")
    assert kinds(problems_of(folder)) == ["foreign_link"]


@pytest.mark.skipif(sys.platform == "win32", reason="no named pipes")
def test_a_side_file_that_is_none(folder: Path) -> None:
    """Reading a pipe would wait for a writer; reading a device would never end."""
    for make, kind in (
        (os.mkfifo, "not_a_file"),
        (lambda path: path.symlink_to("/dev/zero"), "foreign_link"),
        (lambda path: path.symlink_to(path), "missing"),
        (lambda path: path.symlink_to("nothing"), "missing"),
    ):
        (folder / "tokenizer.json").unlink()
        make(folder / "tokenizer.json")
        assert kinds(problems_of(folder)) == [kind]


def test_side_files_are_what_they_were_when_the_model_was_opened(folder: Path) -> None:
    model = open_onnx(folder)
    (folder / "tokenizer.json").unlink()
    assert model.files["tokenizer.json"].read().tobytes() == b"{}"


def test_a_folder_called_like_a_file_is_not_replaced(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()
    (folder / "config.json" / "thesis.txt").write_text("years of work")
    assert not holds_only_onnx(folder)


def test_a_file_that_becomes_unreadable(folder: Path) -> None:
    model = open_onnx(folder)
    with data_file(folder).open("r+b") as stream:
        stream.truncate(100)
    with pytest.raises(InvalidFileError):
        model.digest()


def test_without_the_package_onnx(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluscomp_formats.onnx.package.find_spec", lambda name: None)
    with pytest.raises(UnsupportedError, match=r"cluscomp-export\[onnx\]"):
        open_onnx(folder)
    with pytest.raises(UnsupportedError, match=r"cluscomp-export\[onnx\]"):
        build_graph(clustered_model(small_config()))
    assert looks_onnx(folder)


def test_only_what_holds_nothing_else_may_be_replaced(folder: Path) -> None:
    assert holds_only_onnx(folder)
    (folder / "thesis.txt").write_text("years of work")
    assert not holds_only_onnx(folder)
    (folder / "thesis.txt").rename(folder / SUBFOLDER / "thesis.txt")
    assert not holds_only_onnx(folder)
    (folder / SUBFOLDER / "thesis.txt").unlink()
    assert holds_only_onnx(folder)
    model_file(folder).write_bytes(b"damaged")
    assert not holds_only_onnx(folder)
