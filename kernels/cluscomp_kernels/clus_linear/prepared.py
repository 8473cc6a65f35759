"""Weights prepared for inference: the common base class, and the paths that use torch alone.

A path lays out codebook and codes once, so that each call is a single operator. Many weights can share a prepared codebook.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from cluscomp_kernels.clus_linear import reference
from cluscomp_kernels.clus_linear.operands import check_input

__all__ = ["DenseWeight", "EmbeddingBagWeight", "Operands", "PreparedCodebook", "PreparedWeight", "ReferenceWeight"]


@dataclass(frozen=True, eq=False)
class PreparedCodebook:
    """A codebook laid out for one path: `values [rows, row_length]` on the device, with rows and columns possibly padded.

    The centroids are `values * unit`. `prepare` multiplies the row scales of the weights by `unit`.
    """

    path: str
    values: Tensor
    num_clusters: int
    cluster_dim: int
    unit: float = 1.0

    @property
    def nbytes(self) -> int:
        """Bytes in memory, once for all weights that share the codebook."""
        return self.values.nbytes


@dataclass(frozen=True, eq=False)
class Operands:
    """Checked operands of a path: canonical codes; `row_scale` and `bias` on its device, float32 or None."""

    codebook: PreparedCodebook
    codes: Tensor
    out_features: int
    row_scale: Tensor | None
    bias: Tensor | None
    dtype: torch.dtype


class PreparedWeight(abc.ABC):
    """`W [out_features, in_features]` with its row scale, and a bias, ready for inference on one path. Forward only.

    `decode()` and `embedding()` return `dtype`; `linear()` returns the dtype of its input.
    """

    path: ClassVar[str]

    def __init__(self, operands: Operands) -> None:
        self.codebook = operands.codebook
        self.in_features = operands.codes.shape[0]
        self.out_features = operands.out_features
        self.row_scale = operands.row_scale
        self.bias = operands.bias
        self.dtype = operands.dtype

    def __call__(self, x: Tensor) -> Tensor:
        return self.linear(x)

    def linear(self, x: Tensor) -> Tensor:
        """Return `x @ W^T + bias` for floating-point `x [..., in_features]`, in the dtype of `x`.

        Raises TypeError if `x` is not floating-point; ValueError if its shape or device is wrong; RuntimeError if it requires a
        gradient (use `cluscomp_kernels.clus_linear.linear` for that).
        """
        if x.requires_grad and torch.is_grad_enabled():
            raise RuntimeError("a prepared weight has no backward pass; use clus_linear.linear, or torch.no_grad()")
        if x.device != self.codebook.values.device:
            raise ValueError(f"x is on {x.device}, the weight was prepared for {self.codebook.values.device}")
        return self._linear(x)

    def replace_row_scale(self, row_scale: Tensor) -> None:
        """Overwrite the row scale `[out_features]` in place.

        Raises ValueError if the weight was prepared without one.
        """
        if self.row_scale is None:
            raise ValueError("the weight was prepared without a row scale")
        self.row_scale.copy_(row_scale).mul_(self.codebook.unit)

    @abc.abstractmethod
    def _linear(self, x: Tensor) -> Tensor: ...

    @abc.abstractmethod
    def embedding(self, ids: Tensor) -> Tensor:
        """Return the rows `W[ids]` as `[*ids.shape, in_features]` in `dtype`.

        Raises IndexError unless 0 <= ids < out_features; on a GPU the check is a device-side assertion.
        """

    @abc.abstractmethod
    def decode(self) -> Tensor:
        """Return `W [out_features, in_features]` in `dtype`, times the row scale; it may be a transposed view."""

    @property
    @abc.abstractmethod
    def _own_tensors(self) -> tuple[Tensor, ...]: ...

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors of this weight, without the codebook, which other weights may share."""
        epilogue = (tensor for tensor in (self.row_scale, self.bias) if tensor is not None)
        return sum(tensor.nbytes for tensor in (*self._own_tensors, *epilogue))

    def _finish(self, y: Tensor) -> Tensor:
        if self.row_scale is not None:
            y = y * self.row_scale.to(y.dtype)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class ReferenceWeight(PreparedWeight):
    """Decodes the weight in every call. Slow, smallest in memory, and the definition of the other paths' results."""

    path = "reference"

    def __init__(self, operands: Operands) -> None:
        super().__init__(operands)
        self._codes = operands.codes.to(self.codebook.values.device)

    @property
    def _rows(self) -> Tensor:
        """Return the codebook without padding."""
        return self.codebook.values[: self.codebook.num_clusters, : self.codebook.cluster_dim]

    def _linear(self, x: Tensor) -> Tensor:
        check_input(x, self.in_features)
        return reference.linear(x, self._rows, self._codes, self.out_features, self.row_scale, self.bias)

    def embedding(self, ids: Tensor) -> Tensor:
        _check_ids(ids, self.out_features)
        group, lane = ids // self.codebook.cluster_dim, ids % self.codebook.cluster_dim
        # torch cannot index uint16 tensors; an int16 view has the same bits.
        indexable = self._codes.view(torch.int16) if self._codes.dtype == torch.uint16 else self._codes
        chosen = indexable.t()[group].to(torch.int64) & 0xFFFF
        rows = self._rows[chosen, lane.unsqueeze(-1)].to(self.dtype)
        return rows if self.row_scale is None else rows * self.row_scale[ids].unsqueeze(-1).to(self.dtype)

    def decode(self) -> Tensor:
        weight = reference.decode(self._rows, self._codes, self.out_features).to(self.dtype).t()
        return weight if self.row_scale is None else weight * self.row_scale.to(self.dtype).unsqueeze(-1)

    @property
    def _own_tensors(self) -> tuple[Tensor, ...]:
        return (self._codes,)


