"""GGUF files of both flavours as other parsers list them: Hugging Face's (which shows them on the Hub) and gguf-dump."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest

from cluscomp_export.conversion.convert import ConversionOptions, convert
from cluscomp_formats.registry import open_model


@pytest.fixture(scope="module", params=["native", "f16", "q4_0"])
def path(request: pytest.FixtureRequest, packed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("gguf") / f"{request.param}.gguf"
    gguf_type = None if request.param == "native" else request.param
    convert(packed, output, ConversionOptions(to="gguf", gguf_type=gguf_type))
    return output


def test_hugging_faces_parser_finds_what_gguf_py_finds(path: Path, node: Callable[..., Any]) -> None:
    answer = node("gguf_listing.mjs", {"path": str(path)})
    reader = gguf.GGUFReader(path)
    found = [(tensor["name"], tensor["shape"], tensor["dtype"], tensor["offset"]) for tensor in answer["tensors"]]
    start = min(tensor.data_offset for tensor in reader.tensors)
    assert found == [
        (tensor.name, tensor.shape.tolist(), int(tensor.tensor_type), int(tensor.data_offset - start))
        for tensor in reader.tensors
    ]
    metadata = answer["metadata"]
    assert metadata.pop("version") == 3
    assert metadata.pop("tensor_count") == len(reader.tensors)
    expected = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert metadata.pop("kv_count") == len(expected)
    assert metadata == expected


def test_gguf_dump_lists_every_tensor(path: Path, packed: Path) -> None:
    command = [sys.executable, "-m", "gguf.scripts.gguf_dump", "--json", str(path)]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=60)
    assert done.returncode == 0, done.stderr
    listed = json.loads(done.stdout)
    model = open_model(packed)
    assert listed["metadata"]["llama.block_count"]["value"] == model.config["num_hidden_layers"]
    query = model.clustered["model.layers.0.self_attn.q_proj.weight"]
    codebook = query.stages[0].codebook.values.shape
    if path.stem == "native":
        expected = {"blk.0.attn_q.codes", "blk.0.attn_q.codebook"}
        assert listed["tensors"]["blk.0.attn_q.codebook"]["shape"] == list(reversed(codebook))
    else:
        expected = {"blk.0.attn_q.weight"}
        assert listed["tensors"]["blk.0.attn_q.weight"]["shape"] == list(reversed(query.shape))
    assert expected <= listed["tensors"].keys()
