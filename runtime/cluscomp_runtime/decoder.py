"""The Llama-family decoder: Llama, Mistral, Qwen2, Qwen3 and what shares their layout.

Written for one sequence at a time on a CPU, where each torch call costs microseconds: few operations per layer, a static
key-value cache written in place, rotary tables made once. Any batch of equally long sequences works too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from cluscomp_formats.ir import Model
from cluscomp_kernels import threads
from cluscomp_runtime.architecture import DecoderSettings
from cluscomp_runtime.linear import Matrix, MatrixBuilder
from cluscomp_runtime.rope import apply_rope, rope_tables

__all__ = ["Decoder", "KeyValueCache"]

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


class KeyValueCache:
    """Keys and values of all layers for up to `context` positions, allocated once.

    `keys` and `values` are lists by layer of `[batch, num_kv_heads, context, head_dim]`, filled up to `length`.
    """

    def __init__(
        self, settings: DecoderSettings, context: int, *, dtype: torch.dtype, device: torch.device, batch: int = 1
    ) -> None:
        shape = (batch, settings.num_kv_heads, context, settings.head_dim)
        layers = range(settings.num_layers)
        self.keys = [torch.empty(shape, dtype=dtype, device=device) for _ in layers]
        self.values = [torch.empty(shape, dtype=dtype, device=device) for _ in layers]
        self.context = context
        self.length = 0

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(part.nbytes for part in (*self.keys, *self.values))


class RMSNorm:
    """`x / sqrt(mean(x^2) + eps) * weight`, computed in the weight's dtype, returned in that of `x`."""

    def __init__(self, weight: torch.Tensor, eps: float) -> None:
        self.weight = weight
        self.eps = eps

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        # `to` returns the tensor itself where the dtype already fits.
        return F.rms_norm(x.to(self.weight.dtype), self.weight.shape, self.weight, self.eps).to(x.dtype)


@dataclass
class Positions:
    """What the layers need to know about the tokens of one pass."""

    cosines: torch.Tensor
    sines: torch.Tensor
    start: int
    masks: dict[int | None, torch.Tensor | None]
    """Boolean mask `[tokens, keys]` (true: attend) by sliding window; None where plain causal attention does."""


class Attention:
    """Grouped-query attention with rotary positions, optionally with normed queries and keys or a sliding window."""

    def __init__(self, model: Model, settings: DecoderSettings, index: int, builder: MatrixBuilder) -> None:
        prefix = f"model.layers.{index}.self_attn"
        self.query = _linear(model, builder, f"{prefix}.q_proj")
        self.key = _linear(model, builder, f"{prefix}.k_proj")
        self.value = _linear(model, builder, f"{prefix}.v_proj")
        self.output = _linear(model, builder, f"{prefix}.o_proj")
        self.query_norm = self.key_norm = None
        if settings.qk_norm:
            self.query_norm = _norm(model, settings, builder, f"{prefix}.q_norm")
            self.key_norm = _norm(model, settings, builder, f"{prefix}.k_norm")
        self.index = index
        self.heads, self.kv_heads, self.head_dim = settings.num_heads, settings.num_kv_heads, settings.head_dim
        self.window = settings.windows[index]

    def __call__(self, x: torch.Tensor, positions: Positions, cache: KeyValueCache | None) -> torch.Tensor:
        return self.output(self.mix(x, positions, cache))

    def mix(self, x: torch.Tensor, positions: Positions, cache: KeyValueCache | None) -> torch.Tensor:
        """What the heads give, before the output matrix, `[batch, tokens, heads * head_dim]`."""
        batch, tokens, _ = x.shape
        queries, keys = self.query(x), self.key(x)
        if self.query_norm is not None and self.key_norm is not None:
            queries = self.query_norm(queries.view(batch, tokens, self.heads, self.head_dim)).flatten(2)
            keys = self.key_norm(keys.view(batch, tokens, self.kv_heads, self.head_dim)).flatten(2)
        # One rotation for queries and keys together: half the calls.
        both = torch.cat((queries, keys), dim=-1).view(batch, tokens, self.heads + self.kv_heads, self.head_dim)
        both = apply_rope(both, positions.cosines, positions.sines).transpose(1, 2)
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
            queries, keys, values, attn_mask=mask, is_causal=mask is None, enable_gqa=self.heads != self.kv_heads
        )
        return mixed.transpose(1, 2).reshape(batch, tokens, -1)

    def _attend_one(self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, end: int) -> torch.Tensor:
        """Attention of one token: heads that share a key act as so many queries, so that keys are not repeated."""
        batch = queries.shape[0]
        begin = 0 if self.window is None else max(0, end - self.window)
        grouped = queries.reshape(batch, self.kv_heads, self.heads // self.kv_heads, self.head_dim)
        mixed = F.scaled_dot_product_attention(grouped, keys[:, :, begin:end], values[:, :, begin:end])
        return mixed.reshape(batch, 1, -1)


class FeedForward:
    """The gated MLP: `down(activation(gate(x)) * up(x))`."""

    def __init__(self, model: Model, settings: DecoderSettings, index: int, builder: MatrixBuilder) -> None:
        prefix = f"model.layers.{index}.mlp"
        self.gate = _linear(model, builder, f"{prefix}.gate_proj")
        self.up = _linear(model, builder, f"{prefix}.up_proj")
        self.down = _linear(model, builder, f"{prefix}.down_proj")
        self.activation = ACTIVATIONS[settings.activation]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.mix(x))

    def mix(self, x: torch.Tensor) -> torch.Tensor:
        """The gated features, before the matrix that takes them down, `[batch, tokens, intermediate_size]`."""
        return self.activation(self.gate(x)) * self.up(x)


