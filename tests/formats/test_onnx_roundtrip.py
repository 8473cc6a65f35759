"""ONNX folders: any model is read back bit for bit, and unsupported models are rejected before anything is written."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from clustered_models import with_clusters
from hypothesis import given
from model_builders import tiny_llama
from model_strategies import assert_same, models
from onnx_graphs import graph_of
from runtime_models import side_file

from cluscomp_export.onnx_graph import build_graph
from cluscomp_formats.errors import InvalidRequestError, OutputExistsError
from cluscomp_formats.ir import Array, ClusteredWeight, DenseTensor, Model
from cluscomp_formats.onnx import open_onnx
from cluscomp_formats.onnx.graph import Graph
from cluscomp_formats.onnx.spec import DATA_FILE, MODEL_FILE, SUBFOLDER
from cluscomp_formats.onnx.writer import write_onnx
from cluscomp_formats.packed import open_packed, write_packed


def with_graph(model: Model, folder: Path, **options: object) -> Path:
    write_onnx(model, folder, graph_of(model), **options)  # type: ignore[arg-type]
    return folder


@given(models())
def test_any_model(model: Model) -> None:
    # Names that the format rejects; see the tests below.
    names = {name.casefold() for name in model.files}
    if names & {"config.json", "onnx"} or any(name.endswith(".safetensors") for name in names):
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        try:
            with_graph(model, folder)
        except InvalidRequestError as error:
            assert {problem.kind for problem in error.problems} == {"name_collision"}  # noqa: PT017
            return
        assert_same(open_onnx(folder, check=True), model)
        # Via another format and back: the same bytes.
        write_packed(open_onnx(folder), Path(scratch) / "m.clus")
        again = with_graph(open_packed(Path(scratch) / "m.clus"), Path(scratch) / "again")
        for name in (MODEL_FILE, DATA_FILE):
            assert (again / SUBFOLDER / name).read_bytes() == (folder / SUBFOLDER / name).read_bytes()


def test_the_self_test_sees_the_written_model(tmp_path: Path) -> None:
    model = with_clusters(tiny_llama())
    seen = []

    def record(written: Model) -> dict[str, object]:
        seen.append(written.digest())
        return {"number": 1}

    report = write_onnx(model, tmp_path / "m", build_graph(model), self_test=record)
    assert seen == [report.digest] == [model.digest()]
    assert open_onnx(tmp_path / "m", check=True).self_test == {"number": 1}


def test_progress_and_report(tmp_path: Path) -> None:
    model = with_clusters(tiny_llama())
    calls: list[tuple[str, int, int]] = []
    report = write_onnx(model, tmp_path / "m", build_graph(model), on_progress=lambda *call: calls.append(call))
    assert calls[-1] == ("writing", report.payload_bytes, report.payload_bytes)
    assert [done for _, done, _ in calls] == sorted(done for _, done, _ in calls)
    files = [path for path in (tmp_path / "m").rglob("*") if path.is_file()]
    assert report.file_bytes == sum(path.stat().st_size for path in files)


def test_an_output_that_exists(tmp_path: Path) -> None:
    model = with_clusters(tiny_llama())
    folder = with_graph(model, tmp_path / "m")
    before = (folder / SUBFOLDER / MODEL_FILE).read_bytes()
    with pytest.raises(OutputExistsError):
        with_graph(model, folder)
    with_graph(model, folder, force=True)
    assert (folder / SUBFOLDER / MODEL_FILE).read_bytes() == before
    (folder / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputExistsError):
        with_graph(model, folder, force=True)


def refused(model: Model, graph: Graph, folder: Path) -> list[str]:
    with pytest.raises(InvalidRequestError) as caught:
        write_onnx(model, folder / "m", graph)
    assert list(folder.iterdir()) == [], "nothing is left behind"
    return [problem.kind for problem in caught.value.problems]


@pytest.mark.parametrize("name", ["config.json", "Config.JSON", "onnx", "more.safetensors"])
def test_side_files_called_like_ours(tmp_path: Path, name: str) -> None:
    model = replace(tiny_llama(), files={name: side_file("x")})
    assert refused(model, build_graph(model), tmp_path) == ["bad_name"]


def test_a_tensor_called_like_a_value_of_the_graph(tmp_path: Path) -> None:
    model = tiny_llama()
    tensors = {**model.tensors, "logits": DenseTensor("logits", Array.of(np.ones(1, np.float32)))}
    graph = build_graph(model)
    assert refused(replace(model, tensors=tensors), graph, tmp_path) == ["name_collision"]


def test_a_graph_of_another_model(tmp_path: Path) -> None:
    model = tiny_llama()
    tensors = {name: tensor for name, tensor in model.tensors.items() if name != "model.norm.weight"}
    assert refused(replace(model, tensors=tensors), build_graph(model), tmp_path) == ["missing_tensor"]


def test_a_code_past_its_codebook(tmp_path: Path) -> None:
    model = with_clusters(tiny_llama())
    name, weight = next(iter(model.clustered.items()))
    codes = weight.stages[0].codes.read().copy()
    codes.flat[3] = weight.stages[0].codebook.num_clusters
    stage = replace(weight.stages[0], codes=Array.of(codes))
    bad: ClusteredWeight = replace(weight, stages=(stage, *weight.stages[1:]))
    faulty = replace(model, tensors={**model.tensors, name: bad})
    assert refused(faulty, build_graph(faulty), tmp_path) == ["code_out_of_range"]


def test_a_graph_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluscomp_formats.onnx.writer.MAX_MODEL_BYTES", 1000)
    model = tiny_llama()
    assert refused(model, build_graph(model), tmp_path) == ["model_too_long"]


def test_nodes_are_named_apart() -> None:
    graph = build_graph(with_clusters(tiny_llama()))
    outputs = [name for node in graph.nodes for name in node.output]
    assert len(set(outputs)) == len(outputs)
    names = [node.name for node in graph.nodes]
    assert len(set(names)) == len(names)
