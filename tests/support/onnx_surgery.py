"""A small ONNX folder and ways to change it, for the tests of what readers refuse."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from runtime_models import clustered_model, side_file, small_config

from cluscomp_export.onnx_graph import build_graph
from cluscomp_formats.errors import InvalidFileError, Problem
from cluscomp_formats.onnx import open_onnx
from cluscomp_formats.onnx.spec import DATA_FILE, MODEL_FILE, SUBFOLDER
from cluscomp_formats.onnx.writer import write_onnx

QUERY = "model.layers.0.self_attn.q_proj"


def make_folder(folder: Path) -> Path:
    """A Llama of one layer whose matrices have two stages, row scales and outliers, and one side file."""
    config = small_config(num_hidden_layers=1, tie_word_embeddings=True)
    model = clustered_model(config, {"tokenizer.json": side_file("{}")}, stages=2, row_scale=True, outliers=3, cluster_dim=3)
    write_onnx(model, folder, build_graph(model))
    return folder


def model_file(folder: Path) -> Path:
    return folder / SUBFOLDER / MODEL_FILE


def data_file(folder: Path) -> Path:
    return folder / SUBFOLDER / DATA_FILE


def problems_of(folder: Path, *, check: bool = True) -> tuple[Problem, ...]:
    """The problems found in a folder, all of files inside it; fails if there are none."""
    with pytest.raises(InvalidFileError) as caught:
        open_onnx(folder, check=check)
    assert all((problem.file or "").startswith(str(folder)) for problem in caught.value.problems)
    return caught.value.problems


def kinds(problems: tuple[Problem, ...]) -> list[str]:
    return [problem.kind for problem in problems]


def edit(folder: Path, change: Callable[[onnx.ModelProto], None]) -> None:
    file = model_file(folder)
    proto = onnx.load(file, load_external_data=False)
    change(proto)
    file.write_bytes(proto.SerializeToString())


def edit_metadata(folder: Path, key: str, change: Callable[[Any], Any]) -> None:
    def apply(proto: onnx.ModelProto) -> None:
        entry = next(entry for entry in proto.metadata_props if entry.key == f"cluscomp.{key}")
        value = json.loads(entry.value)
        changed = change(value)
        entry.value = json.dumps(value if changed is None else changed, sort_keys=True, separators=(",", ":"))

    edit(folder, apply)


def edit_external(folder: Path, name: str, key: str, text: str) -> None:
    def apply(proto: onnx.ModelProto) -> None:
        tensor = next(tensor for tensor in proto.graph.initializer if tensor.name == name)
        next(entry for entry in tensor.external_data if entry.key == key).value = text

    edit(folder, apply)


def node_of(proto: onnx.ModelProto, op: str) -> onnx.NodeProto:
    return next(node for node in proto.graph.node if node.op_type == op)
