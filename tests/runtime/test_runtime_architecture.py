"""Configurations and tensors the decoder refuses, each by name."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import transformers
from runtime_models import SMALL, clustered_model, small_config

from cluscomp_formats.architectures import FAMILIES, check_tensors, describe
from cluscomp_formats.errors import InvalidFileError, UnsupportedError
from cluscomp_formats.ir import Array, DenseTensor, Model
from cluscomp_runtime import LanguageModel


@pytest.mark.parametrize("model_type", ["gpt2", "mixtral", "gemma2", "phi3", None, ["llama"], 3])
def test_an_unknown_architecture_is_refused_with_what_is_known(model_type: object) -> None:
    with pytest.raises(UnsupportedError, match="architecture") as error:
        describe(small_config() | {"model_type": model_type})
    problem = error.value.problems[0]
    assert problem.expected == ", ".join(FAMILIES)
    assert "--to hf" in (problem.remedy or "")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_act", "relu"),
        ("hidden_act", ["silu"]),
        ("partial_rotary_factor", 0.5),
        ("rope_scaling", {"type": "yarn", "factor": 4.0}),
        ("rope_scaling", {"rope_type": "dynamic", "factor": 2.0}),
        ("rope_parameters", {"rope_type": "longrope", "rope_theta": 1e4}),
        ("rope_parameters", {"full_attention": {"rope_type": "default"}}),
        ("num_experts", 8),
        ("num_local_experts", 4),
        ("head_dim", 7),
        ("quantization_config", {"quant_method": "gptq"}),
    ],
)
def test_what_the_decoder_cannot_honour_is_refused_by_field(field: str, value: object) -> None:
    with pytest.raises(UnsupportedError, match=field):
        describe(small_config(**{field: value}))


def test_partial_rotary_inside_rope_parameters_is_refused() -> None:
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    with pytest.raises(UnsupportedError, match="partial_rotary_factor"):
        describe(small_config(rope_parameters=rope))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_size", None),
        ("hidden_size", 0),
        ("hidden_size", "32"),
        ("vocab_size", True),
        ("num_hidden_layers", 10**12),
        ("num_key_value_heads", 3),
        ("rms_norm_eps", 0),
        ("rms_norm_eps", float("nan")),
        ("tie_word_embeddings", "yes"),
        ("rope_theta", -1.0),
        ("rope_scaling", [1]),
        ("rope_scaling", {"type": "linear"}),
        ("rope_scaling", {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0}),
    ],
)
def test_nonsense_is_an_invalid_file(field: str, value: object) -> None:
    config = {key: val for key, val in small_config(**{field: value}).items() if not (key == field and value is None)}
    with pytest.raises(InvalidFileError) as error:
        describe(config)
    assert {problem.file for problem in error.value.problems} == {"config.json"}


def test_all_problems_are_reported_at_once() -> None:
    with pytest.raises(InvalidFileError) as error:
        describe(small_config(hidden_size=-1, vocab_size="x", rms_norm_eps=None, intermediate_size=0))
    text = str(error.value)
    assert all(name in text for name in ("hidden_size", "vocab_size", "intermediate_size"))


@pytest.mark.parametrize("layer_types", [["full_attention"], "full_attention", ["full_attention", "chunked", "full_attention"]])
def test_malformed_layer_types(layer_types: object) -> None:
    config = small_config("qwen2", use_sliding_window=True, sliding_window=4, layer_types=layer_types)
    with pytest.raises((InvalidFileError, UnsupportedError), match="layer_types"):
        describe(config)


@pytest.mark.parametrize(
    ("model_type", "options"),
    [
        ("mistral", {}),
        ("mistral", {"sliding_window": None}),
        ("mistral", {"sliding_window": 9}),
        ("qwen2", {"sliding_window": 9}),
        ("qwen2", {"sliding_window": 9, "use_sliding_window": True, "max_window_layers": 2}),
        ("qwen3", {"use_sliding_window": True, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}),
        ("llama", {"sliding_window": 9}),
    ],
)
def test_windows_are_those_of_transformers(model_type: str, options: dict[str, Any]) -> None:
    config = transformers.AutoConfig.for_model(model_type, **SMALL, **options)
    default = "sliding_attention" if model_type == "mistral" else "full_attention"
    kinds = getattr(config, "layer_types", None) or [default] * 3
    window = getattr(config, "sliding_window", None) if model_type != "llama" else None
    expected = tuple(window if kind == "sliding_attention" else None for kind in kinds)
    blocks = describe(small_config(model_type, **options)).blocks
    assert tuple(attention.window for block in blocks for attention in block.attentions) == expected


@pytest.mark.parametrize(
    "old",
    [
        {"rope_theta": 5e5},
        {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}},
        {
            "rope_theta": 5e5,
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        },
    ],
)
def test_old_and_new_rope_fields_mean_the_same(old: dict[str, Any]) -> None:
    new = transformers.LlamaConfig(**SMALL, **old).to_dict()
    assert "rope_theta" not in new
    assert describe(new).ropes == describe(small_config(**old)).ropes


def test_missing_and_misshapen_tensors_are_all_named() -> None:
    model = clustered_model(small_config())
    tensors = dict(model.tensors)
    del tensors["model.norm.weight"], tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.embed_tokens.weight"] = DenseTensor("model.embed_tokens.weight", Array.of(np.zeros((97, 31), np.float32)))
    name = "model.layers.0.input_layernorm.weight"
    tensors[name] = DenseTensor(name, Array.of(np.zeros(32, np.int64)))
    with pytest.raises(InvalidFileError) as error:
        LanguageModel.from_model(Model(model.config, tensors))
    found = {(problem.kind, problem.tensor) for problem in error.value.problems}
    assert found == {
        ("missing_tensor", "model.norm.weight"),
        ("missing_tensor", "model.layers.1.mlp.up_proj.weight"),
        ("wrong_shape", "model.embed_tokens.weight"),
        ("wrong_dtype", name),
    }


def test_a_tensor_without_use_is_refused() -> None:
    model = clustered_model(small_config())
    bias = "model.layers.0.self_attn.q_proj.bias"
    extra = {bias: DenseTensor(bias, Array.of(np.ones(32, np.float32)))}
    with pytest.raises(UnsupportedError, match=r"q_proj\.bias"):
        LanguageModel.from_model(Model(model.config, {**model.tensors, **extra}))


def test_stored_rotary_frequencies_are_harmless() -> None:
    model = clustered_model(small_config())
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    extra = {name: DenseTensor(name, Array.of(np.ones(4, np.float32)))}
    check_tensors(Model(model.config, {**model.tensors, **extra}), describe(model.config))


@pytest.mark.parametrize(
    ("model_type", "field", "value"),
    [
        ("gemma3_text", "final_logit_softcapping", 30.0),
        ("gemma3_text", "attn_logit_softcapping", 50.0),
        ("gemma3_text", "use_bidirectional_attention", True),
        ("gemma3_text", "hidden_activation", "relu"),
        ("gemma3_text", "layer_types", ["full_attention", "linear_attention", "full_attention"]),
        ("gemma3_text", "rope_parameters", {"full_attention": {"rope_type": "yarn", "factor": 2.0}}),
        ("gemma3_text", "rope_scaling", {"rope_type": "dynamic", "factor": 2.0}),
        ("qwen3_moe", "hidden_act", "relu"),
        ("qwen3_moe", "partial_rotary_factor", 0.5),
    ],
)
def test_what_other_families_cannot_honour_is_refused_by_field(model_type: str, field: str, value: object) -> None:
    with pytest.raises(UnsupportedError, match=field):
        describe(small_config(model_type, **{field: value}))


@pytest.mark.parametrize(
    ("model_type", "field", "value"),
    [
        ("gemma3_text", "query_pre_attn_scalar", 0),
        ("gemma3_text", "sliding_window", None),
        ("gemma3_text", "sliding_window_pattern", 0),
        ("gemma3_text", "rope_local_base_freq", "high"),
        ("gemma3_text", "rope_parameters", {"rope_theta": 1e4, "rope_type": "default"}),
        ("gemma3_text", "rope_scaling", [8.0]),
        ("qwen3_moe", "num_experts", 65536),
        ("qwen3_moe", "num_experts_per_tok", 200),
        ("qwen3_moe", "decoder_sparse_step", 0),
        ("qwen3_moe", "mlp_only_layers", ["0"]),
        ("qwen3_moe", "mlp_only_layers", 1),
        ("qwen3_moe", "norm_topk_prob", 1),
    ],
)
def test_nonsense_of_other_families_is_an_invalid_file(model_type: str, field: str, value: object) -> None:
    with pytest.raises(InvalidFileError, match=field):
        describe(small_config(model_type, **{field: value}))


@pytest.mark.parametrize(
    "old",
    [
        {},
        {"rope_theta": 5e5, "rope_local_base_freq": 2e4},
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
    ],
)
def test_old_and_new_fields_of_gemma_mean_the_same(old: dict[str, Any]) -> None:
    new = transformers.Gemma3TextConfig(**SMALL, **old).to_dict()
    assert "rope_theta" not in new
    assert "layer_types" in new
    assert describe(new).blocks == describe(small_config("gemma3_text", **old, head_dim=256)).blocks
    assert describe(new).ropes == describe(small_config("gemma3_text", **old)).ropes
