"""Which tensors count as decoder linears, embeddings and heads: exact for known families, by heuristics for the others."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PhiConfig,
    PhiForCausalLM,
)

from cluscomp_export.sources import embedding_tensor, head_tensor, kind, linear_tensors
from cluscomp_formats.ir import Array, ClusteredWeight, Codebook, DenseTensor, Model, Stage


def dense(shapes: dict[str, tuple[int, ...]], model_type: str | None = None, dtype: str = "float32") -> Model:
    config = {} if model_type is None else {"model_type": model_type}
    arrays = {name: Array.of(np.zeros(shape, np.dtype(dtype))) for name, shape in shapes.items()}
    return Model(config, {name: DenseTensor(name, array) for name, array in arrays.items()})


def of_transformers(model: torch.nn.Module, model_type: str | None) -> Model:
    return dense({name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}, model_type)


def linears_of(model: torch.nn.Module) -> set[str]:
    """What PyTorch says: the weights of all linears below a numbered layer."""
    modules = {f"{name}.weight": module for name, module in model.named_modules()}
    return {name for name, module in modules.items() if isinstance(module, torch.nn.Linear) and ".0." in name}


TINY = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}


def tiny_opt() -> torch.nn.Module:
    config = OPTConfig(
        vocab_size=32, hidden_size=16, ffn_dim=24, num_hidden_layers=1, num_attention_heads=2, word_embed_proj_dim=8
    )
    return OPTForCausalLM(config)


def test_llama_by_exact_names() -> None:
    block = "model.layers.11"
    linears = [f"{block}.self_attn.{name}_proj.weight" for name in "qkvo"]
    linears += [f"{block}.mlp.{name}_proj.weight" for name in ("gate", "up", "down")]
    others = {f"{block}.self_attn.q_proj.lora_A.weight": (4, 4), f"{block}.mlp.extra_proj.weight": (4, 4)}
    shapes = {"model.embed_tokens.weight": (8, 4), **dict.fromkeys(linears, (4, 4)), **others, "lm_head.weight": (8, 4)}
    for model_type in ("llama", "mistral", "qwen2", "qwen3"):
        model = dense(shapes, model_type)
        assert linear_tensors(model) == linears
        assert (embedding_tensor(model), head_tensor(model)) == ("model.embed_tokens.weight", "lm_head.weight")


def test_opt_leaves_projections_outside_the_blocks_alone() -> None:
    opt = tiny_opt()
    expected = linears_of(opt)
    assert len(expected) == 6
    assert "model.decoder.project_in.weight" in opt.state_dict()
    assert set(linear_tensors(of_transformers(opt, "opt"))) == expected
    assert embedding_tensor(of_transformers(opt, "opt")) == "model.decoder.embed_tokens.weight"


@pytest.mark.parametrize(
    "make",
    [lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**TINY)), lambda: PhiForCausalLM(PhiConfig(**TINY)), tiny_opt],
    ids=["gpt_neox", "phi", "opt"],
)
def test_heuristics_find_what_pytorch_calls_linear(make: object) -> None:
    model = make()  # type: ignore[operator]
    assert set(linear_tensors(of_transformers(model, None))) == linears_of(model)


def test_gpt2_matrices_are_listed_as_they_are_stored() -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_positions=8, n_embd=16, n_layer=1, n_head=2))
    found = linear_tensors(of_transformers(model, "gpt2"))
    assert found == [f"transformer.h.0.{name}.weight" for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")]
    assert embedding_tensor(of_transformers(model, "gpt2")) == "transformer.wte.weight"


def test_routers_of_mixtures_are_left_alone() -> None:
    names = [name for name, _ in MixtralForCausalLM(MixtralConfig(**TINY, num_key_value_heads=2)).named_parameters()]
    assert any("gate" in name for name in names)
    stored = {
        "model.layers.0.block_sparse_moe.gate.weight": (8, 16),
        "model.layers.0.mlp.gate.weight": (8, 16),
        "model.layers.0.block_sparse_moe.experts.7.w1.weight": (24, 16),
    }
    assert linear_tensors(dense(stored, "mixtral")) == ["model.layers.0.block_sparse_moe.experts.7.w1.weight"]


def test_heuristics_skip_what_cannot_be_a_linear() -> None:
    shapes = {
        "encoder.layer.0.attention.self.query.weight": (16, 16),
        "encoder.layer.0.attention.output.LayerNorm.weight": (16,),
        "layers.0.conv.weight": (16, 16, 3),
        "layers.0.gate_vector.weight": (1, 16),
        "layers.0.proj.bias": (16,),
        "layers.0.buffer": (16, 16),
        "layers.0.norm.weight": (16, 16),
        "layers.0.attn.relative_attention_bias.weight": (16, 16),
        "pooler.dense.weight": (16, 16),
        "projection.weight": (16, 16),
    }
    assert linear_tensors(dense(shapes)) == ["encoder.layer.0.attention.self.query.weight"]
    assert linear_tensors(dense({"layers.0.packed.weight": (16, 16)}, dtype="int32")) == []


def test_clustered_weights_count_too() -> None:
    codebook = Codebook("c", Array.of(np.zeros((2, 2), np.float32)))
    stage = Stage(codebook, Array.of(np.zeros((4, 2), np.uint16)))
    weight = ClusteredWeight("h.0.proj.weight", (4, 4), (stage,))
    assert linear_tensors(Model({}, {weight.name: weight})) == ["h.0.proj.weight"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.3.self_attn.q_proj.weight", "model.layers.*.self_attn.q_proj.weight"),
        ("model.layers.17.mlp.0.weight", "model.layers.*.mlp.0.weight"),
        ("model.layers.3.block_sparse_moe.experts.12.w1.weight", "model.layers.*.block_sparse_moe.experts.*.w1.weight"),
        ("0.attn.weight", "*.attn.weight"),
        ("lm_head.weight", "lm_head.weight"),
    ],
)
def test_kind_replaces_the_layer_and_expert_numbers(name: str, expected: str) -> None:
    assert kind(name) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [("lm_head.weight", True), ("embed_out.weight", True), ("output.weight", True), ("h.0.output.weight", False)],
)
def test_heads_by_name(name: str, expected: bool) -> None:
    assert (head_tensor(dense({name: (8, 4)})) is not None) is expected
