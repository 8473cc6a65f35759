"""How much predictions suffer from errors in each output of a matrix, measured on a calibration text.

In the paper's layout a vector spans `cluster_dim` rows of a matrix. Rows differ in importance: an output of a feed-forward
network that is rarely active may have more error than others. The importance of a row is the mean squared gradient of the
predictions with respect to its output (`fisher.py`), normalised per token so that all tokens count alike. GuidedQuant (Kim et
al., arXiv 2505.07004) weights the moments of inputs by such gradients; here they weight the rows of a vector.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch

from cluscomp_export.calibration.activations import normalised, token_shares
from cluscomp_export.calibration.fisher import FisherPass, block_matrices
from cluscomp_formats.ir import Model, Tensor
from cluscomp_formats.progress import Progress, silent
from cluscomp_runtime.decoder import Positions
from cluscomp_runtime.linear import DenseLinear, MatrixBuilder, decoded

__all__ = ["row_importance"]


class _Watched(DenseLinear):
    """A dense matrix that adds up the gradients of its outputs."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, sums: torch.Tensor) -> None:
        super().__init__(weight, bias)
        self.sums = sums

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        outputs = super().__call__(x)
        if outputs.requires_grad:
            outputs.register_hook(self._see)  # type: ignore[no-untyped-call]
        return outputs

    def _see(self, gradient: torch.Tensor) -> None:
        self.sums += token_shares(gradient)


class _WatchedMatrices(MatrixBuilder):
    def __init__(self, sums: Mapping[str, torch.Tensor]) -> None:
        super().__init__("dense", torch.float32, torch.device("cpu"))
        self.sums = sums

    def build(self, tensor: Tensor, bias: Tensor | None = None) -> DenseLinear:
        return _Watched(decoded(tensor).float(), None if bias is None else self.vector(bias), self.sums[tensor.name])


class _Measurement(FisherPass):
    def __init__(self, source: Model, seed: int) -> None:
        super().__init__(source, seed)
        self.sums = {name: torch.zeros(source.tensors[name].shape[0], dtype=torch.float64) for name in block_matrices(source)}

    def builder(self) -> MatrixBuilder:
        return _WatchedMatrices(self.sums)

    def block_gradients(self, index: int, inputs: torch.Tensor, positions: Positions, gradients: torch.Tensor) -> None:
        layer = self.layer(index, self.builder())
        for number, gradient in enumerate(gradients):
            window = inputs[number, None].requires_grad_()
            gradients[number] = torch.autograd.grad(layer(window, positions, None), window, gradient[None])[0][0]


def row_importance(
    source: Model, windows: torch.Tensor, *, seed: int = 0, on_progress: Progress = silent
) -> Mapping[str, npt.NDArray[np.float32]]:
    """Importance of each row of every matrix in the decoder blocks, float32 `[out_features]` with mean 1.

    Measured on ids int64 `[windows, tokens]`. The last bits may depend on the number of threads. Raises UnsupportedError for an
    architecture that the runtime does not know, InvalidFileError if tensors do not fit the configuration, InvalidRequestError
    for ids that the model does not have.
    """
    measurement = _Measurement(source, seed)
    measurement.run(windows, "row importance", on_progress)
    return {name: normalised(sums) for name, sums in measurement.sums.items()}
