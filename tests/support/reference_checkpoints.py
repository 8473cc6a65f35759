"""Checkpoints as the authors' implementation writes them, made by its recipe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, OPTConfig, OPTForCausalLM

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "out_proj", "fc1", "fc2")
SMALL: dict[str, Any] = {"hidden_size": 24, "num_attention_heads": 4, "num_hidden_layers": 1, "vocab_size": 30}


def make_reference(
    folder: Path, model: torch.nn.Module, num_clusters: int, dim: int, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Store a model as the authors' code does, with random codebooks and codes; returns each weight as their forward has it."""
    generator = torch.Generator().manual_seed(num_clusters * 100 + dim)
    state: dict[str, torch.Tensor] = {}
    weights: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        module, _, leaf = name.rpartition(".")
        if leaf != "weight" or module.rsplit(".", 1)[-1] not in LINEARS:
            state[name] = tensor.to(dtype).clone()
            continue
        out_features, in_features = tensor.shape
        padded = -(-out_features // dim) * dim
        cluster = torch.randn(num_clusters, dim, generator=generator).to(dtype)
        index = torch.randint(num_clusters, (in_features * padded // dim,), generator=generator, dtype=torch.int32)
        state[f"{module}.cluster"], state[f"{module}.index"] = cluster, index
        weights[name] = cluster[index].view(in_features, -1)[:, :out_features].T
    folder.mkdir(exist_ok=True)
    save_file(state, folder / "model.safetensors")
    config = {**model.config.to_dict(), "num_clusters": num_clusters, "cluster_dim": dim}
    (folder / "config.json").write_text(json.dumps(config))
    return weights


def llama(**options: Any) -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**{**SMALL, "intermediate_size": 40, "num_key_value_heads": 2, **options}))


def opt() -> OPTForCausalLM:
    return OPTForCausalLM(OPTConfig(**SMALL, ffn_dim=40, word_embed_proj_dim=24))


def mistral() -> MistralForCausalLM:
    # As in Mistral-Nemo the heads together are wider than the model.
    return MistralForCausalLM(MistralConfig(**SMALL, intermediate_size=40, num_key_value_heads=2, head_dim=8))
