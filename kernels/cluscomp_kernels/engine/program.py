"""A decoder for the engine, built from its parts, and running it."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from cluscomp_kernels.engine import structures
from cluscomp_kernels.engine.structures import functions
from cluscomp_kernels.engine.weights import VALUE_TYPES, EngineLinear, EngineNorm, best_variant

__all__ = [
    "ACTIVATIONS",
    "CACHE_TYPES",
    "Attention",
    "Branch",
    "Cache",
    "CacheType",
    "Experts",
    "FeedForward",
    "Pool",
    "Program",
    "default_threads",
]

Floats = npt.NDArray[np.float32]
CacheType = Literal["float32", "float16", "int8"]
CACHE_TYPES: tuple[CacheType, ...] = ("float32", "float16", "int8")

ACTIVATIONS = ("silu", "gelu", "gelu_tanh")
"""By their numbers in engine.h."""
_NO_LOGITS, _LAST_LOGITS, _ALL_LOGITS = range(3)


def default_threads() -> int:
    """Cores that this process may use, or OMP_NUM_THREADS if that is set to a number."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    if asked.isdecimal() and int(asked):
        return int(asked)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class Attention:
    """See `cluscomp_formats.architectures.Attention`; `rope` is an index of the program's frequencies."""

    query: EngineLinear
    key: EngineLinear
    value: EngineLinear
    output: EngineLinear
    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    rope: int = 0
    window: int | None = None
    query_norm: EngineNorm | None = None
    key_norm: EngineNorm | None = None


@dataclass(frozen=True)
class FeedForward:
    """`down(activation(gate(x)) * up(x))`."""

    gate: EngineLinear
    up: EngineLinear
    down: EngineLinear
    activation: str


@dataclass(frozen=True)
class Experts:
    """Feed-forward networks of which each token takes `top_k`; their activations are the same."""

    router: EngineLinear
    experts: Sequence[FeedForward]
    top_k: int
    normalised: bool


@dataclass(frozen=True)
class Branch:
    """`stream + post_norm(part(norm(stream)))`."""

    norm: EngineNorm
    part: Attention | FeedForward | Experts
    post_norm: EngineNorm | None = None


class Cache:
    """Keys and values of a program's attentions, for up to `capacity` positions."""

    def __init__(self, program: Program, capacity: int, value_type: CacheType) -> None:
        self.capacity = capacity
        self.program = program
        handle = functions().cache_new(program.handle, capacity, VALUE_TYPES[value_type])
        if not handle:
            raise MemoryError(f"no memory for keys and values of {capacity} positions")
        self.handle = handle

    @property
    def length(self) -> int:
        """Positions filled."""
        return functions().cache_length(self.handle)

    def truncate(self, length: int) -> None:
        """Forget the positions from `length` on."""
        functions().cache_truncate(self.handle, length)

    def __del__(self) -> None:
        if getattr(self, "handle", None):
            functions().cache_free(self.handle)


