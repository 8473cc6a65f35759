"""The language model of Gemma 3.

Four norms a block, before and after attention and feed-forward network, whose weights are stored less one; norms of queries and
keys; most layers see a window and have rotary positions of a base of their own; the embedding is multiplied by the root of
hidden_size.

That root is used as it is. transformers rounds it to the dtype of the weights (in bfloat16 25.25 in place of 25.298, for a
hidden_size of 640), llama.cpp does not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from cluscomp_formats.architectures.config_reader import ConfigReader
from cluscomp_formats.architectures.description import Block, Branch, DecoderDescription, Norm, Rope
from cluscomp_formats.architectures.family import Family
from cluscomp_formats.architectures.parts import embedding, gated_feed_forward, head, self_attention

__all__ = ["FAMILIES"]

FULL, SLIDING = "full_attention", "sliding_attention"
THETAS = {FULL: ("rope_theta", 1_000_000.0), SLIDING: ("rope_local_base_freq", 10_000.0)}
"""By layer type, the field that says the base of rotary positions in files of transformers 4, and its default."""


def _describe(reader: ConfigReader, family: Family) -> DecoderDescription:
    hidden_size, vocab_size = reader.integer("hidden_size"), reader.integer("vocab_size")
    width, eps = reader.integer("intermediate_size"), reader.number("rms_norm_eps", 1e-6)
    num_layers, sizes = reader.layers(), reader.heads(hidden_size, 256)
    context = reader.integer("max_position_embeddings", 131072)
    reader.refuse_what_no_family_does()
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        reader.refuse_unless(name, (), "null: no soft cap")
    reader.refuse_unless("use_bidirectional_attention", (False,), "false")
    bias = reader.boolean("attention_bias", default=False)
    activation = reader.activation("hidden_activation", "gelu_pytorch_tanh")
    scale = 1.0 / math.sqrt(reader.number("query_pre_attn_scalar", 256.0))
    kinds, ropes = _layer_types(reader, num_layers), _ropes(reader, context)
    window = reader.integer("sliding_window", None if "sliding_window" in reader.config else 4096) if SLIDING in kinds else None

    def block(index: int) -> Block:
        prefix, gguf, sliding = f"model.layers.{index}", f"blk.{index}", kinds[index] == SLIDING

        def norm(name: str, stored: str) -> Norm:
            return Norm(f"{prefix}.{name}", hidden_size, eps, f"{gguf}.{stored}", offset=1.0)

        attention = self_attention(
            index,
            hidden_size,
            sizes,
            bias=bias,
            output_bias=bias,
            head_norm=(eps, 1.0),
            scale=scale,
            rope=int(sliding),
            window=window if sliding else None,
        )
        network = gated_feed_forward(index, hidden_size, width, activation)
        return Block(
            f"{prefix}.",
            (
                Branch(
                    norm("input_layernorm", "attn_norm"),
                    attention,
                    norm("post_attention_layernorm", "post_attention_norm"),
                ),
                Branch(
                    norm("pre_feedforward_layernorm", "ffn_norm"),
                    network,
                    norm("post_feedforward_layernorm", "post_ffw_norm"),
                ),
            ),
        )

    return DecoderDescription(
        family.model_type,
        context,
        embedding(vocab_size, hidden_size),
        tuple(block(index) for index in range(num_layers)),
        Norm("model.norm", hidden_size, eps, "output_norm", offset=1.0),
        head(vocab_size, hidden_size),
        tied=reader.boolean("tie_word_embeddings", default=True),
        ropes=ropes,
        embedding_scale=math.sqrt(hidden_size),
    )


def _layer_types(reader: ConfigReader, num_layers: int) -> list[str]:
    kinds = reader.layer_types(num_layers)
    if kinds is not None:
        return kinds
    # Before layer_types: each such layer sees all tokens, those between a window.
    pattern = reader.integer("sliding_window_pattern", 6)
    return [SLIDING if (index + 1) % pattern else FULL for index in range(num_layers)]


def _ropes(reader: ConfigReader, context: int) -> tuple[Rope, ...]:
    """Of layers that see all tokens, and of those that see a window; `rope_scaling` of transformers 4 is of the former only."""
    given = reader.config.get("rope_parameters") or {}
    if not isinstance(given, Mapping) or any(not isinstance(value, Mapping | None) for value in given.values()):
        reader.bad("rope_parameters", given, f"an object with {FULL} and {SLIDING}, an object each")
        given = {}
    ropes = []
    for kind, (field, default) in THETAS.items():
        name, parameters = f"rope_parameters.{kind}", dict(given.get(kind) or {})
        if kind == FULL and reader.config.get("rope_scaling"):
            name, parameters = "rope_scaling", {**parameters, **_object(reader, "rope_scaling")}
        ropes.append(reader.rope_of(name, parameters, reader.number(field, default), context))
    return tuple(ropes)


def _object(reader: ConfigReader, name: str) -> Mapping[str, object]:
    value = reader.config[name]
    if isinstance(value, Mapping):
        return value
    reader.bad(name, value, "an object")
    return {}


FAMILIES = (Family("gemma3_text", "Gemma3ForCausalLM", "gemma3", _describe),)
