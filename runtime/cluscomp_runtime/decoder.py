"""The decoder, made from its description (`cluscomp_formats.architectures`).

Written for one sequence at a time on a CPU, where each torch call costs microseconds: few operations per layer, a static
key-value cache written in place, rotary tables made once. Any batch of equally long sequences works too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from cluscomp_formats import architectures
from cluscomp_formats.architectures import DecoderDescription
from cluscomp_formats.ir import Model
from cluscomp_kernels import threads
from cluscomp_runtime.linear import Matrix, MatrixBuilder
from cluscomp_runtime.rope import apply_rope, rope_tables

__all__ = ["Branch", "Decoder", "DecoderLayer", "Experts", "KeyValueCache", "Mixed", "Positions", "Routed"]

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


class KeyValueCache:
    """Keys and values of all layers for up to `context` positions, allocated once.

    `keys` and `values` are lists by layer of `[batch, kv_heads, context, head_dim]`, filled up to `length`.
    """

    def __init__(
        self, description: DecoderDescription, context: int, *, dtype: torch.dtype, device: torch.device, batch: int = 1
    ) -> None:
        attentions = [attention for block in description.blocks for attention in block.attentions]
        shapes = [(batch, attention.kv_heads, context, attention.head_dim) for attention in attentions]
        self.keys = [torch.empty(shape, dtype=dtype, device=device) for shape in shapes]
        self.values = [torch.empty(shape, dtype=dtype, device=device) for shape in shapes]
        self.context = context
        self.length = 0

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(part.nbytes for part in (*self.keys, *self.values))


class RMSNorm:
    """`x / sqrt(mean(x^2) + eps) * (weight + offset)`, computed in the weight's dtype, returned in that of `x`."""

    def __init__(self, weight: torch.Tensor, eps: float, offset: float = 0.0) -> None:
        self.weight = weight
        self.eps = eps
        self.offset = offset

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        # At every call: a training or a delta may change the weight.
        weight = self.weight + self.offset if self.offset else self.weight
        # `to` returns the tensor itself where the dtype already fits.
        return F.rms_norm(x.to(weight.dtype), weight.shape, weight, self.eps).to(x.dtype)


@dataclass
class Positions:
    """Positions of the tokens of one pass, as the layers need them."""

    rotations: list[tuple[torch.Tensor, torch.Tensor]]
    """Cosines and signed sines (`rope_tables`) of these positions, by the description's `ropes`."""
    start: int
    masks: dict[int | None, torch.Tensor | None]
    """Boolean mask `[tokens, keys]` (true: attend) by sliding window; None where plain causal attention does."""


