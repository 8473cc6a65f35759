"""Which reader a path goes to, and what the others refuse."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from sources_gguf_writer import finish, tiny_model, write_gguf

from cluscomp_export.sources import open_source, source_bytes
from cluscomp_formats import registry
from cluscomp_formats.errors import InvalidFileError, StorageError
from cluscomp_formats.format import Format
from cluscomp_formats.ir import Array, DenseTensor, Model

OWN = Model({}, {"w": DenseTensor("w", Array.of(np.ones(2, np.float32)))}, provenance={"format": "ours"})


@pytest.fixture(autouse=True)
def _own_format(monkeypatch: pytest.MonkeyPatch) -> None:
    """One registered format of our own, recognised by its first bytes or by a file in its folder."""

    def matches(path: Path) -> bool:
        try:
            return (path / "own.marker").exists() if path.is_dir() else path.read_bytes()[:4] == b"OWN1"
        except OSError:
            return False

    fmt = Format("ours", "a format of these tests", matches, lambda path: OWN)
    monkeypatch.setattr(registry, "formats", lambda: (fmt,))


def test_content_decides_not_the_suffix(tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.safetensors", tiny_model("llama"), "llama")
    save_file({"w": torch.zeros(1)}, tmp_path / "model.gguf")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.bin").write_bytes(b"OWN1")
    assert open_source(tmp_path / "model.safetensors").provenance["format"] == "gguf"
    assert open_source(tmp_path / "model.gguf").provenance["format"] == "huggingface"
    assert open_source(tmp_path / "model.bin").provenance["format"] == "ours"


def test_folders_of_our_own_format_go_to_the_registry(tmp_path: Path) -> None:
    (tmp_path / "own.marker").touch()
    save_file({"w": torch.zeros(3)}, tmp_path / "model.safetensors")
    config = {"quantization_config": {"quant_method": "cluscomp"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert open_source(tmp_path).provenance["format"] == "ours"
    assert source_bytes(tmp_path) == sum(file.stat().st_size for file in tmp_path.iterdir())


def test_gguf_files_of_our_own_architecture_go_to_the_registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = gguf.GGUFWriter(tmp_path / "own.gguf", "cluscomp")
    writer.add_tensor("w", np.zeros(32, np.float32))
    finish(writer)
    ours = Format("ours", "", lambda path: b"cluscomp" in path.read_bytes(), lambda path: OWN)
    monkeypatch.setattr(registry, "formats", lambda: (ours,))
    assert open_source(tmp_path / "own.gguf").provenance["format"] == "ours"


@pytest.mark.parametrize("content", [b"", b"x", b"\xff" * 8 + b"{", bytes(64)])
def test_unknown_files_are_refused_with_the_known_formats(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(InvalidFileError) as caught:
        open_source(path)
    problem = caught.value.problems[0]
    assert (problem.kind, problem.file) == ("unknown_format", str(path))
    for name in ("Hugging Face", "GGUF", "ours: a format of these tests"):
        assert name in str(problem.expected)


def test_a_safetensors_file_cut_off_in_its_header_is_named_as_such(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(1)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    content = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(content[:20])
    with pytest.raises(InvalidFileError) as caught:
        open_source(tmp_path / "model.safetensors")
    assert caught.value.problems[0].kind == "truncated"


def test_a_folder_with_only_gguf_files_points_to_them(tmp_path: Path) -> None:
    (tmp_path / "b.gguf").touch()
    (tmp_path / "a.gguf").touch()
    with pytest.raises(InvalidFileError, match=r"name the file itself instead of its folder: a\.gguf"):
        open_source(tmp_path)


def test_what_the_system_does_not_let_us_read_is_a_storage_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_gguf(tmp_path / "model.gguf", tiny_model("llama"), "llama")

    def refuse(*arguments: Any, **options: Any) -> Any:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(StorageError, match="Permission denied"):
        open_source(path)


@pytest.mark.parametrize("function", [open_source, source_bytes])
def test_what_is_not_there_is_missing(tmp_path: Path, function: Any) -> None:
    with pytest.raises(InvalidFileError) as caught:
        function(tmp_path / "nothing")
    assert caught.value.problems[0].kind == "missing"
