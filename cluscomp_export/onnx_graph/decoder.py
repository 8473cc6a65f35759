"""The graph of a Llama-family decoder with key-value cache, built node by node.

Inputs, outputs and their names are those of Optimum and transformers.js:

    input_ids int64 [batch_size, sequence_length]
    attention_mask int64 [batch_size, total_sequence_length]
    position_ids int64 [batch_size, sequence_length]
    past_key_values.N.key, .value float32 [batch_size, num_kv_heads, past_sequence_length, head_dim]
    -> logits float32 [batch_size, sequence_length, vocab_size]; of a model without a head, last_hidden_state float32
       [batch_size, sequence_length, hidden_size]
       present.N.key, .value float32 [batch_size, num_kv_heads, total_sequence_length, head_dim]

It computes what `cluscomp_runtime.decoder` does, in float32; angles of rotary positions are reduced in int64 before that.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from onnx import TensorProto, numpy_helper

from cluscomp_formats.ir import DenseTensor, Model
from cluscomp_formats.onnx.graph import FLOAT, Graph, GraphBuilder, value
from cluscomp_formats.onnx.weights import add_bias, as_float, embedding, linear
from cluscomp_runtime.architecture import DecoderSettings
from cluscomp_runtime.rope import inverse_frequencies

__all__ = ["llama_graph"]

LOWEST = float(np.finfo(np.float32).min)
"""Added to a score that must not count. Not minus infinity: a padded position that attends to nothing would give NaN."""

TURN_BITS = 44
"""An angle per position is off by 2 ** -45 turns at most, which a million positions make as much as a float32's rounding; int64
overflows after three."""


def llama_graph(model: Model, settings: DecoderSettings, *, predicts: bool = True) -> Graph:
    """The graph of a model that `architecture.check_tensors` has passed, up to its head if it `predicts`."""
    return _LlamaGraph(model, settings, predicts=predicts).build()


@dataclass(frozen=True)
class _Shared:
    """Values that all layers use.

    `masks` float `[batch, 1, 1, tokens, keys]` by sliding window; `scores_shape` that of the scores split by group.
    """

    cosines: str
    sines: str
    masks: dict[int | None, str]
    scores_shape: str


class _LlamaGraph:
    def __init__(self, model: Model, settings: DecoderSettings, *, predicts: bool) -> None:
        self.model = model
        self.settings = settings
        self.predicts = predicts
        self.builder = GraphBuilder()

    def build(self) -> Graph:
        builder, settings = self.builder, self.settings
        builder.scope = "inputs"
        shared = self._shared()
        builder.scope = "model.embed_tokens"
        table = self.model.tensors["model.embed_tokens.weight"]
        x = embedding(builder, table, "input_ids")
        for index in range(settings.num_layers):
            x = self._layer(index, x, shared)
        x = self._norm("model.norm", x)
        result, width = "last_hidden_state", settings.hidden_size
        if self.predicts:
            builder.scope = "lm_head"
            x = linear(builder, self.model.tensors.get("lm_head.weight", table), x)
            result, width = "logits", settings.vocab_size
        builder.node("Identity", [x], name=result)
        cache = [f"{layer}.{part}" for layer in range(settings.num_layers) for part in ("key", "value")]
        ids, mask = ["batch_size", "sequence_length"], ["batch_size", "total_sequence_length"]
        past: list[int | str] = ["batch_size", settings.num_kv_heads, "past_sequence_length", settings.head_dim]
        present: list[int | str] = ["batch_size", settings.num_kv_heads, "total_sequence_length", settings.head_dim]
        return Graph(
            builder.nodes,
            [
                value("input_ids", TensorProto.INT64, ids),
                value("attention_mask", TensorProto.INT64, mask),
                value("position_ids", TensorProto.INT64, ids),
                *(value(f"past_key_values.{name}", FLOAT, past) for name in cache),
            ],
            [
                value(result, FLOAT, [*ids, width]),
                *(value(f"present.{name}", FLOAT, present) for name in cache),
            ],
        )

    def _shared(self) -> _Shared:
        builder, settings = self.builder, self.settings
        keys = builder.node("Shape", ["attention_mask"], start=1, end=2)
        tokens = builder.node("Shape", ["input_ids"], start=1, end=2)
        end, count = builder.node("Squeeze", [keys]), builder.node("Squeeze", [tokens])
        one = builder.int(1)
        query = builder.node("Range", [builder.node("Sub", [end, count]), end, one])
        query = builder.node("Unsqueeze", [query, builder.ints(-1)])
        key = builder.node("Range", [builder.int(0), end, one])
        given = builder.node("Cast", ["attention_mask"], to=TensorProto.BOOL)
        given = builder.node("Unsqueeze", [given, builder.ints(1, 2, 3)])
        causal = builder.node("LessOrEqual", [key, query])
        masks = {}
        for window in dict.fromkeys(settings.windows):
            attended = causal
            if window is not None:
                near = builder.node("Greater", [key, builder.node("Sub", [query, builder.int(window)])])
                attended = builder.node("And", [causal, near])
            allowed = builder.node("And", [given, attended])
            masks[window] = builder.node("Where", [allowed, builder.float(0.0), builder.float(LOWEST)])
        group = builder.ints(0, 0, settings.num_heads // settings.num_kv_heads, -1)
        cosines, sines = self._rotations()
        return _Shared(cosines, sines, masks, builder.node("Concat", [group, keys], axis=0))

    def _rotations(self) -> tuple[str, str]:
        """Cosines and sines `[batch, tokens, 1, head_dim]` of the positions' angles.

        float32 cannot hold the angles of late positions, and runtimes in browsers have no float64: angles are whole numbers
        of `2 ** -TURN_BITS` turns, in which int64 multiplies exactly and drops whole turns.
        """
        builder = self.builder
        frequencies = inverse_frequencies(self.settings.rope, self.settings.head_dim).numpy()
        units = np.rint(frequencies / (2 * math.pi) * 2.0**TURN_BITS).astype(np.int64)
        table = builder.node("Constant", [], value=numpy_helper.from_array(np.concatenate((units, units))))
        angles = builder.node("Mul", [builder.node("Unsqueeze", ["position_ids", builder.ints(2, 3)]), table])
        angles = builder.node("Cast", [builder.node("Mod", [angles, builder.int(1 << TURN_BITS)])], to=FLOAT)
        angles = builder.node("Mul", [angles, builder.float(2 * math.pi / 2.0**TURN_BITS)])
        return builder.node("Cos", [angles]), builder.node("Sin", [angles])

    def _layer(self, index: int, x: str, shared: _Shared) -> str:
        builder = self.builder
        prefix = f"model.layers.{index}"
        mixed = self._attention(index, self._norm(f"{prefix}.input_layernorm", x), shared)
        builder.scope = prefix
        x = builder.node("Add", [x, mixed])
        fed = self._feed_forward(f"{prefix}.mlp", self._norm(f"{prefix}.post_attention_layernorm", x))
        builder.scope = prefix
        return str(builder.node("Add", [x, fed]))

    def _norm(self, name: str, x: str) -> str:
        """Root-mean-square norm over the last axis."""
        builder = self.builder
        builder.scope = name
        weight = self.model.tensors[f"{name}.weight"]
        if not isinstance(weight, DenseTensor):
            raise TypeError(f"{weight.name}: a norm's weight is a vector, and vectors are not clustered")
        squares = builder.node("Pow", [x, builder.float(2.0)])
        mean = builder.node("ReduceMean", [squares, builder.ints(-1)], keepdims=1)
        root = builder.node("Sqrt", [builder.node("Add", [mean, builder.float(self.settings.rms_norm_eps)])])
        return str(builder.node("Mul", [builder.node("Div", [x, root]), as_float(builder, weight.name, weight.values.dtype)]))

    def _linear(self, name: str, x: str) -> str:
        self.builder.scope = name
        y = linear(self.builder, self.model.tensors[f"{name}.weight"], x)
        return add_bias(self.builder, y, self.model.tensors.get(f"{name}.bias"))

    def _attention(self, index: int, x: str, shared: _Shared) -> str:
        """Grouped-query attention: heads that share a key act as so many queries, so that no key is repeated."""
        builder, settings = self.builder, self.settings
        prefix = f"model.layers.{index}.self_attn"
        heads, kv_heads, dim = settings.num_heads, settings.num_kv_heads, settings.head_dim
        queries, keys, values = (self._linear(f"{prefix}.{part}_proj", x) for part in "qkv")
        queries, keys = self._normed_heads(prefix, queries, keys)
        builder.scope = prefix
        # One rotation for queries and keys together.
        both = self._rotated(builder.node("Concat", [queries, keys], axis=2), shared)
        both = builder.node("Transpose", [both], perm=[0, 2, 1, 3])
        queries, keys = builder.node("Split", [both, builder.ints(heads, kv_heads)], outputs=2, axis=1)
        values = builder.node("Reshape", [values, builder.ints(0, 0, kv_heads, dim)])
        values = builder.node("Transpose", [values], perm=[0, 2, 1, 3])
        keys = builder.node("Concat", [f"past_key_values.{index}.key", keys], axis=2, name=f"present.{index}.key")
        values = builder.node("Concat", [f"past_key_values.{index}.value", values], axis=2, name=f"present.{index}.value")
        queries = builder.node("Mul", [queries, builder.float(1.0 / math.sqrt(dim))])
        grouped = builder.node("Reshape", [queries, builder.ints(0, kv_heads, -1, dim)])
        scores = builder.node("MatMul", [grouped, builder.node("Transpose", [keys], perm=[0, 1, 3, 2])])
        by_group = builder.node("Reshape", [scores, shared.scores_shape])
        masked = builder.node("Add", [by_group, shared.masks[settings.windows[index]]])
        weights = builder.node("Softmax", [masked], axis=-1)
        weights = builder.node("Reshape", [weights, builder.node("Shape", [scores])])
        mixed = builder.node("MatMul", [weights, values])
        mixed = builder.node("Reshape", [mixed, builder.ints(0, heads, -1, dim)])
        mixed = builder.node("Transpose", [mixed], perm=[0, 2, 1, 3])
        return self._linear(f"{prefix}.o_proj", builder.node("Reshape", [mixed, builder.ints(0, 0, heads * dim)]))

    def _normed_heads(self, prefix: str, queries: str, keys: str) -> tuple[str, str]:
        """Queries and keys split into heads, `[batch, tokens, heads, head_dim]`, and normed where the model does that."""
        builder, settings = self.builder, self.settings
        builder.scope = prefix
        queries = builder.node("Reshape", [queries, builder.ints(0, 0, settings.num_heads, settings.head_dim)])
        keys = builder.node("Reshape", [keys, builder.ints(0, 0, settings.num_kv_heads, settings.head_dim)])
        if settings.qk_norm:
            queries, keys = self._norm(f"{prefix}.q_norm", queries), self._norm(f"{prefix}.k_norm", keys)
        return queries, keys

    def _rotated(self, heads: str, shared: _Shared) -> str:
        """`[batch, tokens, heads, head_dim]`, each pair `(i, i + head_dim / 2)` turned by its position's angle."""
        builder = self.builder
        half = self.settings.head_dim // 2
        first, second = builder.node("Split", [heads, builder.ints(half, half)], outputs=2, axis=-1)
        turned = builder.node("Concat", [builder.node("Neg", [second]), first], axis=-1)
        straight = builder.node("Mul", [heads, shared.cosines])
        return str(builder.node("Add", [straight, builder.node("Mul", [turned, shared.sines])]))

    def _feed_forward(self, prefix: str, x: str) -> str:
        """The gated MLP: `down(activation(gate(x)) * up(x))`."""
        builder = self.builder
        gate, up = self._linear(f"{prefix}.gate_proj", x), self._linear(f"{prefix}.up_proj", x)
        builder.scope = prefix
        return self._linear(f"{prefix}.down_proj", builder.node("Mul", [self._activated(gate), up]))

    def _activated(self, x: str) -> str:
        builder = self.builder
        if self.settings.activation == "silu":
            return str(builder.node("Mul", [x, builder.node("Sigmoid", [x])]))
        approximate = "tanh" if self.settings.activation == "gelu_tanh" else "none"
        return str(builder.node("Gelu", [x], approximate=approximate))
