"""The graphs of the Llama family in onnxruntime, against our runtime, which is held against transformers elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx_graphs import check_strictly
from runtime_models import ORACLES, clustered_model, oracle, small_config

from cluscomp_export.conversion.convert import ConversionOptions, convert
from cluscomp_export.inspection.judging_outputs import chosen_sequences
from cluscomp_export.inspection.onnxruntime import OnnxSession
from cluscomp_export.inspection.verify import verify
from cluscomp_export.onnx_graph import build_graph
from cluscomp_formats.errors import UnsupportedError
from cluscomp_formats.ir import Model
from cluscomp_formats.onnx import open_onnx
from cluscomp_formats.onnx.spec import MODEL_FILE, SUBFOLDER
from cluscomp_formats.onnx.writer import write_onnx
from cluscomp_runtime import LanguageModel, load

EPSILON = torch.finfo(torch.float32).eps

FEATURES: dict[str, dict[str, object]] = {
    "plain": {},
    "stages": {"stages": 3},
    "scales": {"row_scale": True, "column_scale": True},
    "outliers": {"outliers": 7},
    "padding": {"cluster_dim": 7},
    "in axis": {"group_axis": "in", "cluster_dim": 5},
    "everything": {"stages": 2, "row_scale": True, "column_scale": True, "outliers": 5, "group_axis": "in", "cluster_dim": 3},
}


def written(model: Model, folder: Path) -> Path:
    write_onnx(model, folder, build_graph(model))
    check_strictly(folder, folder.parent / "inferred.onnx")
    return folder


def token_ids(batch: int, tokens: int) -> torch.Tensor:
    return torch.randint(0, 97, (batch, tokens), generator=torch.Generator().manual_seed(3))


def assert_same_logits(model: Model, folder: Path, *, compact: bool = False) -> None:
    """In one pass, and through the cache.

    float32 may differ by 8 times what our own float32 was seen to differ from float64, or one rounding of the result if that
    is more: the rule of the self-test.
    """
    ids = token_ids(2, 40)
    double = LanguageModel.from_model(model, dtype="float64").forward(ids)
    single = LanguageModel.from_model(model, kernel="reference").forward(ids)
    tolerance = 8 * max((single.double() - double).abs().max().item(), double.abs().max().item() * EPSILON)
    assert tolerance < 2e-4 * double.abs().max().item(), "a tolerance this wide would prove nothing"
    session = OnnxSession(folder, compact=compact, threads=1)
    assert np.abs(session.forward(ids.numpy()) - double.numpy()).max() <= tolerance
    cached = session.forward_cached(ids[0, :14].tolist(), 5)
    assert np.abs(cached - double[0, :14].numpy()).max() <= tolerance


@pytest.mark.parametrize("name", [name for name in ORACLES if "moe" not in name])
def test_every_architecture(name: str, tmp_path: Path) -> None:
    _, model = oracle(name)
    assert_same_logits(model, written(model, tmp_path / "model"))


def test_experts_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="mixture of experts"):
        build_graph(oracle("qwen3-moe")[1])


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("features", FEATURES)
def test_every_form_of_weight(features: str, tmp_path: Path, *, compact: bool) -> None:
    model = clustered_model(small_config(tie_word_embeddings=True), **FEATURES[features])
    assert_same_logits(model, written(model, tmp_path / "model"), compact=compact)


def test_padding_on_the_left_changes_nothing(tmp_path: Path) -> None:
    """As in transformers: positions count from the first real token, padded places are masked."""
    model = clustered_model(small_config())
    session = OnnxSession(written(model, tmp_path / "model"), threads=1)
    ids = token_ids(1, 9).numpy()
    expected = session.step(ids)[0]
    feeds = {name: np.zeros((1, shape[1], 0, shape[3]), np.float32) for name, shape in session._cache_shapes.items()}
    feeds["input_ids"] = np.concatenate((np.zeros((1, 4), np.int64), ids), axis=1)
    feeds["attention_mask"] = np.array([[0] * 4 + [1] * 9])
    feeds["position_ids"] = np.array([[1] * 4 + list(range(9))])
    found = session.session.run(["logits"], feeds)[0]
    assert np.isfinite(found).all()
    assert np.abs(found[:, 4:] - expected).max() <= 8 * EPSILON * np.abs(expected).max()


def test_far_positions_keep_their_angles(tmp_path: Path) -> None:
    """An angle taken in float32 would be off by up to position * eps / 2, 0.004 radians at a position of 65536."""
    model = clustered_model(small_config(max_position_embeddings=131072))
    session = OnnxSession(written(model, tmp_path / "model"), threads=1)
    ids = token_ids(1, 6).numpy()
    feeds = {name: np.zeros((1, shape[1], 0, shape[3]), np.float32) for name, shape in session._cache_shapes.items()}
    feeds |= {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    near = session.session.run(["logits"], {**feeds, "position_ids": np.arange(6)[None]})[0]
    far = session.session.run(["logits"], {**feeds, "position_ids": 100_000 + np.arange(6)[None]})[0]
    # Rotary attention depends on differences of positions only.
    assert np.abs(near - far).max() <= 64 * EPSILON * np.abs(near).max()


def test_names_and_shapes_are_those_of_optimum(tmp_path: Path) -> None:
    folder = written(clustered_model(small_config()), tmp_path / "model")
    graph = onnx.load(folder / SUBFOLDER / MODEL_FILE, load_external_data=False).graph

    def shapes(values: object) -> dict[str, list[object]]:
        return {
            value.name: [length.dim_param or length.dim_value for length in value.type.tensor_type.shape.dim]
            for value in values  # type: ignore[attr-defined]
        }

    inputs, outputs = shapes(graph.input), shapes(graph.output)
    ids = ["batch_size", "sequence_length"]
    assert inputs["input_ids"] == inputs["position_ids"] == ids
    assert inputs["attention_mask"] == ["batch_size", "total_sequence_length"]
    assert outputs["logits"] == [*ids, 97]
    for layer in range(3):
        for part in ("key", "value"):
            # transformers.js makes the empty cache from these: `batch_size` by name, heads and width as numbers.
            assert inputs[f"past_key_values.{layer}.{part}"] == ["batch_size", 2, "past_sequence_length", 8]
            assert outputs[f"present.{layer}.{part}"] == ["batch_size", 2, "total_sequence_length", 8]
    assert len(inputs) == 9
    assert len(outputs) == 7


def test_a_converted_model_speaks_the_same_tokens(stories_folder: Path, tmp_path: Path) -> None:
    convert(stories_folder, tmp_path / "onnx", ConversionOptions(bits=4, embedding_bits=6, to="onnx"))
    ours = load(tmp_path / "onnx", selftest=True)
    assert ours.tokenizer is not None
    prompt = ours.tokenizer.encode("Once upon a time")
    expected = list(ours.generate(prompt, max_new_tokens=40).token_ids)
    for compact in (False, True):
        assert OnnxSession(tmp_path / "onnx", compact=compact).greedy(prompt, 40) == expected


def test_verify_runs_onnxruntime(stories_folder: Path, tmp_path: Path) -> None:
    convert(stories_folder, tmp_path / "onnx", ConversionOptions(bits=4, to="onnx"))
    result = verify(stories_folder, tmp_path / "onnx")
    assert (result.verdict, result.exit_code) == ("derived", 0)
    assert result.self_tests[f"{tmp_path / 'onnx'} in onnxruntime"]["passed"] is True


def test_verify_finds_a_graph_that_computes_something_else(stories_folder: Path, tmp_path: Path) -> None:
    """The reader takes the file: its weights are those of the digest. Only running it tells."""
    convert(stories_folder, tmp_path / "onnx", ConversionOptions(bits=4, to="onnx"))
    file = tmp_path / "onnx" / SUBFOLDER / MODEL_FILE
    proto = onnx.load(file, load_external_data=False)
    softmax = next(node for node in proto.graph.node if node.op_type == "Softmax")
    softmax.op_type = "LogSoftmax"
    file.write_bytes(proto.SerializeToString())
    result = verify(stories_folder, tmp_path / "onnx")
    assert (result.verdict, result.exit_code) == ("different", 1)
    assert result.self_tests[str(tmp_path / "onnx")]["passed"] is True
    assert result.self_tests[f"{tmp_path / 'onnx'} in onnxruntime"]["passed"] is False


def other_on_a_token_that_is_not_recorded(proto: onnx.ModelProto, model: Model) -> None:
    recorded = {token for sequence in (model.self_test or {})["sequences"] for token in sequence["input_ids"]}
    seen = {token for sequence in chosen_sequences(LanguageModel.from_model(model)) for token in sequence}
    token = min(seen - recorded)
    for node in proto.graph.node:
        node.input[:] = ["ids" if name == "input_ids" else name for name in node.input]
    nodes = [
        onnx.helper.make_node("Constant", [], ["odd"], value_int=token),
        onnx.helper.make_node("Constant", [], ["even"], value_int=min(recorded)),
        onnx.helper.make_node("Equal", ["input_ids", "odd"], ["is_odd"]),
        onnx.helper.make_node("Where", ["is_odd", "even", "input_ids"], ["ids"]),
    ]
    for node in reversed(nodes):
        proto.graph.node.insert(0, node)


def not_runnable(proto: onnx.ModelProto, model: Model) -> None:
    softmax = next(node for node in proto.graph.node if node.op_type == "Softmax")
    next(attribute for attribute in softmax.attribute if attribute.name == "axis").i = 99


@pytest.mark.parametrize("forge", [other_on_a_token_that_is_not_recorded, not_runnable])
def test_verify_finds_a_graph_that_only_keeps_to_its_record(
    forge: Callable[[onnx.ModelProto, Model], None], stories_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "onnx"
    convert(stories_folder, folder, ConversionOptions(bits=4, effort="fast", to="onnx"))
    file = folder / SUBFOLDER / MODEL_FILE
    proto = onnx.load(file, load_external_data=False)
    forge(proto, open_onnx(folder))
    file.write_bytes(proto.SerializeToString())
    result = verify(stories_folder, folder)
    assert (result.verdict, result.exit_code) == ("different", 1)
    assert result.self_tests[f"{folder} in onnxruntime"]["passed"] is False


def test_an_unknown_architecture_is_refused() -> None:
    model = clustered_model(small_config())
    with pytest.raises(UnsupportedError, match="architecture"):
        build_graph(replace(model, config={**model.config, "model_type": "mamba"}))


@pytest.mark.smollm2
def test_smollm2_speaks_the_same_tokens(smollm2_three_blocks: Path, tmp_path: Path) -> None:
    # A few clusters: what is under test is the graph, not the quality.
    options = ConversionOptions(dim=4, clusters=64, share="kind", to="onnx")
    convert(smollm2_three_blocks, tmp_path / "onnx", options)
    ours = load(tmp_path / "onnx")
    assert ours.tokenizer is not None
    prompt = ours.tokenizer.encode("The capital of France is")
    expected = list(ours.generate(prompt, max_new_tokens=12).token_ids)
    assert OnnxSession(tmp_path / "onnx").greedy(prompt, 12) == expected
