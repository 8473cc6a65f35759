"""Small random models of the families whose GGUF files differ from Llama's in more than names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from cluscomp_formats.architectures import describe
from cluscomp_formats.ir import Array, DenseTensor, Model

_SIZES: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 7,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GEMMA3 = {"model_type": "gemma3_text", **_SIZES, "query_pre_attn_scalar": 32, "sliding_window": 20}

CONFIGS: dict[str, dict[str, Any]] = {
    # The sixth of the layers sees all tokens, the others a window.
    "gemma3": _GEMMA3,
    "gemma3-linear-rope": {
        **_GEMMA3,
        "tie_word_embeddings": False,
        "rope_theta": 5000.0,
        "rope_local_base_freq": 300.0,
        "rope_scaling": {"rope_type": "linear", "factor": 4.0},
    },
    "qwen3moe": {
        "model_type": "qwen3_moe",
        **_SIZES,
        "num_hidden_layers": 2,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,
    },
}


def random_model(config: Mapping[str, Any], files: Mapping[str, Array] | None = None) -> Model:
    """A model whose logits are far enough apart to notice any tensor, norms of queries and keys included, in a wrong place."""
    random = np.random.default_rng(5)
    tensors = {}
    for name, spec in describe(config).tensors.items():
        values = random.standard_normal(spec.shape) * (0.2 if spec.role == "norm" else 0.15)
        if spec.role == "norm" and spec.offset == 0:
            values += 1.0
        tensors[name] = DenseTensor(name, Array.of(values.astype(np.float32)))
    return Model(config, tensors, files or {})