class DecoderLayer:
    """One block: attention and feed-forward, each normed first and added to the stream."""

    def __init__(self, model: Model, settings: DecoderSettings, index: int, builder: MatrixBuilder) -> None:
        prefix = f"model.layers.{index}"
        self.attention_norm = _norm(model, settings, builder, f"{prefix}.input_layernorm")
        self.attention = Attention(model, settings, index, builder)
        self.feed_forward_norm = _norm(model, settings, builder, f"{prefix}.post_attention_layernorm")
        self.feed_forward = FeedForward(model, settings, index, builder)

    def __call__(self, x: torch.Tensor, positions: Positions, cache: KeyValueCache | None) -> torch.Tensor:
        x = x + self.attention(self.attention_norm(x), positions, cache)
        return x + self.feed_forward(self.feed_forward_norm(x))


class Decoder:
    """The network. Expects a model that `architecture.check_tensors` has passed."""

    def __init__(self, model: Model, settings: DecoderSettings, builder: MatrixBuilder) -> None:
        threads.ready_after_fork()
        self.settings = settings
        self.dtype, self.device = builder.dtype, builder.device
        self.embedding = builder.build(model.tensors["model.embed_tokens.weight"])
        self.layers = [DecoderLayer(model, settings, index, builder) for index in range(settings.num_layers)]
        self.norm = _norm(model, settings, builder, "model.norm")
        head = model.tensors.get("lm_head.weight")
        self.head = self.embedding if head is None else builder.build(head)
        self._cosines, self._sines = self._tables(0)
        self.has_own_threads = "native" in builder.paths.values()
        """Whether kernels with threads of their own multiply, beside torch's."""

    def cache(self, context: int, batch: int = 1) -> KeyValueCache:
        """An empty key-value cache for up to `context` positions."""
        return KeyValueCache(self.settings, context, dtype=self.dtype, device=self.device, batch=batch)

    def __call__(self, input_ids: torch.Tensor, cache: KeyValueCache | None = None, *, last_only: bool = False) -> torch.Tensor:
        """Logits `[batch, tokens, vocab_size]` for `input_ids` int64 `[batch, tokens]` on the decoder's device.

        With a cache the tokens continue what it holds, and are added to it. `last_only` computes the logits of the last
        token alone, `[batch, 1, vocab_size]`: the head is the largest matrix.
        """
        threads.ready_after_fork()
        x = self.stream(input_ids, cache)
        return self.head(self.norm(x[:, -1:] if last_only else x))

    def stream(self, input_ids: torch.Tensor, cache: KeyValueCache | None = None) -> torch.Tensor:
        """What flows out of the last layer, before the last norm, `[batch, tokens, hidden_size]`; arguments as for logits."""
        start = 0 if cache is None else cache.length
        positions = self.positions(start, input_ids.shape[1])
        x = self.embedding.embedding(input_ids)
        for layer in self.layers:
            x = layer(x, positions, cache)
        if cache is not None:
            cache.length = start + input_ids.shape[1]
        return x

    def positions(self, start: int, tokens: int) -> Positions:
        """What the layers need for `tokens` tokens from position `start` on."""
        end = start + tokens
        if end > len(self._cosines):
            self._cosines, self._sines = self._tables(end)
        windows = set(self.settings.windows)
        masks = {window: self._mask(start, tokens, window) for window in windows} if tokens > 1 or start == 0 else {}
        return Positions(self._cosines[start:end], self._sines[start:end], start, masks)

    def _mask(self, start: int, tokens: int, window: int | None) -> torch.Tensor | None:
        end = start + tokens
        if start == 0 and (window is None or end <= window):
            return None
        queries = torch.arange(start, end, device=self.device)[:, None]
        keys = torch.arange(end, device=self.device)[None, :]
        attended = keys <= queries
        return attended if window is None else attended & (keys > queries - window)

    def _tables(self, positions: int) -> tuple[torch.Tensor, torch.Tensor]:
        # Doubling keeps a long generation from making the tables again at every token.
        length = max(256, 1 << (positions - 1).bit_length()) if positions else 256
        return rope_tables(self.settings.rope, self.settings.head_dim, length, dtype=self.dtype, device=self.device)


def _linear(model: Model, builder: MatrixBuilder, name: str) -> Matrix:
    return builder.build(model.tensors[f"{name}.weight"], model.tensors.get(f"{name}.bias"))


def _norm(model: Model, settings: DecoderSettings, builder: MatrixBuilder, name: str) -> RMSNorm:
    return RMSNorm(builder.norm(model.tensors[f"{name}.weight"]), settings.rms_norm_eps)
