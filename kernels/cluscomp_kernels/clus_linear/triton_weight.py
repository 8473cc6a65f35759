"""The triton path: a weight prepared for the Triton kernels on a CUDA device."""

from __future__ import annotations

import torch
from torch import Tensor

from cluscomp_kernels.clus_linear import triton_kernel
from cluscomp_kernels.clus_linear.prepared import Operands, ReferenceWeight

__all__ = ["TritonWeight"]


class TritonWeight(ReferenceWeight):
    """Canonical codes and a padded codebook on the device; see triton_kernel.py for the numeric contract."""

    path = "triton"

    def __init__(self, operands: Operands) -> None:
        super().__init__(operands)
        self._codes = self._codes.contiguous()

    def _linear(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.cluscomp.linear_triton.default(
            x, self._codes, self.codebook.values, self.row_scale, self.bias, self.out_features, self.codebook.cluster_dim
        )
        return y

    def decode(self) -> Tensor:
        codebook = self.codebook
        dense = triton_kernel.decode_dense(self._codes, codebook.values, self.out_features, codebook.cluster_dim, torch.float32)
        return (dense if self.row_scale is None else dense * self.row_scale).to(self.dtype).t()
