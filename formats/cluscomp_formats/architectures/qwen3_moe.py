"""Qwen3 with mixtures of experts: Qwen3's attention, and experts in place of the feed-forward network of some or all layers.

Checkpoints hold the matrices of each expert by themselves.
"""

from __future__ import annotations

from cluscomp_formats.architectures.config_reader import ConfigReader
from cluscomp_formats.architectures.description import Block, Branch, DecoderDescription, Experts, FeedForward, Linear, Norm
from cluscomp_formats.architectures.family import Family
from cluscomp_formats.architectures.parts import embedding, gated_feed_forward, head, self_attention

__all__ = ["FAMILIES"]

MAX_EXPERTS = 65536
"""Most experts in all layers together: more than twice as many as any model has; bounds the work for hostile configurations."""


def _describe(reader: ConfigReader, family: Family) -> DecoderDescription:
    hidden_size, vocab_size = reader.integer("hidden_size"), reader.integer("vocab_size")
    width, eps = reader.integer("intermediate_size", 6144), reader.number("rms_norm_eps", 1e-6)
    num_layers, sizes = reader.layers(), reader.heads(hidden_size)
    context = reader.integer("max_position_embeddings", 32768)
    reader.refuse_what_no_family_does()
    bias, activation, rope = reader.boolean("attention_bias", default=False), reader.activation(), reader.rope(context)
    windowed = reader.boolean("use_sliding_window", default=False) and reader.config.get("sliding_window", 4096) is not None
    window = reader.integer("sliding_window", 4096) if windowed else None
    # transformers 5 writes the number of experts under another name.
    field = "num_local_experts" if reader.config.get("num_experts") is None else "num_experts"
    num_experts = reader.integer(field, 128, MAX_EXPERTS // num_layers)
    expert_width, top_k = reader.integer("moe_intermediate_size", 768), reader.integer("num_experts_per_tok", 8)
    if top_k > num_experts:
        reader.bad("num_experts_per_tok", top_k, f"no more than {field} ({num_experts})")
    normalised, step, dense = (
        reader.boolean("norm_topk_prob", default=False),
        reader.integer("decoder_sparse_step", 1),
        _dense(reader),
    )

    def network(index: int) -> FeedForward | Experts:
        if index in dense or (index + 1) % step:
            return gated_feed_forward(index, hidden_size, width, activation)
        return Experts(
            Linear(f"model.layers.{index}.mlp.gate", num_experts, hidden_size, f"blk.{index}.ffn_gate_inp", "router"),
            tuple(
                gated_feed_forward(index, hidden_size, expert_width, activation, expert=expert) for expert in range(num_experts)
            ),
            top_k,
            normalised,
        )

    def block(index: int) -> Block:
        prefix, gguf = f"model.layers.{index}", f"blk.{index}"
        attention = self_attention(index, hidden_size, sizes, bias=bias, output_bias=bias, head_norm=(eps, 0.0), window=window)
        return Block(
            f"{prefix}.",
            (
                Branch(Norm(f"{prefix}.input_layernorm", hidden_size, eps, f"{gguf}.attn_norm"), attention),
                Branch(Norm(f"{prefix}.post_attention_layernorm", hidden_size, eps, f"{gguf}.ffn_norm"), network(index)),
            ),
        )

    return DecoderDescription(
        family.model_type,
        context,
        embedding(vocab_size, hidden_size),
        tuple(block(index) for index in range(num_layers)),
        Norm("model.norm", hidden_size, eps, "output_norm"),
        head(vocab_size, hidden_size),
        tied=reader.boolean("tie_word_embeddings", default=False),
        ropes=(rope,),
    )


def _dense(reader: ConfigReader) -> frozenset[int]:
    """The layers that have an ordinary feed-forward network regardless of `decoder_sparse_step`."""
    layers = reader.config.get("mlp_only_layers") or []
    if not isinstance(layers, list) or any(type(layer) is not int for layer in layers):
        reader.bad("mlp_only_layers", layers, "a list of numbers of layers")
        return frozenset()
    return frozenset(layers)


FAMILIES = (Family("qwen3_moe", "Qwen3MoeForCausalLM", "qwen3moe", _describe),)
