"""Small models made on the spot."""

from __future__ import annotations

from typing import Any

import numpy as np

from cluscomp_formats.ir import Array, DenseTensor, Model


def tiny_llama(seed: int = 0, *, hidden: int = 24, intermediate: int = 40, layers: int = 2, vocabulary: int = 50) -> Model:
    """A random Llama with grouped-query attention and a tied head, float32, no tokenizer."""
    heads, kv_heads = 3, 1
    kv = hidden // heads * kv_heads
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden), "model.norm.weight": (hidden,)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        shapes |= {
            f"{prefix}.input_layernorm.weight": (hidden,),
            f"{prefix}.post_attention_layernorm.weight": (hidden,),
            f"{prefix}.self_attn.q_proj.weight": (hidden, hidden),
            f"{prefix}.self_attn.k_proj.weight": (kv, hidden),
            f"{prefix}.self_attn.v_proj.weight": (kv, hidden),
            f"{prefix}.self_attn.o_proj.weight": (hidden, hidden),
            f"{prefix}.mlp.gate_proj.weight": (intermediate, hidden),
            f"{prefix}.mlp.up_proj.weight": (intermediate, hidden),
            f"{prefix}.mlp.down_proj.weight": (hidden, intermediate),
        }
    generator = np.random.default_rng(seed)
    values = {
        name: np.ones(shape, np.float32) if len(shape) == 1 else generator.normal(0, 0.3, shape).astype(np.float32)
        for name, shape in shapes.items()
    }
    return Model(config, {name: DenseTensor(name, Array.of(array)) for name, array in values.items()})
