"""Configurations of known models, with how many parameters they have."""

from typing import Any


def config(model_type: str, hidden: int, inner: int, layers: int, heads: int, kv_heads: int, vocabulary: int) -> dict[str, Any]:
    return {
        "model_type": model_type,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "torch_dtype": "bfloat16",
    }


# Shapes as their makers publish them, and the parameters counted by hand from their papers and cards.
KNOWN = {
    "Llama-2-7B": (config("llama", 4096, 11008, 32, 32, 32, 32000), 6_738_415_616),
    "Llama-2-70B": (config("llama", 8192, 28672, 80, 64, 8, 32000), 68_976_648_192),
    "Llama-3-70B": (config("llama", 8192, 28672, 80, 64, 8, 128256), 70_553_706_496),
    "Mistral-7B": (config("mistral", 4096, 14336, 32, 32, 8, 32000), 7_241_732_096),
    "Qwen2.5-72B": (config("qwen2", 8192, 29568, 80, 64, 8, 152064), 72_706_203_648),
    "SmolLM2-135M": (config("llama", 576, 1536, 30, 9, 3, 49152) | {"tie_word_embeddings": True}, 134_515_008),
}
