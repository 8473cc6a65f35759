"""What computes a model: the interface of the two engines, and how one is chosen.

The native engine (`native_engine`) runs a whole decoding step in one call of C and needs no torch. The torch engine
(`torch_engine`) runs the decoder operation by operation on any device and in any dtype. Each takes one sequence of token ids
at a time, with a key-value cache of its own.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from cluscomp_formats.architectures import DecoderDescription
from cluscomp_formats.ir import Model

__all__ = ["Engine", "EngineName", "Ids", "Logits"]

EngineName = Literal["native", "torch"]
Ids = npt.NDArray[np.signedinteger[Any]]
Logits = npt.NDArray[np.floating[Any]]


class Engine(Protocol):
    """A decoder ready to run. `kernels` is the kernel of each matrix, by tensor name.

    Logits are float64 if `dtype` is "float64", else float32. Where there is no memory, methods raise MemoryError or torch's
    RuntimeError.
    """

    @property
    def name(self) -> EngineName: ...

    @property
    def description(self) -> DecoderDescription: ...

    @property
    def kernels(self) -> Mapping[str, str]: ...

    @property
    def kernel(self) -> str:
        """The kernel that was asked for."""
        ...

    @property
    def device(self) -> str:
        """The device's name, as torch writes it."""
        ...

    @property
    def dtype(self) -> str:
        """The name of the dtype of activations, without `torch.`."""
        ...

    @property
    def arithmetic(self) -> str:
        """The name of the precision of products, which a self-test allows for; see `selftest`."""
        ...

    @property
    def threads(self) -> int | None:
        """The number of threads that was asked for."""
        ...

    @property
    def cache_dtype(self) -> str | None:
        """The dtype of keys and values; None if it is that of activations."""
        ...

    def cache(self, capacity: int) -> Any:
        """An empty key-value cache for up to `capacity` positions."""
        ...

    def logits(self, ids: Ids, cache: Any, *, last_only: bool = False) -> Logits:
        """Logits `[tokens, vocab_size]` of `ids` `[tokens]`, or `[1, vocab_size]` of the last one.

        The ids continue what the cache holds, are added to it and fit it.
        """
        ...

    def forward(self, batch: Ids) -> Logits:
        """Logits `[batch, tokens, vocab_size]` for `[batch, tokens]`, without a cache."""
        ...

    def update(self, model: Model, names: Collection[str]) -> None:
        """Take the parameters with these names (see `cluscomp_formats.parameters`) from `model`.

        `model` must be the one that the engine was made for, except for the values of these parameters.
        """
        ...
