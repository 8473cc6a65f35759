"""Writes tiny GGUF files for the tests the way llama.cpp's converter does, with gguf-py and a permutation of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 160,
    "max_position_embeddings": 128,
}

GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def tiny_model(arch: str, **options: Any) -> PreTrainedModel:
    """A random model of a GGUF architecture; biases and norms random too, so that none can be lost unnoticed."""
    torch.manual_seed(7)
    classes = {
        "llama": (LlamaConfig, LlamaForCausalLM),
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
        "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    }
    config_class, model_class = classes[arch]
    # Qwen3's heads are wider than hidden_size / num_attention_heads, as in the real models.
    extra = {"head_dim": 128} if arch == "qwen3" else {}
    model = model_class(config_class(**{**SIZES, "rms_norm_eps": 1e-5, "tie_word_embeddings": False, **extra, **options}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


def gguf_name(name: str) -> str:
    module, leaf = name.rsplit(".", 1)
    if module.startswith("model.layers."):
        _, _, layer, inner = module.split(".", 3)
        return f"blk.{layer}.{GGUF_NAMES[inner]}.{leaf}"
    return f"{GGUF_NAMES[module]}.{leaf}"


def interleave_halves(rows: np.ndarray, num_heads: int) -> np.ndarray:
    """The order of query and key rows in GGUF Llama files, row by row: pairs of rotary embedding become neighbours."""
    head_dim = rows.shape[0] // num_heads
    out = np.empty_like(rows)
    for head in range(num_heads):
        for pair in range(head_dim // 2):
            for half in range(2):
                out[head * head_dim + 2 * pair + half] = rows[head * head_dim + half * (head_dim // 2) + pair]
    return out


def start_writer(path: Path, arch: str, config: Any) -> gguf.GGUFWriter:
    """A writer with the hyperparameters of a `transformers` configuration."""
    writer = gguf.GGUFWriter(path, arch)
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    if arch == "qwen3":
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    else:
        writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    return writer


def add_tensors(writer: gguf.GGUFWriter, model: PreTrainedModel, arch: str, type_name: str) -> None:
    """All tensors of the model: matrices in the given type, vectors as float32."""
    config = model.config
    quantized = gguf.GGMLQuantizationType[type_name]
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = tensor.numpy()
        if arch == "llama" and "q_proj" in name:
            values = interleave_halves(values, config.num_attention_heads)
        if arch == "llama" and "k_proj" in name:
            values = interleave_halves(values, config.num_key_value_heads)
        if values.ndim == 1 or type_name == "F32":
            writer.add_tensor(gguf_name(name), values)
        elif type_name == "F16":
            writer.add_tensor(gguf_name(name), values.astype(np.float16))
        else:
            writer.add_tensor(gguf_name(name), gguf.quants.quantize(values, quantized), raw_dtype=quantized)


def finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_gguf(path: Path, model: PreTrainedModel, arch: str, type_name: str = "F32") -> Path:
    """The whole model in one file, without a tokenizer."""
    writer = start_writer(path, arch, model.config)
    add_tensors(writer, model, arch, type_name)
    finish(writer)
    return path