class Attention:
    """Grouped-query attention with rotary positions, optionally with normed queries and keys or a sliding window."""

    def __init__(self, model: Model, part: architectures.Attention, index: int, builder: MatrixBuilder) -> None:
        self.query = _linear(model, builder, part.query)
        self.key = _linear(model, builder, part.key)
        self.value = _linear(model, builder, part.value)
        self.output = _linear(model, builder, part.output)
        self.query_norm = _norm(model, builder, part.query_norm)
        self.key_norm = _norm(model, builder, part.key_norm)
        self.index = index
        self.heads, self.kv_heads, self.head_dim = part.heads, part.kv_heads, part.head_dim
        self.scale, self.rope, self.window = part.scale, part.rope, part.window

    def mix(self, x: torch.Tensor, positions: Positions, cache: KeyValueCache | None) -> torch.Tensor:
        """Outputs of the heads, before the output projection, `[batch, tokens, heads * head_dim]`."""
        batch, tokens, _ = x.shape
        queries, keys = self.query(x), self.key(x)
        if self.query_norm is not None and self.key_norm is not None:
            queries = self.query_norm(queries.view(batch, tokens, self.heads, self.head_dim)).flatten(2)
            keys = self.key_norm(keys.view(batch, tokens, self.kv_heads, self.head_dim)).flatten(2)
        # One rotation for queries and keys together: half the calls.
        both = torch.cat((queries, keys), dim=-1).view(batch, tokens, self.heads + self.kv_heads, self.head_dim)
        both = apply_rope(both, *positions.rotations[self.rope]).transpose(1, 2)
        queries, keys = both[:, : self.heads], both[:, self.heads :]
        values = self.value(x).view(batch, tokens, self.kv_heads, self.head_dim).transpose(1, 2)
        end = positions.start + tokens
        if cache is not None:
            cached_keys, cached_values = cache.keys[self.index], cache.values[self.index]
            cached_keys[:, :, positions.start : end] = keys
            cached_values[:, :, positions.start : end] = values
            if tokens == 1:
                return self._attend_one(queries, cached_keys, cached_values, end)
            keys, values = cached_keys[:, :, :end], cached_values[:, :, :end]
        mask = positions.masks[self.window]
        mixed = F.scaled_dot_product_attention(
            queries,
            keys,
            values,
            attn_mask=mask,
            is_causal=mask is None,
            scale=self.scale,
            enable_gqa=self.heads != self.kv_heads,
        )
        return mixed.transpose(1, 2).reshape(batch, tokens, -1)

    def _attend_one(self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, end: int) -> torch.Tensor:
        """Attention of one token. Heads that share a key are treated as further queries, so keys are not repeated."""
        batch = queries.shape[0]
        begin = 0 if self.window is None else max(0, end - self.window)
        grouped = queries.reshape(batch, self.kv_heads, self.heads // self.kv_heads, self.head_dim)
        mixed = F.scaled_dot_product_attention(grouped, keys[:, :, begin:end], values[:, :, begin:end], scale=self.scale)
        return mixed.reshape(batch, 1, -1)


class FeedForward:
    """The gated network `output(activation(gate(x)) * up(x))`."""

    def __init__(self, model: Model, part: architectures.FeedForward, builder: MatrixBuilder) -> None:
        self.gate = _linear(model, builder, part.gate)
        self.up = _linear(model, builder, part.up)
        self.output = _linear(model, builder, part.down)
        self.activation = ACTIVATIONS[part.activation]

    def mix(self, x: torch.Tensor) -> torch.Tensor:
        """The gated features, before the output projection, `[..., width]`."""
        return self.activation(self.gate(x)) * self.up(x)


@dataclass
class Routed:
    """The inputs of the output projections of experts.

    `features` `[..., top_k, width]` of each token in each of its experts, times `weights` `[..., top_k]`, which the router
    gives them; `chosen` int64 `[..., top_k]` numbers the experts.
    """

    features: torch.Tensor
    weights: torch.Tensor
    chosen: torch.Tensor

    def to(self, device: torch.device | str) -> Routed:
        return Routed(self.features.to(device), self.weights.to(device), self.chosen.to(device))

    def cpu(self) -> Routed:
        return self.to("cpu")


Mixed = torch.Tensor | Routed
"""The inputs of a branch's output projections: `[batch, tokens, features]` where there is one."""


class Experts:
    """Feed-forward networks; a router sends each token through a few of them."""

    def __init__(self, model: Model, part: architectures.Experts, builder: MatrixBuilder) -> None:
        self.router = builder.dense(model.tensors[part.router.weight])
        self.experts = [FeedForward(model, expert, builder) for expert in part.experts]
        self.top_k, self.normalised = part.top_k, part.normalised

    def route(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights and numbers of the experts of each token, both `[..., top_k]`, for `x` `[..., hidden_size]`."""
        logits = self.router(x)
        probabilities = torch.softmax(logits, dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))
        weights, chosen = probabilities.topk(self.top_k, dim=-1)
        if self.normalised:
            weights = weights / weights.sum(-1, keepdim=True)
        return weights.to(x.dtype), chosen

    def mix(self, x: torch.Tensor) -> Routed:
        """The features of `x` `[..., hidden_size]` in the experts that the router chooses."""
        weights, chosen = self.route(x)
        rows = x.unsqueeze(-2).expand(*chosen.shape, -1)
        features = self._each(rows, chosen, lambda expert, some: expert.mix(some))
        return Routed(features * weights.unsqueeze(-1), weights, chosen)

    def output(self, routed: Routed) -> torch.Tensor:
        """Sum of the outputs of each token's experts."""
        # The weights are in the features already: the output projections are linear.
        return self._each(routed.features, routed.chosen, lambda expert, some: expert.output(some)).sum(-2)

    def _each(
        self,
        rows: torch.Tensor,
        chosen: torch.Tensor,
        compute: Callable[[FeedForward, torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        """Run each of `rows` `[..., top_k, features]` through its expert; the rows of an expert go together, as one matrix."""
        flat = chosen.flatten()
        order = flat.argsort(stable=True)
        counts = torch.bincount(flat, minlength=len(self.experts)).tolist()
        parts = zip(self.experts, torch.split(rows.flatten(0, -2)[order], counts), strict=True)
        found = torch.cat([compute(expert, some) for expert, some in parts if len(some)])
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order), device=order.device)
        return found[place].view(*chosen.shape, -1)


class Branch:
    """Attention, a feed-forward network or experts, with the norms around them."""

    def __init__(self, model: Model, branch: architectures.Branch, index: int, builder: MatrixBuilder) -> None:
        part = branch.part
        self.norm = RMSNorm(builder.norm(model.tensors[branch.norm.weight]), branch.norm.eps, branch.norm.offset)
        self.part: Attention | FeedForward | Experts
        if isinstance(part, architectures.Attention):
            self.part = Attention(model, part, index, builder)
        elif isinstance(part, architectures.Experts):
            self.part = Experts(model, part, builder)
        else:
            self.part = FeedForward(model, part, builder)
        self.post_norm = _norm(model, builder, branch.post_norm)

    def __call__(self, x: torch.Tensor, positions: Positions, cache: KeyValueCache | None) -> torch.Tensor:
        return self.added(x, self.project(self.mix(self.norm(x), positions, cache)))

    def mix(self, normed: torch.Tensor, positions: Positions, cache: KeyValueCache | None) -> Mixed:
        """The inputs of the output projection."""
        if isinstance(self.part, Attention):
            return self.part.mix(normed, positions, cache)
        return self.part.mix(normed)

    def project(self, mixed: Mixed) -> torch.Tensor:
        """The outputs of the output projection for them."""
        return self.part.output(mixed)  # type: ignore[arg-type]  # it is what `mix` of the same part gave

    def added(self, x: torch.Tensor, projected: torch.Tensor) -> torch.Tensor:
        """The residual stream `x` with the outputs of the output projection added."""
        return x + (projected if self.post_norm is None else self.post_norm(projected))


class DecoderLayer:
    """One block: its branches, one after the other."""

    def __init__(self, model: Model, block: architectures.Block, index: int, builder: MatrixBuilder) -> None:
        self.branches = [Branch(model, branch, index, builder) for branch in block.branches]

    def __call__(self, x: torch.Tensor, positions: Positions, cache: KeyValueCache | None) -> torch.Tensor:
        for branch in self.branches:
            x = branch(x, positions, cache)
        return x


class Decoder:
    """The network. Expects a model that `check_tensors` has passed."""

    def __init__(self, model: Model, description: DecoderDescription, builder: MatrixBuilder) -> None:
        threads.ready_after_fork()
        self.description = description
        self.dtype, self.device = builder.dtype, builder.device
        self.embedding = builder.build(model.tensors[description.embedding.weight])
        self.layers = [DecoderLayer(model, block, index, builder) for index, block in enumerate(description.blocks)]
        self.norm = RMSNorm(builder.norm(model.tensors[description.norm.weight]), description.norm.eps, description.norm.offset)
        head = model.tensors.get(description.head.weight)
        self.head = self.embedding if head is None else builder.build(head)
        attentions = [attention for block in description.blocks for attention in block.attentions]
        self._windows = {attention.window for attention in attentions}
        # All heads of a decoder are equally wide.
        self._head_dim = attentions[0].head_dim
        self._tables = self._made_tables(0)
        self.has_own_threads = "native" in builder.paths.values()
        """Whether some kernels use their own threads, next to torch's."""

    def cache(self, context: int, batch: int = 1) -> KeyValueCache:
        """An empty key-value cache for up to `context` positions."""
        return KeyValueCache(self.description, context, dtype=self.dtype, device=self.device, batch=batch)

    def __call__(self, input_ids: torch.Tensor, cache: KeyValueCache | None = None, *, last_only: bool = False) -> torch.Tensor:
        """Logits `[batch, tokens, vocab_size]` for `input_ids` int64 `[batch, tokens]` on the decoder's device.

        With a cache the tokens continue what it holds, and are added to it. `last_only` computes the logits of the last
        token alone, `[batch, 1, vocab_size]`: the head is the largest matrix.
        """
        threads.ready_after_fork()
        x = self.stream(input_ids, cache)
        return self.head(self.norm(x[:, -1:] if last_only else x))

    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Inputs of the first layer, `[batch, tokens, hidden_size]`."""
        rows = self.embedding.embedding(input_ids)
        scale = self.description.embedding_scale
        return rows if scale == 1.0 else rows * scale

    def stream(self, input_ids: torch.Tensor, cache: KeyValueCache | None = None) -> torch.Tensor:
        """Outputs of the last layer, before the last norm, `[batch, tokens, hidden_size]`; arguments as for logits."""
        start = 0 if cache is None else cache.length
        positions = self.positions(start, input_ids.shape[1])
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x, positions, cache)
        if cache is not None:
            cache.length = start + input_ids.shape[1]
        return x

    def positions(self, start: int, tokens: int) -> Positions:
        """Positions of `tokens` tokens from position `start` on."""
        end = start + tokens
        if end > len(self._tables[0][0]):
            self._tables = self._made_tables(end)
        masks = {window: self._mask(start, tokens, window) for window in self._windows} if tokens > 1 or start == 0 else {}
        return Positions([(cosines[start:end], sines[start:end]) for cosines, sines in self._tables], start, masks)

    def _mask(self, start: int, tokens: int, window: int | None) -> torch.Tensor | None:
        end = start + tokens
        if start == 0 and (window is None or end <= window):
            return None
        queries = torch.arange(start, end, device=self.device)[:, None]
        keys = torch.arange(end, device=self.device)[None, :]
        attended = keys <= queries
        return attended if window is None else attended & (keys > queries - window)

    def _made_tables(self, positions: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        # Doubling keeps a long generation from making the tables again at every token.
        length = max(256, 1 << (positions - 1).bit_length()) if positions else 256
        ropes, width = self.description.ropes, self._head_dim
        return [rope_tables(rope, width, length, dtype=self.dtype, device=self.device) for rope in ropes]


def _linear(model: Model, builder: MatrixBuilder, linear: architectures.Linear) -> Matrix:
    return builder.build(model.tensors[linear.weight], model.tensors.get(f"{linear.name}.bias"))


def _norm(model: Model, builder: MatrixBuilder, norm: architectures.Norm | None) -> RMSNorm | None:
    return None if norm is None else RMSNorm(builder.norm(model.tensors[norm.weight]), norm.eps, norm.offset)
