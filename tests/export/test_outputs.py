"""No output is an input, a file of one, in its folder, or another output: told before any work."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from hub_cache import hub_cache

from cluscomp_export.outputs import check_apart
from cluscomp_formats.errors import InvalidRequestError


@pytest.fixture
def folder(stories_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(stories_folder, tmp_path / "model"))


def refused(outputs: list[Path | None], *inputs: Path | None) -> str | None:
    try:
        check_apart(outputs, inputs)
    except InvalidRequestError as error:
        return error.problems[0].kind
    return None


def test_beside_the_inputs_all_is_well(folder: Path, tmp_path: Path) -> None:
    assert refused([tmp_path / "out.clus", tmp_path / "report", None], folder, None, tmp_path / "nothing") is None
    assert refused([tmp_path / "model.clus"], folder) is None
    (tmp_path / "out.clus").touch()
    assert refused([tmp_path / "out.clus"], folder) is None


def test_in_a_source_folder(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(folder)
    for output in (folder / "out.clus", folder / "deep" / "out", folder / "config.json", tmp_path / "link" / "out"):
        assert refused([tmp_path / "out.clus", output], folder) == "output_in_source"
    assert refused([folder / "out.clus"], tmp_path / "link") == "output_in_source"
    assert refused([folder], folder) == "output_is_source"
    assert refused([tmp_path / "link"], folder) == "output_is_source"


def test_a_file_of_the_source_wherever_it_lies(folder: Path, tmp_path: Path) -> None:
    repository = tmp_path / "models--owner--name"
    snapshot = hub_cache(folder, repository)
    for blob in (repository / "blobs").iterdir():
        assert refused([blob], snapshot) == "output_is_source"
    assert refused([repository / "blobs" / "new"], snapshot) is None
    os.link((snapshot / "config.json").resolve(), tmp_path / "hard link")
    assert refused([tmp_path / "hard link"], snapshot) == "output_is_source"


def test_files_beside_a_source_that_is_a_file(folder: Path, tmp_path: Path) -> None:
    """A safetensors file is read with what lies beside it; parts of a split GGUF file with each other."""
    for name in ("config.json", "tokenizer.json"):
        assert refused([folder / name], folder / "model.safetensors") == "output_is_source"
    assert refused([folder / "out.clus"], folder / "model.safetensors") is None
    parts = [tmp_path / f"m-{number:05d}-of-00002.gguf" for number in (1, 2)]
    for part in parts:
        part.write_bytes(b"GGUF")
    assert refused([parts[1]], parts[0]) == "output_is_source"
    assert refused([tmp_path / "m.gguf"], parts[0]) is None


def test_an_output_that_holds_an_input(folder: Path, tmp_path: Path) -> None:
    assert refused([folder], folder / "model.safetensors") == "source_in_output"
    assert refused([tmp_path], folder) == "source_in_output"


def test_two_outputs_in_one_place(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    for report in (tmp_path / "out", tmp_path / "link" / "out", tmp_path / "out" / "report"):
        assert refused([tmp_path / "out", report], folder) == "one_output"


def test_names_no_file_can_have_are_for_others_to_refuse(folder: Path, tmp_path: Path) -> None:
    assert refused([tmp_path / "a\0b", tmp_path / ("n" * 300)], folder, tmp_path / "c\0d") is None
