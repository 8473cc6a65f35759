"""GGUF architectures as Hugging Face models: tensor names, shapes and permuted rows.

One table has the tensors, with their shapes, that a file of a given architecture and configuration must have. Files are
compared with it when they are read, so a tensor that is missing, unknown or of another shape is reported. Written files have
exactly these tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["ARCHITECTURES", "Architecture", "Placed", "expected_tensors"]


@dataclass(frozen=True)
class Architecture:
    """A supported value of `general.architecture` and its names in transformers.

    `permuted`: query and key rows are stored interleaved. `qkv_bias`: None if it depends on the model's configuration.
    """

    name: str
    model_type: str
    class_name: str
    permuted: bool
    qkv_bias: bool | None
    query_key_norms: bool = False


ARCHITECTURES = {
    architecture.name: architecture
    for architecture in (
        Architecture("llama", "llama", "LlamaForCausalLM", permuted=True, qkv_bias=None),
        Architecture("qwen2", "qwen2", "Qwen2ForCausalLM", permuted=False, qkv_bias=True),
        Architecture("qwen3", "qwen3", "Qwen3ForCausalLM", permuted=False, qkv_bias=None, query_key_norms=True),
    )
}
"""By `general.architecture`. Mistral and SmolLM models are `llama` in GGUF."""


@dataclass(frozen=True)
class Placed:
    """The Hugging Face name and shape of a GGUF tensor, and the number of heads whose rows must be reordered."""

    name: str
    shape: tuple[int, ...]
    permuted_heads: int | None = None


def expected_tensors(architecture: Architecture, config: Mapping[str, Any]) -> dict[str, Placed]:
    """Return every tensor of a file with this configuration, by GGUF name, in the order of the model."""
    hidden, inner, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    heads, key_heads, head_dim = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
    biased = config.get("attention_bias", architecture.qkv_bias)
    # In transformers the output projection has a bias if the others do, except in Qwen2.
    output_biased = config.get("attention_bias", False)
    mlp_biased = config.get("mlp_bias", False)
    linears = [
        ("attn_q", "self_attn.q_proj", (heads * head_dim, hidden), biased, heads),
        ("attn_k", "self_attn.k_proj", (key_heads * head_dim, hidden), biased, key_heads),
        ("attn_v", "self_attn.v_proj", (key_heads * head_dim, hidden), biased, None),
        ("attn_output", "self_attn.o_proj", (hidden, heads * head_dim), output_biased, None),
        ("ffn_gate", "mlp.gate_proj", (inner, hidden), mlp_biased, None),
        ("ffn_up", "mlp.up_proj", (inner, hidden), mlp_biased, None),
        ("ffn_down", "mlp.down_proj", (hidden, inner), mlp_biased, None),
    ]
    norms = [("attn_norm", "input_layernorm", hidden), ("ffn_norm", "post_attention_layernorm", hidden)]
    if architecture.query_key_norms:
        norms += [("attn_q_norm", "self_attn.q_norm", head_dim), ("attn_k_norm", "self_attn.k_norm", head_dim)]

    expected = {"token_embd.weight": Placed("model.embed_tokens.weight", (vocabulary, hidden))}
    for layer in range(config["num_hidden_layers"]):
        block, module = f"blk.{layer}", f"model.layers.{layer}"
        for stored, name, width in norms:
            expected[f"{block}.{stored}.weight"] = Placed(f"{module}.{name}.weight", (width,))
        for stored, name, shape, has_bias, permuted_heads in linears:
            turned = permuted_heads if architecture.permuted else None
            expected[f"{block}.{stored}.weight"] = Placed(f"{module}.{name}.weight", shape, turned)
            if has_bias:
                expected[f"{block}.{stored}.bias"] = Placed(f"{module}.{name}.bias", shape[:1], turned)
    expected["output_norm.weight"] = Placed("model.norm.weight", (hidden,))
    if not config["tie_word_embeddings"]:
        expected["output.weight"] = Placed("lm_head.weight", (vocabulary, hidden))
    return expected
