"""The torch engine: the decoder, operation by operation, on any device and in any dtype."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Literal

import numpy as np
import torch

from cluscomp_formats.architectures import DecoderDescription
from cluscomp_formats.ir import DenseTensor, Model, Tensor
from cluscomp_kernels import threads
from cluscomp_runtime.decoder import Decoder
from cluscomp_runtime.devices import check_device, compute_dtype
from cluscomp_runtime.engine import Ids, Logits
from cluscomp_runtime.linear import MatrixBuilder, check_kernel
from cluscomp_runtime.memory import check_memory, memory_faults

__all__ = ["TorchEngine", "held_bytes"]


class TorchEngine:
    """Runs a model that `check_tensors` has passed.

    `device`, `dtype` and `kernel` are as in `LanguageModel.from_model`; `warn` says whether to announce matrices without a
    kernel. Raises UnsupportedError, InvalidFileError and InvalidRequestError.
    """

    name: Literal["torch"] = "torch"
    threads: None = None
    cache_dtype: None = None

    def __init__(
        self,
        model: Model,
        description: DecoderDescription,
        *,
        device: str | torch.device = "cpu",
        dtype: str | torch.dtype | None = None,
        kernel: str = "auto",
        warn: bool = True,
    ) -> None:
        target = check_device(device)
        self.builder = MatrixBuilder(check_kernel(kernel, target), compute_dtype(dtype, target), target)
        self.description = description
        if target.type == "cpu":
            # Kernels for codes compute in float32.
            decoded = kernel in ("dense", "reference") or self.builder.dtype == torch.float64
            held = partial(held_bytes, itemsize=self.builder.dtype.itemsize, decoded=decoded)
            check_memory(model, held, one_at_a_time=kernel == "reference")
        with memory_faults():
            self.decoder = Decoder(model, description, self.builder)
        self.kernels = dict(self.builder.paths)
        if warn:
            self.builder.warn_without_kernel()
        if self.decoder.has_own_threads:
            threads.warn_of_polling()

    @property
    def kernel(self) -> str:
        return self.builder.kernel

    @property
    def device(self) -> str:
        return str(self.builder.device)

    @property
    def dtype(self) -> str:
        return str(self.builder.dtype).removeprefix("torch.")

    @property
    def arithmetic(self) -> str:
        return self.dtype

    def cache(self, capacity: int) -> Any:
        return self.decoder.cache(capacity)

    def logits(self, ids: Ids, cache: Any, *, last_only: bool = False) -> Logits:
        rows = torch.from_numpy(ids.astype(np.int64))[None].to(self.builder.device)
        with torch.inference_mode(), self._threads(len(ids)):
            return _array(self.decoder(rows, cache, last_only=last_only)[0])

    def forward(self, batch: Ids) -> Logits:
        return _array(self.forward_tensor(torch.from_numpy(batch.astype(np.int64))))

    def forward_tensor(self, batch: torch.Tensor) -> torch.Tensor:
        """The same for an int64 tensor, on the engine's device and in its dtype."""
        with torch.inference_mode():
            return self.decoder(batch.to(self.builder.device))

    def update(self, model: Model, names: Collection[str]) -> None:
        self.builder.update(model, names)

    def _threads(self, tokens: int) -> AbstractContextManager[None]:
        # For a single token, torch's operations are small, and its polling threads would slow down the kernels.
        single = threads.torch_polls and tokens == 1 and self.decoder.has_own_threads
        return threads.single_threaded_torch() if single else nullcontext()


def _array(logits: torch.Tensor) -> Logits:
    array: Logits = logits.to("cpu", torch.promote_types(logits.dtype, torch.float32)).numpy()
    return array


def held_bytes(tensor: Tensor, *, itemsize: int, decoded: bool) -> int:
    """Bytes of memory that a tensor takes: as codes, or with `itemsize` bytes per weight where it is dense or `decoded`."""
    if isinstance(tensor, DenseTensor) or decoded or tensor.group_axis == "in":
        return tensor.num_weights * itemsize
    # Kernels store a code in one or two bytes.
    return 2 * sum(stage.codes.size for stage in tensor.stages)
