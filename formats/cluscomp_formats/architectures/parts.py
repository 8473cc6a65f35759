"""Parts that many families share, under Llama's names, with the names that llama.cpp has for them."""

from __future__ import annotations

import math

from cluscomp_formats.architectures.config_reader import Heads
from cluscomp_formats.architectures.description import Activation, Attention, FeedForward, Linear, Norm

__all__ = ["embedding", "gated_feed_forward", "head", "self_attention"]


def embedding(vocab_size: int, hidden_size: int) -> Linear:
    return Linear("model.embed_tokens", vocab_size, hidden_size, "token_embd", "embedding")


def head(vocab_size: int, hidden_size: int) -> Linear:
    return Linear("lm_head", vocab_size, hidden_size, "output", "head")


def self_attention(
    index: int,
    hidden_size: int,
    sizes: Heads,
    *,
    bias: bool = False,
    output_bias: bool = False,
    permuted: bool = False,
    head_norm: tuple[float, float] | None = None,
    scale: float | None = None,
    rope: int = 0,
    window: int | None = None,
) -> Attention:
    """The attention of layer `index`.

    `permuted`: llama.cpp keeps the rows of queries and keys interleaved. `head_norm`: epsilon and offset of the norms of
    queries and keys. `scale` is one over the root of head_dim unless given.
    """
    module, block = f"model.layers.{index}.self_attn", f"blk.{index}"
    queries, keys, width = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim, sizes.head_dim
    query_norm = key_norm = None
    if head_norm is not None:
        eps, offset = head_norm
        query_norm = Norm(f"{module}.q_norm", width, eps, f"{block}.attn_q_norm", offset)
        key_norm = Norm(f"{module}.k_norm", width, eps, f"{block}.attn_k_norm", offset)
    return Attention(
        Linear(
            f"{module}.q_proj",
            queries,
            hidden_size,
            f"{block}.attn_q",
            bias=bias,
            permuted_heads=sizes.heads if permuted else None,
        ),
        Linear(
            f"{module}.k_proj",
            keys,
            hidden_size,
            f"{block}.attn_k",
            bias=bias,
            permuted_heads=sizes.kv_heads if permuted else None,
        ),
        Linear(f"{module}.v_proj", keys, hidden_size, f"{block}.attn_v", bias=bias),
        Linear(f"{module}.o_proj", hidden_size, queries, f"{block}.attn_output", bias=output_bias),
        heads=sizes.heads,
        kv_heads=sizes.kv_heads,
        head_dim=width,
        scale=1.0 / math.sqrt(width) if scale is None else scale,
        rope=rope,
        window=window,
        query_norm=query_norm,
        key_norm=key_norm,
    )


def gated_feed_forward(
    index: int, hidden_size: int, width: int, activation: Activation, *, bias: bool = False, expert: int | None = None
) -> FeedForward:
    """The feed-forward network of layer `index`, or one of its experts."""
    module, block, suffix = f"model.layers.{index}.mlp", f"blk.{index}", ""
    if expert is not None:
        module, suffix = f"{module}.experts.{expert}", "_exps"

    def linear(name: str, gguf: str, out_features: int, in_features: int) -> Linear:
        return Linear(f"{module}.{name}", out_features, in_features, f"{block}.{gguf}{suffix}", bias=bias, expert=expert)

    return FeedForward(
        linear("gate_proj", "ffn_gate", width, hidden_size),
        linear("up_proj", "ffn_up", width, hidden_size),
        linear("down_proj", "ffn_down", hidden_size, width),
        activation,
    )