class EmbeddingBagWeight(ReferenceWeight):
    """`torch.nn.functional.embedding_bag` over the codebook, weighted by `x`: fast for few tokens without the C kernels.

    Stores the codes as int32 `[groups, in_features]` and computes in float32.
    """

    path = "embedding_bag"
    FEW_TOKENS: ClassVar[int] = 4
    """With more tokens than this, decoding the weight is cheaper."""

    def __init__(self, operands: Operands) -> None:
        super().__init__(operands)
        self._bags = self._codes.t().to(torch.int32).contiguous()
        self._codes = self._bags.t()

    def _linear(self, x: Tensor) -> Tensor:
        check_input(x, self.in_features)
        tokens = x.reshape(-1, self.in_features).float()
        if not 0 < tokens.shape[0] <= self.FEW_TOKENS or self.in_features == 0:
            return super()._linear(x)
        y = torch.stack([self._one_token(token) for token in tokens])
        return self._finish(y).to(x.dtype).reshape(*x.shape[:-1], self.out_features)

    def _one_token(self, token: Tensor) -> Tensor:
        weights = token.expand(self._bags.shape)
        bag = torch.nn.functional.embedding_bag(self._bags, self.codebook.values, per_sample_weights=weights, mode="sum")
        return bag.reshape(-1)[: self.out_features]

    @property
    def _own_tensors(self) -> tuple[Tensor, ...]:
        return (self._bags,)


class DenseWeight(PreparedWeight):
    """Decodes once and keeps the matrix in `dtype`: fast for any number of tokens, with the memory of a dense weight."""

    path = "dense"

    def __init__(self, operands: Operands) -> None:
        super().__init__(operands)
        self._weight = ReferenceWeight(operands).decode().contiguous()

    def _linear(self, x: Tensor) -> Tensor:
        check_input(x, self.in_features)
        bias = None if self.bias is None else self.bias.to(self.dtype)
        return torch.nn.functional.linear(x.to(self.dtype), self._weight, bias).to(x.dtype)

    def embedding(self, ids: Tensor) -> Tensor:
        _check_ids(ids, self.out_features)
        return self._weight[ids]

    def decode(self) -> Tensor:
        return self._weight

    @property
    def _own_tensors(self) -> tuple[Tensor, ...]:
        return (self._weight,)


def _check_ids(ids: Tensor, out_features: int) -> None:
    """Raise IndexError unless 0 <= ids < out_features. (Indexing alone would count negative ids from the end.)"""
    if ids.device.type == "cpu" and ids.numel() and not (int(ids.min()) >= 0 and int(ids.max()) < out_features):
        raise IndexError(f"ids go from {int(ids.min())} to {int(ids.max())}, expected 0 to {out_features - 1}")
