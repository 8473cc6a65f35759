"""Graphs of architectures beyond the Llama family compute in onnxruntime what transformers computes."""

from __future__ import annotations

import functools
import importlib.util
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import hf_models
import numpy as np
import numpy.typing as npt
import onnx
import pytest
import torch
import transformers
from hf_models import VOCABULARY, clustered_model, linear_names, random_weight, with_decoded_weights
from onnx_graphs import COMPACT, session

from cluscomp_export.inspection.onnxruntime import OnnxSession
from cluscomp_export.onnx_graph import build_graph, building, tracing
from cluscomp_formats.errors import InvalidFileError, UnsupportedError
from cluscomp_formats.ir import Array, ClusteredWeight, DenseTensor, Model, float32_to_bfloat16
from cluscomp_formats.onnx import open_onnx
from cluscomp_formats.onnx.functions import functions
from cluscomp_formats.onnx.spec import DOMAIN, MODEL_FILE, SUBFOLDER
from cluscomp_formats.onnx.writer import write_onnx

Arrays = dict[str, npt.NDArray[Any]]

SAFETY = 8.0
"""Room for other orders of summation, as in the self-test record."""


@dataclass(frozen=True)
class Case:
    """A transformers model with the decoded weights, float64, and the same as codebook model, in `folder` as ONNX."""

    exact: Any
    single: Any
    stored: Model
    folder: Path

    def expected(self, **inputs: torch.Tensor) -> tuple[torch.Tensor, float]:
        """Output in float64, and what float32 may differ from it, shown by transformers' own float32."""
        with torch.no_grad():
            exact, single = (model(**inputs)[0] for model in (self.exact, self.single))
        error = max((single - exact).abs().max().item(), torch.finfo(torch.float32).eps * exact.abs().max().item())
        assert SAFETY * error < 2e-4 * exact.abs().max().item(), "a tolerance this wide would prove nothing"
        return exact, SAFETY * error


