"""torch modules with clustered weights, which replace `Linear`, `Conv1D` and `Embedding`.

They keep the weight as the lazy tensor of the IR and prepare a kernel for their device and dtype, again after `.to(...)`. The
weight itself cannot be trained, but gradients pass through a linear to its input and bias, so that adapters and earlier layers
can be. The backward pass decodes the weight temporarily.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from cluscomp_formats.ir import Array, ClusteredWeight, Outliers
from cluscomp_runtime.hf.weight_view import WeightView, refuse_write
from cluscomp_runtime.linear import ClusLinear, Matrix, MatrixBuilder

__all__ = ["ClusteredEmbedding", "ClusteredLinear", "ClusteredModule", "MatrixStore", "transposed"]


class MatrixStore:
    """A cache of prepared matrices, which modules with the same weight, device and dtype share, such as a tied head.

    A matrix is freed with the last module that uses it.
    """

    def __init__(self) -> None:
        self._builders: weakref.WeakValueDictionary[Any, MatrixBuilder] = weakref.WeakValueDictionary()
        self._matrices: weakref.WeakValueDictionary[Any, Matrix] = weakref.WeakValueDictionary()

    def __deepcopy__(self, memo: dict[int, Any]) -> MatrixStore:
        """Return the same object: its matrices never change, so copies of a model can share them."""
        return self

    def __reduce__(self) -> tuple[type[MatrixStore], tuple[()]]:
        """Unpickle as an empty cache."""
        return MatrixStore, ()

    def builder(self, device: torch.device, dtype: torch.dtype) -> MatrixBuilder:
        """Return the builder for a device and dtype. It is shared, with its codebooks, as long as a module refers to it."""
        found = self._builders.get((device, dtype))
        if found is None:
            found = MatrixBuilder(kernel="auto", dtype=dtype, device=device)
            self._builders[device, dtype] = found
        return found

    def matrix(self, weight: ClusteredWeight, builder: MatrixBuilder) -> Matrix:
        """Return the weight prepared by `builder`, from the cache if possible."""
        # A transposed weight is a different matrix with the same name.
        key = (weight.name, weight.shape, weight.group_axis, builder.device, builder.dtype)
        found = self._matrices.get(key)
        if found is None:
            found = builder.build(weight)
            self._matrices[key] = found
        return found


class ClusteredModule(nn.Module):
    """A module with a clustered weight `[out_features, in_features]`, prepared for the module's device and dtype.

    `kernel` names the kernel in use. The weight is not a parameter; `weight` is a view that is decoded when it is read.
    """

    def __init__(self, clustered: ClusteredWeight, store: MatrixStore, dtype: torch.dtype, device: torch.device) -> None:
        nn.Module.__init__(self)
        self.clustered = clustered
        # True if the replaced module is a `Conv1D`, whose parameter is the transpose of the weight.
        self.transposed = False
        self._store = store
        self._builder: MatrixBuilder | None = None
        self._matrix: Matrix | None = None
        self._decoded: torch.Tensor | None = None
        self._reads = 0
        # Keeps transformers from initializing the module.
        self._is_hf_initialized = True
        # Tracks the module's device and dtype: moving a model moves its buffers.
        self.register_buffer("_placement", torch.empty(0, dtype=dtype, device=device), persistent=False)
        self._placement: torch.Tensor

    @property
    def stored_shape(self) -> tuple[int, int]:
        """Shape of the parameter of the replaced module."""
        rows, columns = self.clustered.shape
        return (columns, rows) if self.transposed else (rows, columns)

    def matrix(self) -> Matrix:
        """Return the weight prepared for the module's device and dtype."""
        if self._matrix is None:
            # The matrix is also used in training, so it must not consist of inference tensors even if this call is made under
            # torch.inference_mode.
            with torch.inference_mode(mode=False), torch.no_grad():
                self._builder = self._store.builder(self._placement.device, self._placement.dtype)
                self._matrix = self._store.matrix(self.clustered, self._builder)
        return self._matrix

    @property
    def kernel(self) -> str:
        return self.matrix().path

    @property
    def weight(self) -> torch.Tensor:
        """A view of the decoded weight `[out_features, in_features]`; reading its values decodes it."""
        return WeightView(self)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            refuse_write(self)
        super().__setattr__(name, value)

    def requires_grad_(self, requires_grad: bool = True) -> ClusteredModule:
        """Warn that the weight is not trained, which PEFT's `modules_to_save` would expect; otherwise as for any module."""
        if requires_grad:
            warnings.warn(f"{self.clustered.name} is clustered: it is not trained", stacklevel=2)
        super().requires_grad_(requires_grad)
        return self

    def decoded(self) -> torch.Tensor:
        """Return the decoded weight. It is kept from the second call on, with a warning: such code reads it in every step."""
        if self._decoded is not None:
            return self._decoded
        values = self._decode()
        self._reads += 1
        if self._reads > 1 and not values.is_meta:
            self._decoded = values
            warnings.warn(
                f"{self.clustered.name}: the values of this clustered weight are read repeatedly, so its decoded values are "
                f"kept, {values.nbytes} bytes",
                stacklevel=2,
            )
        return values

    def _decode(self) -> torch.Tensor:
        if self._placement.is_meta:
            return self._placement.new_empty(self.clustered.shape)
        return torch.from_numpy(self.clustered.decode()).to(self._placement)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> ClusteredModule:
        before = (self._placement.device, self._placement.dtype)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if (self._placement.device, self._placement.dtype) != before:
            self._forget()
        return self

    def _forget(self) -> None:
        self._matrix = self._builder = self._decoded = None
        self._reads = 0

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the matrix: a copy gets it from the cache again, and a matrix with sparse outliers cannot be copied."""
        return {**self.__dict__, "_matrix": None, "_builder": None, "_decoded": None}

    def extra_repr(self) -> str:
        weight = self.clustered
        stages = ", ".join(f"{stage.codebook.num_clusters}x{stage.codebook.cluster_dim}" for stage in weight.stages)
        return f"out_features={weight.shape[0]}, in_features={weight.shape[1]}, codebooks={stages}"


class ClusteredLinear(ClusteredModule, nn.Linear):  # type: ignore[override]
    """`y = x W^T + bias` for `x [..., in_features]`.

    It derives from `Linear`, so that PEFT and other libraries recognize it.
    """

    def __init__(
        self,
        clustered: ClusteredWeight,
        store: MatrixStore,
        dtype: torch.dtype,
        device: torch.device,
        bias: nn.Parameter | None = None,
    ) -> None:
        super().__init__(clustered, store, dtype, device)
        self.out_features, self.in_features = clustered.shape
        self.register_parameter("bias", bias)
        self.bias: nn.Parameter | None  # type: ignore[assignment]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        matrix = self.matrix()
        # torch differentiates a decoded matrix by itself.
        if torch.is_grad_enabled() and x.requires_grad and isinstance(matrix, ClusLinear):
            y: torch.Tensor = _Multiply.apply(x, self)  # type: ignore[no-untyped-call]
        else:
            y = matrix(x)
        return y if self.bias is None else y + self.bias


class _Multiply(torch.autograd.Function):
    """`x W^T` on the module's kernel; the gradient of `x` is `grad W`, with `W` decoded again rather than kept."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, module: ClusteredLinear) -> torch.Tensor:
        ctx.module, ctx.dtype = module, x.dtype
        return module.matrix()(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        module: ClusteredLinear = ctx.module
        rows = torch.arange(module.out_features, device=grad.device)
        # Decodes on the device of the codes, with the kernel for embeddings.
        weight = module.matrix().embedding(rows)
        return (grad @ weight.to(grad.dtype)).to(ctx.dtype), None


class ClusteredEmbedding(ClusteredModule, nn.Embedding):  # type: ignore[override]
    """Rows of the weight: `ids [...] -> [..., embedding_dim]`. It derives from `Embedding`, so that libraries recognize it."""

    def __init__(
        self,
        clustered: ClusteredWeight,
        store: MatrixStore,
        dtype: torch.dtype,
        device: torch.device,
        padding_idx: int | None = None,
    ) -> None:
        super().__init__(clustered, store, dtype, device)
        self.num_embeddings, self.embedding_dim = clustered.shape
        self.padding_idx = padding_idx
        self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse = None, 2.0, False, False

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.matrix().embedding(ids)


def transposed(weight: ClusteredWeight) -> ClusteredWeight:
    """Return the transpose of a clustered weight: the same codes, with groups along the other axis.

    Converts the weight `[in_features, out_features]` of a `Conv1D` to the `[out_features, in_features]` of a linear.
    """
    rows, columns = weight.shape
    outliers = weight.outliers
    if outliers is not None:
        outliers = _transposed_outliers(outliers, rows, columns)
    return replace(
        weight,
        shape=(columns, rows),
        group_axis="in" if weight.group_axis == "out" else "out",
        row_scale=weight.column_scale,
        column_scale=weight.row_scale,
        outliers=outliers,
    )


def _transposed_outliers(outliers: Outliers, rows: int, columns: int) -> Outliers:
    positions = outliers.positions.read()
    moved = (positions % columns) * rows + positions // columns
    order = np.argsort(moved)
    values = Array.of(outliers.values.read()[order], outliers.values.dtype)
    return Outliers(Array.of(moved[order].astype(positions.dtype)), values)
