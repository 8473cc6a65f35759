"""torch modules over clustered weights, in place of `Linear`, `Conv1D` and `Embedding`.

They keep the weight as the lazy tensor of the IR and prepare a kernel for the device and dtype they are on, anew after
`.to(...)`. The weight itself is never trained; gradients pass through a linear to its input and to its bias, so that whatever
lies before or beside it can be: the backward pass decodes the weight for the time it needs it.
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
    """Prepares matrices, each once for all modules that use it on one device in one dtype: a tied head is the embedding's.

    Forgets a matrix when the last module that uses it does.
    """

    def __init__(self) -> None:
        self._builders: weakref.WeakValueDictionary[Any, MatrixBuilder] = weakref.WeakValueDictionary()
        self._matrices: weakref.WeakValueDictionary[Any, Matrix] = weakref.WeakValueDictionary()

    def __deepcopy__(self, memo: dict[int, Any]) -> MatrixStore:
        """A cache of what never changes serves copies of a model as well."""
        return self

    def __reduce__(self) -> tuple[type[MatrixStore], tuple[()]]:
        """In another process the cache starts empty."""
        return MatrixStore, ()

    def builder(self, device: torch.device, dtype: torch.dtype) -> MatrixBuilder:
        """The builder for a device and dtype; whoever keeps it shares its codebooks with whoever asks next."""
        found = self._builders.get((device, dtype))
        if found is None:
            found = MatrixBuilder(kernel="auto", dtype=dtype, device=device)
            self._builders[device, dtype] = found
        return found

    def matrix(self, weight: ClusteredWeight, builder: MatrixBuilder) -> Matrix:
        """The weight, prepared by that builder."""
        # A transposed weight is another matrix under the same name.
        key = (weight.name, weight.shape, weight.group_axis, builder.device, builder.dtype)
        found = self._matrices.get(key)
        if found is None:
            found = builder.build(weight)
            self._matrices[key] = found
        return found


class ClusteredModule(nn.Module):
    """A clustered weight `[out_features, in_features]`, ready where the module is.

    `kernel` names what runs. Has no parameter for the weight; `weight` stands for the decoded one.
    """

    def __init__(self, clustered: ClusteredWeight, store: MatrixStore, dtype: torch.dtype, device: torch.device) -> None:
        nn.Module.__init__(self)
        self.clustered = clustered
        # Whether the weight is the transpose of the parameter of the module it stands for, which is a `Conv1D` then.
        self.transposed = False
        self._store = store
        self._builder: MatrixBuilder | None = None
        self._matrix: Matrix | None = None
        self._decoded: torch.Tensor | None = None
        self._reads = 0
        # transformers has nothing to initialize here.
        self._is_hf_initialized = True
        # Says where the module is; whoever moves a model, moves its buffers.
        self.register_buffer("_placement", torch.empty(0, dtype=dtype, device=device), persistent=False)
        self._placement: torch.Tensor

    @property
    def stored_shape(self) -> tuple[int, int]:
        """The shape of the parameter that the module it stands for has."""
        rows, columns = self.clustered.shape
        return (columns, rows) if self.transposed else (rows, columns)

    def matrix(self) -> Matrix:
        """The weight prepared for the module's device and dtype."""
        if self._matrix is None:
            # Made to last, for training as well, even where the first call comes under torch.inference_mode.
            with torch.inference_mode(mode=False), torch.no_grad():
                self._builder = self._store.builder(self._placement.device, self._placement.dtype)
                self._matrix = self._store.matrix(self.clustered, self._builder)
        return self._matrix

    @property
    def kernel(self) -> str:
        return self.matrix().path

    @property
    def weight(self) -> torch.Tensor:
        """Stands for the decoded weight `[out_features, in_features]`: asking for its values decodes it."""
        return WeightView(self)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            refuse_write(self)
        super().__setattr__(name, value)

    def requires_grad_(self, requires_grad: bool = True) -> ClusteredModule:
        """As of any module; warns whoever means to train this one, as PEFT's `modules_to_save` does, that its weight is not."""
        if requires_grad:
            warnings.warn(f"{self.clustered.name} is clustered: it is not trained", stacklevel=2)
        super().requires_grad_(requires_grad)
        return self

    def decoded(self) -> torch.Tensor:
        """The decoded weight; kept from the second time on, with a warning: what reads it twice reads it at every call."""
        if self._decoded is not None:
            return self._decoded
        values = self._decode()
        self._reads += 1
        if self._reads > 1 and not values.is_meta:
            self._decoded = values
            warnings.warn(
                f"{self.clustered.name}: something reads the values of this clustered weight time and again, so its decoded "
                f"values are kept, {values.nbytes} bytes",
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
        """A copy asks for its matrix again, and mostly gets the one there is: a sparse one cannot be copied."""
        return {**self.__dict__, "_matrix": None, "_builder": None, "_decoded": None}

    def extra_repr(self) -> str:
        weight = self.clustered
        stages = ", ".join(f"{stage.codebook.num_clusters}x{stage.codebook.cluster_dim}" for stage in weight.stages)
        return f"out_features={weight.shape[0]}, in_features={weight.shape[1]}, codebooks={stages}"


class ClusteredLinear(ClusteredModule, nn.Linear):  # type: ignore[override]
    """`y = x W^T + bias` for `x [..., in_features]`.

    A `Linear`, so that PEFT and others that look for those find it.
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
        # A decoded matrix is torch's to differentiate.
        if torch.is_grad_enabled() and x.requires_grad and isinstance(matrix, ClusLinear):
            y: torch.Tensor = _Multiply.apply(x, self)  # type: ignore[no-untyped-call]
        else:
            y = matrix(x)
        return y if self.bias is None else y + self.bias


class _Multiply(torch.autograd.Function):
    """`x W^T` on the module's kernel; the gradient of `x` is `grad W`, with `W` decoded anew: nothing is kept for it."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, module: ClusteredLinear) -> torch.Tensor:
        ctx.module, ctx.dtype = module, x.dtype
        return module.matrix()(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        module: ClusteredLinear = ctx.module
        rows = torch.arange(module.out_features, device=grad.device)
        # Where the codes are, by the kernel that looks up embeddings.
        weight = module.matrix().embedding(rows)
        return (grad @ weight.to(grad.dtype)).to(ctx.dtype), None


class ClusteredEmbedding(ClusteredModule, nn.Embedding):  # type: ignore[override]
    """Rows of the weight: `ids [...] -> [..., embedding_dim]`. An `Embedding`, for those who look for one."""

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
    """The transpose of a clustered weight: the same codes, the groups along the other axis.

    What a `Conv1D` stores, `[in_features, out_features]`, as the `[out_features, in_features]` of a linear.
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