def in_all_forms(name: str, shape: tuple[int, ...], number: int) -> ClusteredWeight:
    """Of any eight in a row each has another mix of axis, number of stages, and scales with outliers."""
    rows, columns = shape
    axis: Any = ("out", "in")[number % 2]
    return random_weight(name, (rows, columns), axis, stages=1 + number // 2 % 2, extras=number // 4 % 2 == 0)


def stored_as(dtype: str, tensor: DenseTensor) -> DenseTensor:
    values = tensor.decode()
    return DenseTensor(
        tensor.name, Array.of(float32_to_bfloat16(values), dtype) if dtype == "bfloat16" else Array.of(values.astype(dtype))
    )


@dataclass(frozen=True)
class Recipe:
    """`clustered` are matrices outside the layers, `dtype` is that of dense tensors, `prefix` is left out of names."""

    make: Callable[[], Any]
    clustered: tuple[str, ...] = ()
    dtype: str = "float32"
    prefix: str = ""


RECIPES = {
    # Conv1D, a tied head, and an embedding that is clustered.
    "gpt2": Recipe(hf_models.gpt2, ("transformer.wte.weight",), "float16"),
    # A head tied to a dense embedding; positions in a class of their own, which get the decoded weight.
    "opt": Recipe(hf_models.opt, ("model.decoder.embed_positions.weight",), "bfloat16", "model."),
    "bert": Recipe(hf_models.bert, ("embeddings.word_embeddings.weight",)),
}


def written(recipe: Recipe, folder: Path) -> Case:
    torch.manual_seed(0)
    model = recipe.make()
    for parameter in model.parameters():
        parameter.data = parameter.data.to(getattr(torch, recipe.dtype)).float()
    names = [*linear_names(model), *recipe.clustered]
    weights = [in_all_forms(name, model.get_parameter(name).shape, number) for number, name in enumerate(names)]
    stored = clustered_model(model, weights)
    tensors = {
        name: stored_as(recipe.dtype, tensor) if isinstance(tensor, DenseTensor) else tensor
        for name, tensor in stored.tensors.items()
    }
    tensors = {
        name.removeprefix(recipe.prefix): replace(tensor, name=name.removeprefix(recipe.prefix))
        for name, tensor in tensors.items()
    }
    stored = replace(stored, tensors=tensors)
    write_onnx(stored, folder, build_graph(stored))
    single = with_decoded_weights(model, weights, torch.float32)
    exact = type(model)(model.config).double().eval()
    exact.load_state_dict({name: values.double() for name, values in single.state_dict().items()})
    return Case(exact, single, stored, folder)


@pytest.fixture(scope="module")
def case_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    """Each model is traced once for all tests."""
    folder = tmp_path_factory.mktemp("traced")
    return functools.cache(lambda name: written(RECIPES[name], folder / name))


def proto_of(case: Case) -> onnx.ModelProto:
    return onnx.load(case.folder / SUBFOLDER / MODEL_FILE, load_external_data=False)


def ids(batch: int, tokens: int) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (batch, tokens), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", RECIPES)
def test_the_file_is_sound_and_the_model_the_same(name: str, case_of: Callable[[str], Case]) -> None:
    case = case_of(name)
    assert open_onnx(case.folder, check=True).digest() == case.stored.digest()
    onnx.checker.check_model(str(case.folder / SUBFOLDER / MODEL_FILE), full_check=True)


@pytest.mark.parametrize("name", RECIPES)
def test_every_clustered_weight_goes_into_our_operators(name: str, case_of: Callable[[str], Case]) -> None:
    case = case_of(name)
    nodes = proto_of(case).graph.node
    used = {node.input[2]: node for node in nodes if node.domain == DOMAIN and node.op_type.startswith("Clus")}
    codes = {
        f"{weight.removesuffix('.weight')}.codes" + (f"_{stage}" if stage else "")
        for weight, tensor in case.stored.clustered.items()
        for stage in range(len(tensor.stages))
    }
    assert used.keys() == codes
    assert {node.domain for node in nodes} == {"", DOMAIN}
    assert {node.op_type for node in nodes if node.domain == DOMAIN} <= functions().keys()
    # Nothing of the machine or the run that traced it.
    assert not any(node.doc_string or node.metadata_props for node in nodes)


@pytest.mark.parametrize("name", RECIPES)
def test_every_array_is_used(name: str, case_of: Callable[[str], Case]) -> None:
    """onnxruntime warns of those that are not."""
    graph = proto_of(case_of(name)).graph
    assert {tensor.name for tensor in graph.initializer} <= {operand for node in graph.node for operand in node.input}


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize(("batch", "tokens"), [(1, 1), (2, 11), (5, 62)])
@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_decoders_compute_the_same(
    name: str, batch: int, tokens: int, case_of: Callable[[str], Case], *, compact: bool
) -> None:
    case = case_of(name)
    expected, tolerance = case.expected(input_ids=ids(batch, tokens))
    runner = OnnxSession(case.folder, compact=compact, threads=1)
    assert np.abs(runner.forward(ids(batch, tokens).numpy()) - expected.numpy()).max() <= tolerance


@pytest.mark.parametrize("first", [1, 7])
@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_token_by_token_is_the_same_as_at_once(name: str, first: int, case_of: Callable[[str], Case]) -> None:
    case = case_of(name)
    expected, tolerance = case.expected(input_ids=ids(1, 12))
    found = OnnxSession(case.folder, threads=1).forward_cached(ids(1, 12)[0].tolist(), first)
    assert np.abs(found - expected[0].numpy()).max() <= tolerance


@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_padding_on_the_left_changes_nothing(name: str, case_of: Callable[[str], Case]) -> None:
    case = case_of(name)
    expected, tolerance = case.expected(input_ids=ids(1, 9))
    runner = OnnxSession(case.folder, threads=1)
    feeds: Arrays = {key: np.zeros((1, shape[1], 0, shape[3]), np.float32) for key, shape in runner._cache_shapes.items()}
    feeds["input_ids"] = np.concatenate((np.zeros((1, 4), np.int64), ids(1, 9).numpy()), axis=1)
    feeds["attention_mask"] = np.array([[0] * 4 + [1] * 9])
    feeds["position_ids"] = np.array([[1] * 4 + list(range(9))])
    found = runner.session.run(["logits"], feeds)[0]
    assert np.isfinite(found).all()
    assert np.abs(found[:, 4:] - expected.numpy()).max() <= tolerance


@pytest.mark.parametrize("config", [{}, COMPACT], ids=["folded", "compact"])
@pytest.mark.parametrize(("batch", "tokens"), [(1, 1), (2, 11), (5, 62)])
def test_encoders_compute_the_same(batch: int, tokens: int, config: dict[str, str], case_of: Callable[[str], Case]) -> None:
    case = case_of("bert")
    mask = torch.ones(batch, tokens, dtype=torch.int64)
    mask[-1, -(tokens // 3) :] = 0 if tokens > 2 else 1
    types = torch.arange(tokens).expand(batch, tokens) // 6 % 2
    inputs = {"input_ids": ids(batch, tokens), "attention_mask": mask, "token_type_ids": types}
    expected, tolerance = case.expected(**inputs)
    runner = session(case.folder, config)
    found, pooled = runner.run(
        ["last_hidden_state", "pooler_output"], {name: values.numpy() for name, values in inputs.items()}
    )
    assert np.abs(found - expected.numpy()).max() <= tolerance
    with torch.no_grad():
        # tanh does not amplify, the matrix before it does by at most its norm.
        gain = torch.linalg.matrix_norm(case.exact.pooler.dense.weight, ord=float("inf")).item()
        difference = np.abs(pooled - case.exact(**inputs).pooler_output.numpy()).max()
    assert difference <= max(gain, 1) * tolerance


def test_names_and_shapes_are_those_of_optimum(case_of: Callable[[str], Case]) -> None:
    def shapes(values: Any) -> dict[str, list[object]]:
        return {
            value.name: [length.dim_param or length.dim_value for length in value.type.tensor_type.shape.dim]
            for value in values
        }

    tokens, mask = ["batch_size", "sequence_length"], ["batch_size", "total_sequence_length"]
    for name in ("gpt2", "opt"):
        graph = proto_of(case_of(name)).graph
        parts = [f"{layer}.{part}" for layer in range(2) for part in ("key", "value")]
        past = {f"past_key_values.{part}": ["batch_size", 4, "past_sequence_length", 8] for part in parts}
        present = {f"present.{part}": ["batch_size", 4, "total_sequence_length", 8] for part in parts}
        assert shapes(graph.input) == {"input_ids": tokens, "attention_mask": mask, "position_ids": tokens, **past}
        assert shapes(graph.output) == {"logits": [*tokens, VOCABULARY], **present}
        assert graph.output[0].name == "logits"
    graph = proto_of(case_of("bert")).graph
    assert shapes(graph.input) == dict.fromkeys(("input_ids", "attention_mask", "token_type_ids"), tokens)
    assert shapes(graph.output) == {"last_hidden_state": [*tokens, 32], "pooler_output": ["batch_size", 32]}


def test_the_same_model_gives_the_same_bytes(case_of: Callable[[str], Case], tmp_path: Path) -> None:
    """Traced anew, after others."""
    case = case_of("gpt2")
    case_of("bert")
    tracing.trace.cache_clear()
    write_onnx(case.stored, tmp_path / "again", build_graph(case.stored))
    for name in (f"{SUBFOLDER}/{MODEL_FILE}", "config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (case.folder / name).read_bytes()


def unread(shape: tuple[int, ...]) -> Array:
    def load() -> npt.NDArray[Any]:
        raise AssertionError("a weight was read")

    return Array(shape, "float16", load)


def test_a_model_of_any_size_is_traced_without_its_weights(capfd: pytest.CaptureFixture[str]) -> None:
    """The embedding alone has 2 TB in float32. Nothing is said on the way."""
    width, vocabulary = 4096, 1 << 27
    config = transformers.GPT2Config(n_embd=width, n_layer=1, n_head=32, vocab_size=vocabulary, bos_token_id=0, eos_token_id=0)
    with torch.device("meta"):
        model = transformers.GPT2LMHeadModel(config)
    shapes = {name: tuple(values.shape) for name, values in model.state_dict().items() if name != "lm_head.weight"}
    tensors = {name: DenseTensor(name, unread(shape)) for name, shape in shapes.items()}
    loggers = {name: logging.getLogger(name).level for name in ("torch", "onnxscript", "transformers")}
    graph = build_graph(Model({**config.to_dict(), "architectures": ["GPT2LMHeadModel"]}, tensors))
    assert graph.outputs[0].name == "logits"
    assert capfd.readouterr() == ("", "")
    assert {name: logging.getLogger(name).level for name in loggers} == loggers


def small(model: Any, **changes: Any) -> Model:
    stored = clustered_model(model, [])
    return replace(stored, config={**stored.config, **changes})


def problem_of(stored: Model) -> Any:
    with pytest.raises((UnsupportedError, InvalidFileError)) as caught:
        build_graph(stored)
    return caught.value.problems[0]


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"model_type": "no-such"}, "no-such"),
        ({"model_type": ["gpt2"]}, "gpt2"),
        ({"architectures": ["NoSuchModel"]}, "NoSuchModel"),
        ({"architectures": ["BertModel"]}, "BertModel"),
        ({"architectures": ["GPT2Config"]}, "GPT2Config"),
        ({"architectures": None}, "None"),
    ],
)
def test_other_architectures_are_refused(changes: dict[str, Any], found: str) -> None:
    problem = problem_of(small(hf_models.gpt2(), **changes))
    assert problem.kind == "unsupported_architecture"
    assert found in problem.found
    # Of what transformers does not know either, there is nothing to say.
    assert (problem.remedy is None) == ("model_type" in changes)


