"""`from_pretrained` loads a model that computes with the decoded weights, and `save_pretrained` writes the same folder."""

from __future__ import annotations

import copy
import json
import logging
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import hf_models
import numpy as np
import pytest
import torch
import transformers
from hf_models import (
    MODELS,
    SAFETY,
    VOCABULARY,
    clustered_model,
    expected_and_tolerance,
    ids,
    linear_names,
    outputs,
    random_weight,
    weights_of,
    with_decoded_weights,
    written,
)

from cluscomp_formats.errors import InvalidFileError, InvalidRequestError, UnsupportedError
from cluscomp_formats.hf import open_hf, write_hf
from cluscomp_formats.ir import DenseTensor
from cluscomp_kernels import clus_linear
from cluscomp_runtime.hf.modules import ClusteredEmbedding, ClusteredLinear, ClusteredModule, transposed
from cluscomp_runtime.language_model import LanguageModel


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("device_map", [None, "auto", "cpu"])
def test_outputs_are_those_of_the_decoded_weights(name: str, device_map: str | None, tmp_path: Path) -> None:
    original, weights, _ = written(name, tmp_path / "m")
    expected, tolerance = expected_and_tolerance(original, weights)
    model, info = MODELS[name][1].from_pretrained(tmp_path / "m", device_map=device_map, output_loading_info=True)
    assert not any(info.values()), info
    assert model.dtype == torch.float32
    found = outputs(model, ids())
    assert (found - expected).abs().max().item() <= tolerance
    modules = [module for module in model.modules() if isinstance(module, ClusteredModule)]
    # One more if the head is tied.
    assert len(modules) in (len(weights), len(weights) + 1)
    assert {module.kernel for module in modules} <= {"native", "embedding_bag"}


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_logits_are_those_of_the_runtime(name: str, tmp_path: Path) -> None:
    original, weights, stored = written(name, tmp_path / "m")
    _, tolerance = expected_and_tolerance(original, weights)
    model = MODELS[name][1].from_pretrained(tmp_path / "m")
    ours = LanguageModel.from_model(stored, dtype=torch.float32, kernel=clus_linear.choose_path("cpu")).forward(ids())
    assert (outputs(model, ids()) - ours).abs().max().item() <= tolerance


def test_a_tied_head_is_the_embedding(tmp_path: Path) -> None:
    written("qwen3", tmp_path / "m")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(embedding, ClusteredEmbedding)
    assert isinstance(head, ClusteredLinear)
    assert head.matrix() is embedding.matrix()
    assert head.weight.shape == (VOCABULARY, 32)
    # After a move as well.
    model.to(torch.bfloat16)
    assert head.matrix() is embedding.matrix()


def test_a_dense_tied_head_stays_tied(tmp_path: Path) -> None:
    original = hf_models.qwen3()
    weights = weights_of("qwen3", original)[:-1]
    write_hf(clustered_model(original, weights), tmp_path / "m")
    expected, tolerance = expected_and_tolerance(original, weights)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert (outputs(model, ids()) - expected).abs().max().item() <= tolerance


def test_a_head_of_its_own_wins_over_the_tie(tmp_path: Path) -> None:
    original = hf_models.llama(tie_word_embeddings=False)
    head = random_weight("lm_head.weight", (VOCABULARY, 32))
    embedding = random_weight("model.embed_tokens.weight", (VOCABULARY, 32))
    for weights in ([head], [embedding], [head, embedding]):
        stored = clustered_model(original, weights)
        write_hf(replace(stored, config={**stored.config, "tie_word_embeddings": True}), tmp_path / "m", force=True)
        expected, tolerance = expected_and_tolerance(copy.deepcopy(original), weights)
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m")
        assert (outputs(model, ids()) - expected).abs().max().item() <= tolerance


def test_generation_and_copies(tmp_path: Path) -> None:
    original, weights, _ = written("llama", tmp_path / "m")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    other = copy.deepcopy(model)
    assert torch.equal(outputs(model, ids()), outputs(other, ids()))
    mask = torch.ones_like(ids()[:1])
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    oracle = with_decoded_weights(original, weights, torch.float32)
    assert torch.equal(model.generate(ids()[:1], **options), oracle.generate(ids()[:1], **options))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_to_another_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    original, weights, _ = written("llama", tmp_path / "m")
    exact = outputs(with_decoded_weights(original, weights, torch.float64), ids())
    rounded = outputs(with_decoded_weights(original, weights, dtype), ids())
    error = max((rounded - exact).abs().max().item(), torch.finfo(dtype).eps * exact.abs().max().item())
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=dtype)
    moved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m").to(dtype)
    for model in (loaded, moved):
        assert model.dtype == dtype
        found = outputs(model, ids())
        assert found.dtype == dtype
        assert (found.double() - exact).abs().max().item() <= SAFETY * error


def test_conv1d_with_groups_along_the_other_axis_is_decoded_and_says_so(tmp_path: Path) -> None:
    original = hf_models.gpt2()
    weights = [random_weight(key, tuple(original.get_parameter(key).shape), "out") for key in linear_names(original)]
    write_hf(clustered_model(original, weights), tmp_path / "m")
    expected, tolerance = expected_and_tolerance(original, weights)
    with pytest.warns(UserWarning, match="8 clustered matrices .* no kernel"):
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert (outputs(model, ids()) - expected).abs().max().item() <= tolerance


