"""Llama, Mistral, Qwen2, Qwen3 and models of the same layout, such as SmolLM.

They differ in which matrices have biases, in norms of queries and keys (Qwen3), and in windows (Mistral, Qwen).
"""

from __future__ import annotations

from cluscomp_formats.architectures.config_reader import ConfigReader
from cluscomp_formats.architectures.description import Block, Branch, DecoderDescription, Norm
from cluscomp_formats.architectures.family import Family
from cluscomp_formats.architectures.parts import embedding, gated_feed_forward, head, self_attention

__all__ = ["FAMILIES"]

CONTEXTS = {"llama": 2048, "mistral": 131072, "qwen2": 32768, "qwen3": 32768}


def _describe(reader: ConfigReader, family: Family) -> DecoderDescription:
    model_type = family.model_type
    hidden_size, vocab_size = reader.integer("hidden_size"), reader.integer("vocab_size")
    width, eps = reader.integer("intermediate_size"), reader.number("rms_norm_eps", 1e-6)
    num_layers, sizes = reader.layers(), reader.heads(hidden_size, 128 if model_type == "qwen3" else None)
    context = reader.integer("max_position_embeddings", CONTEXTS[model_type])
    for name in ("num_experts", "num_local_experts"):
        reader.refuse_unless(name, (0, 1), "no mixture of experts")
    reader.refuse_what_no_family_does()
    attention_bias = model_type in {"llama", "qwen3"} and reader.boolean("attention_bias", default=False)
    mlp_bias = model_type == "llama" and reader.boolean("mlp_bias", default=False)
    activation, rope, windows = reader.activation(), reader.rope(context), _windows(reader, model_type, num_layers)

    def block(index: int) -> Block:
        prefix, gguf = f"model.layers.{index}", f"blk.{index}"
        attention = self_attention(
            index,
            hidden_size,
            sizes,
            # Qwen2 always has these biases.
            bias=attention_bias or model_type == "qwen2",
            output_bias=attention_bias,
            permuted=family.gguf == "llama",
            head_norm=(eps, 0.0) if model_type == "qwen3" else None,
            window=windows[index],
        )
        network = gated_feed_forward(index, hidden_size, width, activation, bias=mlp_bias)
        return Block(
            f"{prefix}.",
            (
                Branch(Norm(f"{prefix}.input_layernorm", hidden_size, eps, f"{gguf}.attn_norm"), attention),
                Branch(Norm(f"{prefix}.post_attention_layernorm", hidden_size, eps, f"{gguf}.ffn_norm"), network),
            ),
        )

    return DecoderDescription(
        model_type,
        context,
        embedding(vocab_size, hidden_size),
        tuple(block(index) for index in range(num_layers)),
        Norm("model.norm", hidden_size, eps, "output_norm"),
        head(vocab_size, hidden_size),
        tied=reader.boolean("tie_word_embeddings", default=False),
        ropes=(rope,),
    )


def _windows(reader: ConfigReader, model_type: str, num_layers: int) -> list[int | None]:
    mistral = model_type == "mistral"
    in_use = mistral or (model_type != "llama" and reader.boolean("use_sliding_window", default=False))
    # Mistral's configuration has a window unless it says null; only a missing field means the default of 4096.
    if not in_use or ("sliding_window" in reader.config and reader.config["sliding_window"] is None):
        return [None] * num_layers
    window = reader.integer("sliding_window", 4096)
    if mistral:
        return [window] * num_layers
    kinds = reader.layer_types(num_layers)
    if kinds is not None:
        return [window if kind == "sliding_attention" else None for kind in kinds]
    first = reader.config.get("max_window_layers", 28)
    if isinstance(first, bool) or not isinstance(first, int) or first < 0:
        reader.bad("max_window_layers", first, "an integer from 0")
        first = 0
    return [window if layer >= first else None for layer in range(num_layers)]


FAMILIES = (
    Family("llama", "LlamaForCausalLM", "llama", _describe),
    Family("mistral", "MistralForCausalLM", "llama", _describe),
    Family("qwen2", "Qwen2ForCausalLM", "qwen2", _describe),
    Family("qwen3", "Qwen3ForCausalLM", "qwen3", _describe),
)
