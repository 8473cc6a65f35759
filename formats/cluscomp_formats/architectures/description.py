"""What a decoder is made of, as data: tensors, blocks, and the operations that blocks are lists of.

A family (`llama.py`, ...) makes a `DecoderDescription` from a `config.json`; all else follows from it: the tensors a model must
have, the torch decoder, the order in which calibration encodes matrices, memory estimates, the ONNX graph and GGUF files. What
is described, from the outside in:

    ids -> embedding, times `embedding_scale` -> block 0 -> block 1 -> ... -> norm -> head -> logits

What flows between blocks is the residual stream, `[tokens, hidden_size]`. A block is a sequence of branches. Each branch reads
the stream and adds to it,

    stream + post_norm(part(norm(stream)))

where most families have no `post_norm`, and the part is attention, a gated feed-forward network, or experts. The matrices of a
part come in steps: those of a step do not depend on each other, those of a group share one input, and what the last step gives
is added to the stream (after the post norm). So the first step holds the input projections, the last the output projections.

All classes are frozen and compare by value. Names are those of Hugging Face checkpoints; `gguf` is the name of the same tensor
in llama.cpp's files, without `.weight` or `.bias`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

__all__ = [
    "Activation",
    "Attention",
    "Block",
    "Branch",
    "DecoderDescription",
    "Experts",
    "FeedForward",
    "Linear",
    "Norm",
    "Role",
    "Rope",
    "Step",
    "TensorSpec",
]

Activation = Literal["silu", "gelu", "gelu_tanh"]
Role = Literal["embedding", "head", "matrix", "router", "norm", "bias"]
"""What a tensor is for. Only matrices, the embedding and the head are clustered; a router picks experts and stays dense."""


@dataclass(frozen=True)
class TensorSpec:
    """A tensor of a model.

    In a GGUF file it is called `gguf_name`; rows of heads are interleaved if `permuted_heads` says how many heads there are,
    `offset` is added to the values, and of the experts' stacked matrices it is slice `expert`.
    """

    name: str
    shape: tuple[int, ...]
    role: Role
    gguf_name: str
    permuted_heads: int | None = None
    offset: float = 0.0
    expert: int | None = None


@dataclass(frozen=True)
class Linear:
    """`y = x W^T + b` with `W` `[out_features, in_features]`; as an embedding a table, whose rows are taken."""

    name: str
    out_features: int
    in_features: int
    gguf: str
    role: Role = "matrix"
    bias: bool = False
    permuted_heads: int | None = None
    """Heads whose rows llama.cpp keeps interleaved; None if it keeps the rows as they are."""
    expert: int | None = None
    """The number of the expert it belongs to."""

    @property
    def weight(self) -> str:
        """Name of the weight."""
        return f"{self.name}.weight"

    def tensors(self) -> Iterator[TensorSpec]:
        shape = (self.out_features, self.in_features)
        yield TensorSpec(self.weight, shape, self.role, f"{self.gguf}.weight", self.permuted_heads, expert=self.expert)
        if self.bias:
            bias = f"{self.name}.bias"
            yield TensorSpec(bias, shape[:1], "bias", f"{self.gguf}.bias", self.permuted_heads, expert=self.expert)


@dataclass(frozen=True)
class Norm:
    """Root-mean-square norm over the last axis: `x / sqrt(mean(x^2) + eps) * (weight + offset)`."""

    name: str
    size: int
    eps: float
    gguf: str
    offset: float = 0.0

    @property
    def weight(self) -> str:
        """Name of the weight."""
        return f"{self.name}.weight"

    def tensors(self) -> Iterator[TensorSpec]:
        yield TensorSpec(self.weight, (self.size,), "norm", f"{self.gguf}.weight", offset=self.offset)


@dataclass(frozen=True)
class Rope:
    """How positions turn into angles. The last three fields matter to `llama3` only, `factor` to `linear` and `llama3`."""

    theta: float
    type: Literal["default", "linear", "llama3"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192


@dataclass(frozen=True)
class Step:
    """Matrices that do not depend on each other. Those of a group share one input."""

    groups: tuple[tuple[Linear, ...], ...]

    @property
    def weights(self) -> tuple[str, ...]:
        """The names of their weights."""
        return tuple(linear.weight for group in self.groups for linear in group)


@dataclass(frozen=True)
class Attention:
    """Causal attention whose `heads` queries share `kv_heads` keys and values, all `head_dim` wide, with rotary positions.

    Queries and keys are normed per head if there are norms, then rotated by `ropes[rope]` of the description; scores are
    multiplied by `scale`. A token sees those before it and itself, at most `window` in all.
    """

    query: Linear
    key: Linear
    value: Linear
    output: Linear
    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    rope: int = 0
    window: int | None = None
    query_norm: Norm | None = None
    key_norm: Norm | None = None

    @property
    def steps(self) -> tuple[Step, ...]:
        return Step(((self.query, self.key, self.value),)), Step(((self.output,),))

    def tensors(self) -> Iterator[TensorSpec]:
        for part in (self.query, self.key, self.value, self.output, self.query_norm, self.key_norm):
            if part is not None:
                yield from part.tensors()


@dataclass(frozen=True)
class FeedForward:
    """The gated network `down(activation(gate(x)) * up(x))`."""

    gate: Linear
    up: Linear
    down: Linear
    activation: Activation

    @property
    def width(self) -> int:
        """Features of a token between the matrices."""
        return self.down.in_features

    @property
    def steps(self) -> tuple[Step, ...]:
        return Step(((self.gate, self.up),)), Step(((self.down,),))

    def tensors(self) -> Iterator[TensorSpec]:
        for part in (self.gate, self.up, self.down):
            yield from part.tensors()


@dataclass(frozen=True)
class Experts:
    """Feed-forward networks of which each token goes through `top_k`, those that its router scores highest.

    The router's outputs become probabilities (softmax over all experts); those of the experts taken are divided by their sum if
    `normalised`, and weight what the experts give.
    """

    router: Linear
    experts: tuple[FeedForward, ...]
    top_k: int
    normalised: bool

    @property
    def width(self) -> int:
        """Features of a token between the matrices, in all the experts it goes through."""
        return self.top_k * self.experts[0].width

    @property
    def steps(self) -> tuple[Step, ...]:
        inputs = tuple((expert.gate, expert.up) for expert in self.experts)
        return Step(inputs), Step(tuple((expert.down,) for expert in self.experts))

    def tensors(self) -> Iterator[TensorSpec]:
        yield from self.router.tensors()
        for expert in self.experts:
            yield from expert.tensors()


@dataclass(frozen=True)
class Branch:
    """Part of a block that reads the residual stream and adds to it: `stream + post_norm(part(norm(stream)))`."""

    norm: Norm
    part: Attention | FeedForward | Experts
    post_norm: Norm | None = None


@dataclass(frozen=True)
class Block:
    """A layer of the decoder; the names of all its tensors begin with `prefix`."""

    prefix: str
    branches: tuple[Branch, ...]

    @property
    def steps(self) -> tuple[Step, ...]:
        """All matrices in the order in which activations flow through them."""
        return tuple(step for branch in self.branches for step in branch.part.steps)

    @property
    def attentions(self) -> tuple[Attention, ...]:
        return tuple(branch.part for branch in self.branches if isinstance(branch.part, Attention))

    @property
    def networks(self) -> tuple[FeedForward | Experts, ...]:
        return tuple(branch.part for branch in self.branches if not isinstance(branch.part, Attention))

    def tensors(self) -> Iterator[TensorSpec]:
        for branch in self.branches:
            for norm in (branch.norm, branch.post_norm):
                if norm is not None:
                    yield from norm.tensors()
        for branch in self.branches:
            yield from branch.part.tensors()


@dataclass(frozen=True)
class DecoderDescription:
    """A decoder with its sizes. Make one with `cluscomp_formats.architectures.describe`."""

    model_type: str
    max_position_embeddings: int
    embedding: Linear
    blocks: tuple[Block, ...]
    norm: Norm
    head: Linear
    tied: bool
    """The embedding is the head as well, unless the model brings one all the same."""
    ropes: tuple[Rope, ...]
    """The ways in which attention turns positions into angles; each `Attention` names one by index."""
    embedding_scale: float = 1.0

    @property
    def vocab_size(self) -> int:
        return self.embedding.out_features

    @property
    def hidden_size(self) -> int:
        return self.embedding.in_features

    @property
    def num_layers(self) -> int:
        return len(self.blocks)

    @cached_property
    def tensors(self) -> Mapping[str, TensorSpec]:
        """All tensors by name, in the order of the model; the head is not among them if it is tied."""
        specs = [*self.embedding.tensors(), *self.norm.tensors()]
        for block in self.blocks:
            specs += block.tensors()
        if not self.tied:
            specs += self.head.tensors()
        return {spec.name: spec for spec in specs}