@pytest.mark.parametrize(
    ("changes", "found"),
    [({"activation_function": "no-such"}, "no-such"), ({"is_encoder_decoder": True}, "more than one graph")],
)
def test_configurations_that_cannot_be_traced_are_refused(changes: dict[str, Any], found: str) -> None:
    problem = problem_of(small(hf_models.gpt2(), **changes))
    assert problem.kind == "untraceable"
    assert found in problem.found


def test_a_cache_of_another_kind_is_refused() -> None:
    config = transformers.MambaConfig(hidden_size=16, num_hidden_layers=1, vocab_size=VOCABULARY, state_size=4)
    problem = problem_of(small(transformers.MambaForCausalLM(config)))
    assert (problem.kind, "MambaForCausalLM" in problem.message) == ("untraceable", True)
    assert "other things than keys and values" in problem.found


def test_a_model_that_takes_images_too_is_refused() -> None:
    config = transformers.Gemma3Config(
        text_config={"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": VOCABULARY},
        vision_config={"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
    )
    with torch.device("meta"):
        peer = transformers.Gemma3ForConditionalGeneration(config)
    problem = problem_of(Model({**json.loads(peer.config.to_json_string()), "architectures": [type(peer).__name__]}, {}))
    assert problem.found == "it takes other inputs than text, too: pixel_values"


def test_a_trace_that_holds_for_some_lengths_only_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = transformers.BertModel.forward

    def branching(self: Any, input_ids: torch.Tensor, **inputs: Any) -> Any:
        results = forward(self, input_ids, **inputs)
        if input_ids.shape[1] > 20:
            results["last_hidden_state"] = results["last_hidden_state"] * 2
        return results

    monkeypatch.setattr(transformers.BertModel, "forward", branching)
    tracing.trace.cache_clear()
    problem = problem_of(small(hf_models.bert()))
    assert problem.kind == "untraceable"
    assert "<= 20" in problem.found


def test_tensors_without_a_use_are_refused() -> None:
    stored = small(hf_models.gpt2())
    stray = DenseTensor("transformer.h.0.adapter.weight", unread((4, 4)))
    problem = problem_of(replace(stored, tensors={**stored.tensors, stray.name: stray}))
    assert (problem.kind, problem.tensor) == ("unused_tensor", stray.name)


def test_tensors_of_other_shapes_are_refused() -> None:
    problem = problem_of(small(hf_models.gpt2(), n_inner=40))
    assert (problem.kind, problem.tensor) == ("wrong_shape", "transformer.h.0.mlp.c_fc.weight")


def test_missing_tensors_are_refused(case_of: Callable[[str], Case]) -> None:
    stored = case_of("bert").stored
    names = [f"encoder.layer.1.output.{part}" for part in ("LayerNorm.bias", "dense.weight")]
    with pytest.raises(InvalidFileError) as caught:
        build_graph(replace(stored, tensors={key: tensor for key, tensor in stored.tensors.items() if key not in names}))
    assert [(problem.kind, problem.tensor) for problem in caught.value.problems] == [("missing_tensor", name) for name in names]


@pytest.mark.parametrize("missing", ["transformers", "onnxscript"])
def test_missing_packages_are_named(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(building, "find_spec", lambda name: None if name == missing else find_spec(name))
    problem = problem_of(small(hf_models.gpt2()))
    assert (problem.kind, missing in problem.message) == ("no_tracing", True)
    assert "onnx-trace" in problem.remedy
