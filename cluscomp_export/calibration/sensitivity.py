"""How much predictions suffer from errors in each tensor, measured on a calibration text.

Small, independent, zero-mean errors of a matrix's weights increase the divergence by

    KL ~ 1/2 * sum over weights of (mean squared gradient of the log-likelihood of labels drawn from the model) * (variance)

nats per token: the diagonal of the Fisher information (`fisher.py`). The gradients of a window's tokens are added before they
are squared, because they act on the same weight.

Memory: that of `FisherPass`, plus the gradients of one block's matrices and their trial errors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch

from cluscomp_export.calibration.activations import token_shares
from cluscomp_export.calibration.fisher import EMBEDDING, HEAD, FisherPass, block_matrices
from cluscomp_export.calibration.trial_errors import trial_errors
from cluscomp_export.planning import Sensitivity
from cluscomp_formats.ir import Model, Tensor
from cluscomp_formats.progress import Progress, silent
from cluscomp_runtime.decoder import Positions
from cluscomp_runtime.linear import DenseLinear, MatrixBuilder, decoded

__all__ = ["measure_sensitivities", "sensitive_tensors"]


class _Leaf(DenseLinear):
    """A dense matrix whose weight gets gradients, and which adds up second moments of its inputs in the forward pass."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, second_moments: torch.Tensor) -> None:
        super().__init__(weight, bias)
        self.second_moments = second_moments

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.is_grad_enabled():
            self.second_moments += token_shares(x)
        return super().__call__(x)


class _Leaves(MatrixBuilder):
    """Builds `_Leaf`s."""

    def __init__(self, sums: Mapping[str, _Sums]) -> None:
        super().__init__("dense", torch.float32, torch.device("cpu"))
        self.sums = sums
        self.weights: dict[str, torch.Tensor] = {}

    def build(self, tensor: Tensor, bias: Tensor | None = None) -> DenseLinear:
        weight = decoded(tensor).float().requires_grad_()
        self.weights[tensor.name] = weight
        return _Leaf(weight, None if bias is None else self.vector(bias), self.sums[tensor.name].second_moments)


class _Sums:
    """Sums for a matrix: second moments of its inputs, losses of trial errors."""

    def __init__(self, in_features: int) -> None:
        self.second_moments = torch.zeros(in_features, dtype=torch.float64)
        self.relative = self.flat = 0.0

    def trial(self, weight: torch.Tensor, *, row_scale: bool = True) -> torch.Tensor:
        """`trial_errors` of the matrix."""
        # Channels of an expert that no token goes to count alike.
        second_moments = (
            (self.second_moments if self.second_moments.any() else torch.ones_like(self.second_moments))
            .numpy()
            .astype(np.float32)
        )
        return torch.from_numpy(trial_errors(weight.detach().numpy(), second_moments, row_scale=row_scale))


class _Measurement(FisherPass):
    def __init__(self, source: Model, seed: int) -> None:
        super().__init__(source, seed)
        self.sums = {}
        for name in sensitive_tensors(source):
            self.sums[name] = _Sums(source.tensors[name].shape[1])

    def builder(self) -> MatrixBuilder:
        return _Leaves(self.sums)

    def block_gradients(self, index: int, inputs: torch.Tensor, positions: Positions, gradients: torch.Tensor) -> None:
        leaves = _Leaves(self.sums)
        layer, weights = self.layer(index, leaves), leaves.weights
        trials = {
            name: [self.sums[name].trial(weight, row_scale=row_scale) for row_scale in (True, False)]
            for name, weight in weights.items()
        }
        for number, gradient in enumerate(gradients):
            # An expert that no token of the window goes to has no gradient: it is made one of zeros.
            window = inputs[number, None].requires_grad_()
            of_window, *found = torch.autograd.grad(
                layer(window, positions, None), [window, *weights.values()], gradient[None], materialize_grads=True
            )
            for name in weights:
                # Removed from the list, so that each gradient is freed before those of the next window.
                of_weight = found.pop(0)
                scaled, flat = trials[name]
                self.sums[name].relative += _square_sum(of_weight * scaled)
                self.sums[name].flat += _square_sum(of_weight.mul_(flat))
            del of_weight
            gradients[number] = of_window[0]

    def watch_head(self, hidden: torch.Tensor, weight: torch.Tensor) -> Callable[[torch.Tensor, torch.Tensor], None]:
        sums = self.sums[self.head]
        sums.second_moments += token_shares(self.decoder.norm(hidden))
        errors = sums.trial(weight)

        def see_predictions(normed: torch.Tensor, probabilities: torch.Tensor) -> None:
            changes = normed @ errors.t()
            # A change common to all logits has no effect; here the whole covariance is used.
            means = (probabilities * changes).sum(-1, keepdim=True)
            sums.relative += float((probabilities * (changes - means).square_()).sum(dtype=torch.float64))

        return see_predictions

    def see_embedding(self, windows: torch.Tensor, gradients: torch.Tensor) -> None:
        """Add the loss through the look-up. For a tied head, the cross term with the head is left out; its sign varies."""
        sums = self.sums[EMBEDDING]
        if self.head != EMBEDDING:
            sums.second_moments += 1.0
        errors, scale = sums.trial(decoded(self.source.tensors[EMBEDDING]).float()), self.description.embedding_scale
        for ids, gradient in zip(windows, gradients, strict=True):
            distinct, places = ids.unique(return_inverse=True)
            # With respect to the rows, which are multiplied by the scale.
            scaled = gradient if scale == 1.0 else gradient * scale
            of_rows = torch.zeros(len(distinct), gradient.shape[1]).index_add_(0, places, scaled)
            sums.relative += _square_sum(of_rows * errors[distinct])


def _square_sum(values: torch.Tensor) -> float:
    return float(values.square_().sum(dtype=torch.float64))


def sensitive_tensors(model: Model) -> list[str]:
    """Names of the measured tensors: the matrices of the decoder blocks, the embedding and the head."""
    matrices = block_matrices(model)
    return [name for name in model.tensors if name in matrices or name in (EMBEDDING, HEAD)]


def measure_sensitivities(
    source: Model, windows: torch.Tensor, *, seed: int = 0, on_progress: Progress = silent
) -> Mapping[str, Sensitivity]:
    """Sensitivity of every matrix of a decoder block, the embedding and the head, by name, on ids int64 `[windows, tokens]`.

    A tied embedding counts as look-up and as head. Raises UnsupportedError for an architecture that the runtime does not know,
    InvalidFileError if tensors do not fit the configuration, InvalidRequestError for ids that the model does not have.
    """
    measurement = _Measurement(source, seed)
    measurement.run(windows, "sensitivity", on_progress)
    result = {}
    half = 0.5 / windows.numel()
    for name, sums in measurement.sums.items():
        # Embedding and head always have row scales.
        flat = sums.relative if name in (EMBEDDING, HEAD) else sums.flat
        result[name] = Sensitivity(_rounded(half * sums.relative), _rounded(half * flat))
    return result


def _rounded(value: float) -> float:
    """To three digits: further digits are noise and may depend on the machine."""
    return float(f"{value:.3g}")
