"""The graph of a decoder with key-value cache, built node by node from its description (`cluscomp_formats.architectures`).

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

from cluscomp_formats.architectures import Activation, Attention, Block, DecoderDescription, FeedForward, Linear, Norm, Rope
from cluscomp_formats.errors import Problem, UnsupportedError
from cluscomp_formats.ir import DenseTensor, Model
from cluscomp_formats.onnx.graph import FLOAT, Graph, GraphBuilder, value
from cluscomp_formats.onnx.weights import add_bias, as_float, embedding, linear
from cluscomp_runtime.frequencies import inverse_frequencies

__all__ = ["decoder_graph"]

LOWEST = float(np.finfo(np.float32).min)
"""Added to masked scores. Not minus infinity: a padded position that attends to nothing would give NaN."""

TURN_BITS = 44
"""An angle per position is off by 2 ** -45 turns at most, which a million positions make as much as a float32's rounding; int64
overflows after three."""


def decoder_graph(model: Model, description: DecoderDescription, *, predicts: bool = True) -> Graph:
    """The graph of a model that `check_tensors` has passed, up to its head if it `predicts`.

    Raises UnsupportedError for mixtures of experts.
    """
    return _DecoderGraph(model, description, predicts=predicts).build()


@dataclass(frozen=True)
class _Shared:
    """Values that all layers use.

    `rotations` are cosines and sines by the description's `ropes`; `masks` float `[batch, 1, 1, tokens, keys]` by sliding
    window; `scores_shape` that of the scores split by group.
    """

    rotations: list[tuple[str, str]]
    masks: dict[int | None, str]
    scores_shape: str


class _DecoderGraph:
    def __init__(self, model: Model, description: DecoderDescription, *, predicts: bool) -> None:
        self.model = model
        self.description = description
        self.attentions = [attention for block in description.blocks for attention in block.attentions]
        self.predicts = predicts
        self.builder = GraphBuilder()

    def build(self) -> Graph:
        builder, description = self.builder, self.description
        builder.scope = "inputs"
        shared = self._shared()
        builder.scope = description.embedding.name
        table = self.model.tensors[description.embedding.weight]
        x = embedding(builder, table, "input_ids")
        if description.embedding_scale != 1.0:
            x = builder.node("Mul", [x, builder.float(description.embedding_scale)])
        for index, block in enumerate(description.blocks):
            x = self._block(index, block, x, shared)
        x = self._norm(description.norm, x)
        result, width = "last_hidden_state", description.hidden_size
        if self.predicts:
            builder.scope = description.head.name
            x = linear(builder, self.model.tensors.get(description.head.weight, table), x)
            result, width = "logits", description.vocab_size
        builder.node("Identity", [x], name=result)
        cache = [f"{layer}.{part}" for layer in range(description.num_layers) for part in ("key", "value")]
        ids, mask = ["batch_size", "sequence_length"], ["batch_size", "total_sequence_length"]
        # As many heads of a width in every layer.
        attention = self.attentions[0]
        past: list[int | str] = ["batch_size", attention.kv_heads, "past_sequence_length", attention.head_dim]
        present: list[int | str] = ["batch_size", attention.kv_heads, "total_sequence_length", attention.head_dim]
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
        builder, attention = self.builder, self.attentions[0]
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
        for window in dict.fromkeys(attention.window for attention in self.attentions):
            attended = causal
            if window is not None:
                near = builder.node("Greater", [key, builder.node("Sub", [query, builder.int(window)])])
                attended = builder.node("And", [causal, near])
            allowed = builder.node("And", [given, attended])
            masks[window] = builder.node("Where", [allowed, builder.float(0.0), builder.float(LOWEST)])
        group = builder.ints(0, 0, attention.heads // attention.kv_heads, -1)
        rotations = [self._rotation(rope, attention.head_dim) for rope in self.description.ropes]
        return _Shared(rotations, masks, builder.node("Concat", [group, keys], axis=0))

    def _rotation(self, rope: Rope, head_dim: int) -> tuple[str, str]:
        """Cosines and sines `[batch, tokens, 1, head_dim]` of the positions' angles.

        float32 cannot hold the angles of late positions, and runtimes in browsers have no float64: angles are whole numbers
        of `2 ** -TURN_BITS` turns, in which int64 multiplies exactly and drops whole turns.
        """
        builder = self.builder
        frequencies = inverse_frequencies(rope, head_dim)
        units = np.rint(frequencies / (2 * math.pi) * 2.0**TURN_BITS).astype(np.int64)
        table = builder.node("Constant", [], value=numpy_helper.from_array(np.concatenate((units, units))))
        angles = builder.node("Mul", [builder.node("Unsqueeze", ["position_ids", builder.ints(2, 3)]), table])
        angles = builder.node("Cast", [builder.node("Mod", [angles, builder.int(1 << TURN_BITS)])], to=FLOAT)
        angles = builder.node("Mul", [angles, builder.float(2 * math.pi / 2.0**TURN_BITS)])
        return builder.node("Cos", [angles]), builder.node("Sin", [angles])

    def _block(self, index: int, block: Block, x: str, shared: _Shared) -> str:
        builder = self.builder
        for branch in block.branches:
            normed, part = self._norm(branch.norm, x), branch.part
            if isinstance(part, Attention):
                given = self._attention(index, part, normed, shared)
            elif isinstance(part, FeedForward):
                given = self._feed_forward(part, normed)
            else:
                message, remedy = (
                    "a mixture of experts cannot be written as an ONNX graph",
                    "write another format, such as packed",
                )
                raise UnsupportedError(Problem("experts", message, tensor=part.router.weight, remedy=remedy))
            if branch.post_norm is not None:
                given = self._norm(branch.post_norm, given)
            builder.scope = block.prefix.removesuffix(".")
            x = builder.node("Add", [x, given])
        return x

    def _norm(self, norm: Norm, x: str) -> str:
        """Root-mean-square norm over the last axis."""
        builder = self.builder
        builder.scope = norm.name
        weight = self.model.tensors[norm.weight]
        if not isinstance(weight, DenseTensor):
            raise TypeError(f"{weight.name}: a norm's weight is a vector, and vectors are not clustered")
        squares = builder.node("Pow", [x, builder.float(2.0)])
        mean = builder.node("ReduceMean", [squares, builder.ints(-1)], keepdims=1)
        root = builder.node("Sqrt", [builder.node("Add", [mean, builder.float(norm.eps)])])
        divided, factors = builder.node("Div", [x, root]), as_float(builder, weight.name, weight.values.dtype)
        if norm.offset:
            factors = builder.node("Add", [factors, builder.float(norm.offset)])
        return str(builder.node("Mul", [divided, factors]))

    def _linear(self, described: Linear, x: str) -> str:
        self.builder.scope = described.name
        y = linear(self.builder, self.model.tensors[described.weight], x)
        return add_bias(self.builder, y, self.model.tensors.get(f"{described.name}.bias"))

    def _attention(self, index: int, part: Attention, x: str, shared: _Shared) -> str:
        """Grouped-query attention: heads that share a key are treated as further queries, so keys are not repeated."""
        builder, heads, kv_heads, dim = self.builder, part.heads, part.kv_heads, part.head_dim
        queries, keys, values = (self._linear(linear, x) for linear in (part.query, part.key, part.value))
        builder.scope = part.query.name.rpartition(".")[0]
        queries = builder.node("Reshape", [queries, builder.ints(0, 0, heads, dim)])
        keys = builder.node("Reshape", [keys, builder.ints(0, 0, kv_heads, dim)])
        if part.query_norm is not None and part.key_norm is not None:
            queries, keys = self._norm(part.query_norm, queries), self._norm(part.key_norm, keys)
        builder.scope = part.query.name.rpartition(".")[0]
        # One rotation for queries and keys together.
        both = self._rotated(builder.node("Concat", [queries, keys], axis=2), *shared.rotations[part.rope], dim)
        both = builder.node("Transpose", [both], perm=[0, 2, 1, 3])
        queries, keys = builder.node("Split", [both, builder.ints(heads, kv_heads)], outputs=2, axis=1)
        values = builder.node("Reshape", [values, builder.ints(0, 0, kv_heads, dim)])
        values = builder.node("Transpose", [values], perm=[0, 2, 1, 3])
        keys = builder.node("Concat", [f"past_key_values.{index}.key", keys], axis=2, name=f"present.{index}.key")
        values = builder.node("Concat", [f"past_key_values.{index}.value", values], axis=2, name=f"present.{index}.value")
        queries = builder.node("Mul", [queries, builder.float(part.scale)])
        grouped = builder.node("Reshape", [queries, builder.ints(0, kv_heads, -1, dim)])
        scores = builder.node("MatMul", [grouped, builder.node("Transpose", [keys], perm=[0, 1, 3, 2])])
        by_group = builder.node("Reshape", [scores, shared.scores_shape])
        masked = builder.node("Add", [by_group, shared.masks[part.window]])
        weights = builder.node("Softmax", [masked], axis=-1)
        weights = builder.node("Reshape", [weights, builder.node("Shape", [scores])])
        mixed = builder.node("MatMul", [weights, values])
        mixed = builder.node("Reshape", [mixed, builder.ints(0, heads, -1, dim)])
        mixed = builder.node("Transpose", [mixed], perm=[0, 2, 1, 3])
        return self._linear(part.output, builder.node("Reshape", [mixed, builder.ints(0, 0, heads * dim)]))

    def _rotated(self, heads: str, cosines: str, sines: str, head_dim: int) -> str:
        """`[batch, tokens, heads, head_dim]`, each pair `(i, i + head_dim / 2)` turned by its position's angle."""
        builder = self.builder
        half = head_dim // 2
        first, second = builder.node("Split", [heads, builder.ints(half, half)], outputs=2, axis=-1)
        turned = builder.node("Concat", [builder.node("Neg", [second]), first], axis=-1)
        straight = builder.node("Mul", [heads, cosines])
        return str(builder.node("Add", [straight, builder.node("Mul", [turned, sines])]))

    def _feed_forward(self, part: FeedForward, x: str) -> str:
        """The gated network: `down(activation(gate(x)) * up(x))`."""
        builder = self.builder
        gate, up = self._linear(part.gate, x), self._linear(part.up, x)
        builder.scope = part.gate.name.rpartition(".")[0]
        return self._linear(part.down, builder.node("Mul", [self._activated(part.activation, gate), up]))

    def _activated(self, activation: Activation, x: str) -> str:
        builder = self.builder
        if activation == "silu":
            return str(builder.node("Mul", [x, builder.node("Sigmoid", [x])]))
        return str(builder.node("Gelu", [x], approximate="tanh" if activation == "gelu_tanh" else "none"))
