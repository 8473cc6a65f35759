"""torch modules over clustered weights, in place of `Linear`, `Conv1D` and `Embedding`.

They keep the weight as the lazy tensor of the IR and prepare a kernel for the device and dtype they are on, anew after
`.to(...)`. Forward only.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from cluscomp_formats.ir import Array, ClusteredWeight, Outliers
from cluscomp_runtime.linear import Matrix, MatrixBuilder

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

    `kernel` names what runs. Has no parameter for the weight; `weight` decodes it for those who insist on a tensor.
    """

    def __init__(self, clustered: ClusteredWeight, store: MatrixStore, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.clustered = clustered
        self._store = store
        self._builder: MatrixBuilder | None = None
        self._matrix: Matrix | None = None
        # Says where the module is; whoever moves a model, moves its buffers.
        self.register_buffer("_placement", torch.empty(0, dtype=dtype, device=device), persistent=False)
        self._placement: torch.Tensor

    def matrix(self) -> Matrix:
        """The weight prepared for the module's device and dtype."""
        if self._matrix is None:
            self._builder = self._store.builder(self._placement.device, self._placement.dtype)
            self._matrix = self._store.matrix(self.clustered, self._builder)
        return self._matrix

    @property
    def kernel(self) -> str:
        return self.matrix().path

    @property
    def weight(self) -> torch.Tensor:
        """The decoded weight `[out_features, in_features]`, made anew each time: slow, and as large as a dense one."""
        if self._placement.is_meta:
            raise AttributeError("weight")
        return torch.from_numpy(self.clustered.decode()).to(self._placement)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> ClusteredModule:
        before = (self._placement.device, self._placement.dtype)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if (self._placement.device, self._placement.dtype) != before:
            self._matrix = None
            self._builder = None
        return self

    def __getstate__(self) -> dict[str, Any]:
        """A copy asks for its matrix again, and mostly gets the one there is: a sparse one cannot be copied."""
        return {**self.__dict__, "_matrix": None, "_builder": None}

    def extra_repr(self) -> str:
        weight = self.clustered
        stages = ", ".join(f"{stage.codebook.num_clusters}x{stage.codebook.cluster_dim}" for stage in weight.stages)
        return f"out_features={weight.shape[0]}, in_features={weight.shape[1]}, codebooks={stages}"


class ClusteredLinear(ClusteredModule):
    """`y = x W^T + bias` for `x [..., in_features]`."""

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
        self.bias: nn.Parameter | None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.matrix()(x)
        return y if self.bias is None else y + self.bias


class ClusteredEmbedding(ClusteredModule):
    """Rows of the weight: `ids [...] -> [..., embedding_dim]`."""

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