class Program:
    """A decoder in the engine. `ropes` are the inverse frequencies, float64 `[head_dim / 2]` each.

    Runs of several Python threads take turns. `variant` is a number of `VARIANTS`, the one the codebooks were made for.
    """

    def __init__(
        self,
        *,
        embedding: EngineLinear,
        branches: Sequence[Branch],
        norm: EngineNorm,
        head: EngineLinear,
        ropes: Sequence[npt.NDArray[np.float64]],
        embedding_scale: float = 1.0,
        variant: int,
        threads: int | None = None,
    ) -> None:
        self.vocab_size, self.hidden_size = embedding.out_features, embedding.in_features
        self.threads = threads or default_threads()
        self._kept: list[Any] = [embedding, branches, norm, head]
        self._lock = threading.Lock()
        frequencies = [np.ascontiguousarray(rope, dtype=np.float64) for rope in ropes]
        addresses = (ctypes.c_void_p * len(frequencies))(*(rope.ctypes.data for rope in frequencies))
        table = (structures.Branch * len(branches))(*(self._branch(branch) for branch in branches))
        self._decoder = structures.Decoder(
            branches=ctypes.cast(table, ctypes.POINTER(structures.Branch)),
            embedding=self._linears([embedding]),
            head=self._linears([head]),
            inverse_frequencies=ctypes.cast(addresses, ctypes.POINTER(ctypes.c_void_p)),
            norm=norm.structure,
            num_branches=len(branches),
            hidden_size=self.hidden_size,
            vocab_size=self.vocab_size,
            embedding_scale=embedding_scale,
            num_ropes=len(frequencies),
        )
        self._kept += [frequencies, addresses, table]
        handle = functions().engine_new(self._decoder, variant, self.threads)
        if not handle:
            raise MemoryError("no memory for the engine")
        self.handle = handle

    def cache(self, capacity: int, value_type: CacheType = "float32") -> Cache:
        """An empty cache. Raises MemoryError."""
        return Cache(self, capacity, value_type)

    def logits(self, ids: npt.ArrayLike, cache: Cache, *, last_only: bool = True) -> Floats:
        """Logits `[1, vocab_size]` of the last of `ids`, or `[tokens, vocab_size]`, after what the cache holds.

        The ids are added to the cache. Raises ValueError if there are none, one is outside the vocabulary, or they do not fit
        the cache; MemoryError.
        """
        tokens = self._checked(ids, cache)
        logits = np.empty((1 if last_only else len(tokens), self.vocab_size), dtype=np.float32)
        wanted = _LAST_LOGITS if last_only else _ALL_LOGITS
        with self._lock:
            failed = functions().engine_run(
                self.handle, cache.handle, tokens.ctypes.data, len(tokens), wanted, logits.ctypes.data
            )
        if failed:
            raise MemoryError("no memory for the engine's buffers")
        return logits

    def stream(self, ids: npt.ArrayLike, branches: int) -> Floats:
        """The residual stream `[tokens, hidden_size]` after the first `branches` branches; 0 gives the embedding."""
        tokens = np.ascontiguousarray(ids, dtype=np.int32)
        cache = self.cache(len(tokens))
        stream = np.empty((len(self._checked(tokens, cache)), self.hidden_size), dtype=np.float32)
        with self._lock:
            failed = functions().engine_stream(
                self.handle, cache.handle, tokens.ctypes.data, len(tokens), branches, stream.ctypes.data
            )
        if failed:
            raise MemoryError("no memory for the engine's buffers")
        return stream

    def _checked(self, ids: npt.ArrayLike, cache: Cache) -> npt.NDArray[np.int32]:
        tokens = np.ascontiguousarray(ids, dtype=np.int32)
        if tokens.ndim != 1 or not len(tokens) or int(tokens.min()) < 0 or int(tokens.max()) >= self.vocab_size:
            raise ValueError(f"ids must be 1-D, at least one, and from 0 to {self.vocab_size - 1}")
        if cache.program is not self or cache.length + len(tokens) > cache.capacity:
            raise ValueError(f"{len(tokens)} ids do not fit a cache of {cache.capacity} positions with {cache.length} filled")
        return tokens

    def _linears(self, linears: Sequence[EngineLinear]) -> Any:
        array = (structures.Linear * len(linears))(*(linear.structure for linear in linears))
        self._kept += [array, linears]
        return ctypes.cast(array, ctypes.POINTER(structures.Linear))

    def _branch(self, branch: Branch) -> structures.Branch:
        made = structures.Branch(norm=branch.norm.structure)
        if branch.post_norm is not None:
            made.post_norm = branch.post_norm.structure
        part = branch.part
        if isinstance(part, Attention):
            made.kind = 0
            for name in ("query", "key", "value", "output"):
                setattr(made, name, self._linears([getattr(part, name)]))
            for name in ("heads", "kv_heads", "head_dim", "rope", "scale"):
                setattr(made, name, getattr(part, name))
            made.window = part.window or 0
            if part.query_norm is not None:
                made.query_norm = part.query_norm.structure
            if part.key_norm is not None:
                made.key_norm = part.key_norm.structure
            return made
        experts = part.experts if isinstance(part, Experts) else [part]
        for name in ("gate", "up", "down"):
            setattr(made, name, self._linears([getattr(expert, name) for expert in experts]))
        made.kind = 2 if isinstance(part, Experts) else 1
        made.activation = ACTIVATIONS.index(experts[0].activation)
        if isinstance(part, Experts):
            made.router = self._linears([part.router])
            made.num_experts, made.top_k, made.normalised = len(experts), part.top_k, part.normalised
        return made

    def __del__(self) -> None:
        if getattr(self, "handle", None):
            functions().engine_free(self.handle)


class Pool:
    """Threads and kernels for linears alone."""

    def __init__(self, variant: int | None = None, threads: int | None = None) -> None:
        handle = functions().pool_new(best_variant() if variant is None else variant, threads or default_threads())
        if not handle:
            raise MemoryError("no memory for threads")
        self.handle = handle
        self._lock = threading.Lock()

    def apply(self, linear: EngineLinear, x: Floats) -> Floats:
        """`x W^T + bias`, float32 `[tokens, out_features]`, for float32 `x` `[tokens, in_features]`. Raises MemoryError."""
        y = np.empty((len(x), linear.out_features), dtype=np.float32)
        x = np.ascontiguousarray(x, dtype=np.float32)
        with self._lock:
            failed = functions().linear_apply(self.handle, linear.structure, x.ctypes.data, len(x), y.ctypes.data)
        if failed:
            raise MemoryError("no memory for activations")
        return y

    def read(self, data: npt.NDArray[np.uint8]) -> None:
        """Read all of `data` once with all threads: what memory can give at most."""
        functions().pool_read(self.handle, data.ctypes.data, data.nbytes)

    def rows(self, linear: EngineLinear, ids: npt.NDArray[np.int64]) -> Floats:
        """Rows `[len(ids), in_features]` of the weight. Raises IndexError."""
        ids = np.ascontiguousarray(ids, dtype=np.int64)
        if len(ids) and not (int(ids.min()) >= 0 and int(ids.max()) < linear.out_features):
            raise IndexError(f"ids go from {ids.min()} to {ids.max()}, expected 0 to {linear.out_features - 1}")
        rows = np.empty((len(ids), linear.in_features), dtype=np.float32)
        functions().linear_rows(self.handle, linear.structure, ids.ctypes.data, len(ids), rows.ctypes.data)
        return rows

    def __del__(self) -> None:
        if getattr(self, "handle", None):
            functions().pool_free(self.handle)
