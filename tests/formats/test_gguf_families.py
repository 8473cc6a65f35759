"""GGUF files of Gemma 3 and Qwen3-MoE: names, norms stored plus one, stacked experts, and what llama.cpp cannot express."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf_families import CONFIGS, random_model
from gguf_surgery import rewrite
from model_strategies import assert_same
from runtime_models import clustered_model
from transformers import AutoConfig, AutoModelForCausalLM

from cluscomp_export.sources import open_source
from cluscomp_formats.errors import ClusCompError, UnsupportedError
from cluscomp_formats.gguf import open_gguf, write_dense_gguf, write_gguf
from cluscomp_formats.gguf.hyperparameters import ARCHITECTURES
from cluscomp_runtime import LanguageModel

ARCHITECTURE = {"gemma3_text": "gemma3", "qwen3_moe": "qwen3moe"}
GEMMA3, QWEN3MOE = CONFIGS["gemma3"], CONFIGS["qwen3moe"]


def tensors_of(path: Path) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def keys_of(path: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


@pytest.mark.parametrize("name", CONFIGS)
def test_native_files_round_trip(name: str, tmp_path: Path) -> None:
    config = CONFIGS[name]
    model = clustered_model(config, stages=2, row_scale=True)
    write_gguf(model, tmp_path / "m.gguf")
    assert_same(open_gguf(tmp_path / "m.gguf", check=True), model)
    keys = keys_of(tmp_path / "m.gguf")
    architecture = ARCHITECTURE[config["model_type"]]
    assert keys["cluscomp.base_architecture"] == architecture
    assert keys[f"{architecture}.attention.key_length"] == 32
    assert not [stored for stored in tensors_of(tmp_path / "m.gguf") if stored.startswith(("cluscomp.", "model.", "lm_head"))]


def test_native_files_name_each_expert(tmp_path: Path) -> None:
    write_gguf(clustered_model(QWEN3MOE, stages=2), tmp_path / "m.gguf")
    stored = {stored for stored in tensors_of(tmp_path / "m.gguf") if stored.startswith("blk.1.ffn_")}
    parts = ("codebook", "codebook.1", "codes", "codes.1")
    experts = {f"blk.1.ffn_{name}.{number}.{part}" for name in ("gate", "up", "down") for number in range(6) for part in parts}
    assert stored == experts | {"blk.1.ffn_norm.weight", "blk.1.ffn_gate_inp.weight"}


@pytest.mark.parametrize("name", CONFIGS)
def test_dense_names_are_those_of_gguf_py(name: str, tmp_path: Path) -> None:
    write_dense_gguf(random_model(CONFIGS[name]), tmp_path / "m.gguf")
    number = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}[ARCHITECTURE[CONFIGS[name]["model_type"]]]
    known = {gguf.TENSOR_NAMES[tensor].replace("{bid}", "#") for tensor in gguf.MODEL_TENSORS[number]}
    found = {re.sub(r"blk\.\d+", "blk.#", stored).removesuffix(".weight") for stored in tensors_of(tmp_path / "m.gguf")}
    assert found == known - (
        {"output"} if CONFIGS[name].get("tie_word_embeddings", number == gguf.MODEL_ARCH.GEMMA3) else set()
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_transformers_computes_the_same_from_a_float32_file(name: str, tmp_path: Path) -> None:
    model = random_model(CONFIGS[name])
    write_dense_gguf(model, tmp_path / "m.gguf", gguf_type="f32")
    # transformers' reader of GGUF metadata does not know all keys of these architectures.
    config = AutoConfig.for_model(**CONFIGS[name])
    peer = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", config=config, dtype=torch.float32)
    ids = torch.arange(60).reshape(1, 60) * 7
    with torch.no_grad():
        expected = peer.eval()(ids).logits
    found = LanguageModel.from_model(model).forward(ids)
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize("gguf_type", ["f32", "f16", "q8_0"])
@pytest.mark.parametrize("name", CONFIGS)
def test_our_own_source_reads_it_back(name: str, gguf_type: str, tmp_path: Path) -> None:
    model = random_model(CONFIGS[name])
    report = write_dense_gguf(model, tmp_path / "m.gguf", gguf_type=gguf_type)
    assert report.kept_at_f16 == ()
    found = open_source(tmp_path / "m.gguf")
    assert found.tensors.keys() == model.tensors.keys()
    kind = gguf.GGMLQuantizationType[gguf_type.upper()]
    for each, tensor in model.tensors.items():
        values = tensor.decode()
        if values.ndim > 1 and not each.endswith("mlp.gate.weight"):
            values = gguf.quants.dequantize(gguf.quants.quantize(values, kind), kind)
            np.testing.assert_array_equal(found.tensors[each].decode(), values, err_msg=each)
        else:
            # The sum of a norm of Gemma 3 and 1 is rounded to float32.
            np.testing.assert_allclose(found.tensors[each].decode(), values, rtol=0, atol=1.3e-7, err_msg=each)


@pytest.mark.parametrize("name", CONFIGS)
def test_what_our_own_source_reads_means_the_same_and_makes_the_same_keys(name: str, tmp_path: Path) -> None:
    model = random_model(CONFIGS[name])
    write_dense_gguf(model, tmp_path / "m.gguf", gguf_type="f32")
    found = open_source(tmp_path / "m.gguf")
    ids = torch.arange(60).reshape(1, 60) * 7
    logits = [LanguageModel.from_model(each).forward(ids) for each in (found, model)]
    assert (logits[0] - logits[1]).abs().max() < 1e-4
    write_dense_gguf(found, tmp_path / "again.gguf", gguf_type="f32")
    assert keys_of(tmp_path / "again.gguf") == keys_of(tmp_path / "m.gguf")


def test_norms_of_gemma3_are_stored_plus_one(tmp_path: Path) -> None:
    model = random_model(GEMMA3)
    write_dense_gguf(model, tmp_path / "m.gguf")
    stored = tensors_of(tmp_path / "m.gguf")
    for each, name in (("norm", "output_norm"), ("layers.0.post_feedforward_layernorm", "blk.0.post_ffw_norm")):
        expected = model.tensors[f"model.{each}.weight"].decode() + np.float32(1)
        np.testing.assert_array_equal(stored[f"{name}.weight"].data, expected)


def test_experts_are_stacked_and_the_router_is_float32(tmp_path: Path) -> None:
    model = random_model(QWEN3MOE)
    write_dense_gguf(model, tmp_path / "m.gguf", gguf_type="q8_0")
    stored, kind = tensors_of(tmp_path / "m.gguf"), gguf.GGMLQuantizationType.Q8_0
    stack = np.stack([model.tensors[f"model.layers.1.mlp.experts.{each}.down_proj.weight"].decode() for each in range(6)])
    assert stored["blk.1.ffn_down_exps.weight"].tensor_type == kind
    np.testing.assert_array_equal(stored["blk.1.ffn_down_exps.weight"].data, gguf.quants.quantize(stack, kind))
    np.testing.assert_array_equal(
        stored["blk.1.ffn_gate_inp.weight"].data, model.tensors["model.layers.1.mlp.gate.weight"].decode()
    )


def test_experts_that_are_no_whole_blocks_stay_at_half_precision_and_are_named(tmp_path: Path) -> None:
    report = write_dense_gguf(random_model({**QWEN3MOE, "moe_intermediate_size": 20}), tmp_path / "m.gguf", gguf_type="q8_0")
    expected = [f"model.layers.{layer}.mlp.experts.{each}.down_proj.weight" for layer in range(2) for each in range(6)]
    assert list(report.kept_at_f16) == expected


@pytest.mark.parametrize(
    ("config", "field"),
    [
        ({**GEMMA3, "sliding_window_pattern": 2}, "layer_types"),
        ({**GEMMA3, "query_pre_attn_scalar": 20}, "query_pre_attn_scalar"),
        ({**GEMMA3, "hidden_activation": "silu"}, "hidden_activation"),
        ({**GEMMA3, "attention_bias": True}, "attention_bias"),
        ({**GEMMA3, "final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        (
            {
                **GEMMA3,
                "rope_parameters": {
                    "full_attention": {"rope_type": "default"},
                    "sliding_attention": {"rope_type": "linear", "factor": 2.0},
                },
            },
            "rope_parameters.sliding_attention",
        ),
        ({**QWEN3MOE, "norm_topk_prob": False}, "norm_topk_prob"),
        ({**QWEN3MOE, "mlp_only_layers": [0]}, "some layers have no experts"),
        ({**QWEN3MOE, "attention_bias": True}, "attention_bias"),
        ({**QWEN3MOE, "hidden_act": "gelu"}, "hidden_act"),
    ],
)
def test_what_llama_cpp_does_otherwise_is_refused(config: dict[str, Any], field: str, tmp_path: Path) -> None:
    model = random_model(QWEN3MOE if config["model_type"] == "qwen3_moe" else GEMMA3)
    with pytest.raises(UnsupportedError, match=re.escape(field)) as caught:
        write_dense_gguf(replace(model, config=config), tmp_path / "m.gguf")
    assert [problem.kind for problem in caught.value.problems] == ["unsupported_config"]
    assert list(tmp_path.iterdir()) == []


def test_of_62_layers_gemma3_scales_attention_as_the_model_of_27b(tmp_path: Path) -> None:
    config = {**GEMMA3, "num_hidden_layers": 62, "query_pre_attn_scalar": 16, "hidden_size": 64}
    write_dense_gguf(random_model(config), tmp_path / "m.gguf")
    assert open_source(tmp_path / "m.gguf").config["query_pre_attn_scalar"] == 16


@pytest.mark.parametrize(
    ("name", "key"), [("gemma3", "attention.sliding_window"), ("qwen3moe", "expert_count"), ("qwen3moe", "expert_used_count")]
)
def test_keys_that_are_needed_are_named(name: str, key: str, tmp_path: Path) -> None:
    write_dense_gguf(random_model(CONFIGS[name]), tmp_path / "m.gguf")
    path = rewrite(tmp_path / "m.gguf", tmp_path / "r.gguf", {f"{name}.{key}": 0}, architecture=name, alignment=32)
    with pytest.raises(ClusCompError, match=re.escape(f"{name}.{key}")):
        open_source(path)


def test_every_family_has_a_gguf_architecture() -> None:
    assert {"llama", "qwen2", "qwen3", *ARCHITECTURE.values()} == set(ARCHITECTURES)
