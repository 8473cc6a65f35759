"""The native path: a weight prepared for the C kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from cluscomp_kernels.clus_linear.native_kernel import BoundWeight, decode_tiled, rows_tiled, tile_codes
from cluscomp_kernels.clus_linear.prepared import Operands, PreparedWeight

__all__ = ["NativeWeight"]


class NativeWeight(PreparedWeight):
    """Tiled codes and a padded codebook; see native_kernel.py for the numeric contract."""

    path = "native"

    def __init__(self, operands: Operands) -> None:
        super().__init__(operands)
        self._tiled = tile_codes(operands.codes, self.codebook.num_clusters, self.codebook.cluster_dim)
        dim, padded = self.codebook.cluster_dim, self.codebook.values
        self._bound = BoundWeight(self._tiled, padded, self.row_scale, self.bias, self.out_features, dim)

    def _linear(self, x: Tensor) -> Tensor:
        if self._bound.supports(x):
            return self._bound.linear(x)
        y: Tensor = torch.ops.cluscomp.linear_tiled.default(
            x, self._tiled, self.codebook.values, self.row_scale, self.bias, self.out_features, self.codebook.cluster_dim
        )
        return y

    def embedding(self, ids: Tensor) -> Tensor:
        dim = self.codebook.cluster_dim
        return rows_tiled(ids, self._tiled, self.codebook.values, self.row_scale, self.out_features, dim).to(self.dtype)

    def decode(self) -> Tensor:
        weight = decode_tiled(self._tiled, self.codebook.values, self.out_features, self.codebook.cluster_dim).t()
        return (weight if self.row_scale is None else weight * self.row_scale.unsqueeze(-1)).to(self.dtype)

    @property
    def _own_tensors(self) -> tuple[Tensor, ...]:
        return (self._tiled,)