@pytest.mark.parametrize("axis", ["out", "in"])
def test_transposing_transposes(axis: Any) -> None:
    weight = random_weight("w", (10, 7), axis, stages=2, extras=True)
    # Row and column scales are exchanged, and so is the order of two products.
    assert np.allclose(transposed(weight).decode(), weight.decode().T, rtol=1e-6, atol=0)
    again = transposed(transposed(weight))
    assert np.array_equal(again.decode(), weight.decode())


def test_a_base_model_leaves_the_head_out(tmp_path: Path) -> None:
    original = hf_models.llama(tie_word_embeddings=False)
    weights = [*weights_of("llama", original), random_weight("lm_head.weight", (VOCABULARY, 32))]
    write_hf(clustered_model(original, weights), tmp_path / "m")
    expected, tolerance = expected_and_tolerance(original.model, [])
    with pytest.warns(UserWarning, match="lm_head.weight, .* have no place in LlamaModel"):
        model = transformers.AutoModel.from_pretrained(tmp_path / "m")
    with_decoded_weights(original, weights)
    expected = outputs(original.model, ids())
    assert (outputs(model, ids()) - expected).abs().max().item() <= max(tolerance, 1e-5)


def test_modules_of_unknown_classes_get_decoded_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class ScaledEmbedding(torch.nn.Embedding):
        def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 - the name in torch
            return super().forward(input) * 3

    original, weights, _ = written("llama", tmp_path / "m")
    expected, _ = expected_and_tolerance(original, weights)
    build = transformers.LlamaModel.__init__

    def with_scaled_embedding(self: Any, config: Any) -> None:
        build(self, config)
        self.embed_tokens = ScaledEmbedding(config.vocab_size, config.hidden_size)

    monkeypatch.setattr(transformers.LlamaModel, "__init__", with_scaled_embedding)
    with pytest.warns(UserWarning, match="model.embed_tokens.weight, .* decoded to dense"):
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, ScaledEmbedding)
    assert torch.equal(embedding.weight, torch.from_numpy(weights[-1].decode()))
    assert not torch.allclose(outputs(model, ids()).double(), expected)


def test_weights_without_a_place_are_refused(tmp_path: Path) -> None:
    original = hf_models.llama()
    stored = clustered_model(original, [])
    stray = random_weight("model.layers.0.mlp.experts.0.w1.weight", (8, 8))
    write_hf(replace(stored, tensors={**stored.tensors, stray.name: stray}), tmp_path / "m")
    with pytest.raises(UnsupportedError) as caught:
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert [(problem.kind, problem.tensor) for problem in caught.value.problems] == [("no_module", stray.name)]


def test_other_shapes_are_refused(tmp_path: Path) -> None:
    _, _, stored = written("llama", tmp_path / "m")
    write_hf(replace(stored, config={**stored.config, "intermediate_size": 52}), tmp_path / "n")
    with pytest.raises(InvalidFileError) as caught:
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "n")
    assert {problem.kind for problem in caught.value.problems} == {"wrong_shape"}
    assert len(caught.value.problems) == 6


def test_damaged_codes_are_refused(tmp_path: Path) -> None:
    written("llama", tmp_path / "m")
    path = tmp_path / "m" / "model.safetensors"
    data = bytearray(path.read_bytes())
    length = int.from_bytes(data[:8], "little")
    begin = 8 + length + json.loads(data[8 : 8 + length])["model.layers.0.mlp.up_proj.codes"]["data_offsets"][0]
    data[begin] = 0xFF
    path.write_bytes(data)
    with pytest.raises(InvalidFileError) as caught:
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert caught.value.problems[0].kind == "code_out_of_range"


def test_weights_alone_are_enough(tmp_path: Path) -> None:
    """Make a folder as transformers downloads it from a hub: configuration and weights, without our record."""
    _, _, stored = written("llama", tmp_path / "m")
    (tmp_path / "m" / "cluscomp.json").unlink()
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    model.save_pretrained(tmp_path / "n")
    assert open_hf(tmp_path / "n", check=True).digest() == stored.digest()


def test_loading_reports_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    written("llama", tmp_path / "m")
    transformers.logging.enable_propagation()
    try:
        with caplog.at_level(logging.WARNING):
            transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    finally:
        transformers.logging.disable_propagation()
    assert caplog.records == []


def test_a_state_dict_is_not_enough(tmp_path: Path) -> None:
    written("llama", tmp_path / "m")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "m")
    with pytest.raises(InvalidRequestError, match="from its folder"):
        transformers.LlamaForCausalLM.from_pretrained(None, config=config, state_dict={})


def test_the_runtime_itself_does_not_import_transformers() -> None:
    code = "import sys, cluscomp_runtime, cluscomp_formats.hf; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})


def test_dense_tensors_of_the_ir_are_loaded_bit_for_bit(tmp_path: Path) -> None:
    _, _, stored = written("bert", tmp_path / "m")
    model = transformers.AutoModel.from_pretrained(tmp_path / "m")
    dense = {name: tensor for name, tensor in stored.tensors.items() if isinstance(tensor, DenseTensor)}
    found = model.state_dict()
    assert dense
    assert all(np.array_equal(found[name].numpy(), tensor.decode()) for name, tensor in dense.items())
