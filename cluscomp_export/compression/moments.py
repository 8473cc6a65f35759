"""What codes are chosen for with error feedback: the moments of a matrix's inputs, and what its output should become.

Over a text the squared error of a matrix's output is, up to a constant,

    sum over rows of (w' - q) H (w' - q)^T,   H = E[x x^T] + damping,   W' = W + E[(t - W x) x^T] H^-1

with x the inputs, t the outputs wanted, W the original matrix and q the rows of the decoded one. The matrix is first corrected
by ridge regression (W'), which damping keeps near W, and then encoded under H. Codes are chosen channel by channel, as GPTQ
does (Frantar et al., arXiv 2210.17323). In the reference layout a vector of a codebook lies in one input channel, so GPTQ's
update works for vectors as it does for numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from cluscomp_kernels.kmeans import assign_with_feedback, feedback_factor

__all__ = ["InputMoments", "MomentSums", "Target"]

Floats = npt.NDArray[np.float32]

DAMPING = 0.1
"""Added to the diagonal, in units of its mean. GPTQ uses .01; more costs little on the calibration text and helps on others."""

ROWS = 512
"""Rows of moments added at a time."""
PIECE_BYTES = 32 << 20
"""Most bytes of the rows of a matrix that are encoded at a time: no row depends on another."""


class InputMoments:
    """Second moments of a matrix's inputs: the mean over tokens of `x x^T`, float64 `[in_features, in_features]`.

    Tokens are scaled to the same mean square, so that all count alike: the first token of a text can have a thousand times the
    mean square of the others. The given tensor is damped in place.
    """

    def __init__(self, moments: torch.Tensor) -> None:
        # In place: one copy of the widest input of a 70B model takes 6.6 GB.
        mean = float(moments.diagonal().mean())
        moments.diagonal().add_(DAMPING * mean if mean > 0 else 1.0)
        self.damped = moments
        # Strongest first: the many weak channels after them can still compensate their errors.
        self._order = np.argsort(-moments.diagonal().numpy(), kind="stable")
        self._factor: Floats | None = None

    def factor(self) -> Floats:
        """The factor that `assign_with_feedback` needs, for the channels in descending order of their second moment."""
        if self._factor is None:
            factor = feedback_factor(self.damped, torch.from_numpy(self._order))
            self._factor = np.ascontiguousarray(factor.numpy().astype(np.float32))
        return self._factor

    def corrections(self, residuals: Mapping[str, torch.Tensor]) -> dict[str, Floats]:
        """What to add to each transposed matrix to reduce its output's residual, float32 `[in_features, out_features]`.

        `residuals`, float64 of that shape, are means of `x e^T`, with e the residual of the output: ridge regression of e on x.
        """
        # Not kept longer than this: it is as large as the moments.
        lower = torch.linalg.cholesky(self.damped)
        return {name: torch.cholesky_solve(residual, lower).float().numpy() for name, residual in residuals.items()}

    def encode(
        self, weights: Floats, centroids: Floats, importance: Floats, *, threads: int | None, device: str
    ) -> tuple[npt.NDArray[np.uint16], npt.NDArray[np.float64]]:
        """Choose codes for `weights` `[in_features, groups * cluster_dim]`, the transposed matrix padded to whole groups.

        `importance` `[out_features]` weights the squared error of each row. Returns the codes, uint16 `[in_features, groups]`,
        and the factors `[out_features]` to multiply each decoded row with for the least error.
        """
        # Before the weights are copied: factoring takes most memory.
        factor, damped = self.factor(), self.damped.float()
        channels, dim, out_features = len(weights), centroids.shape[1], len(importance)
        padded = np.ones(weights.shape[1], dtype=np.float32)
        padded[:out_features] = importance
        groups = -(-out_features // dim)
        codes = np.empty((channels, groups), dtype=np.uint16)
        factors = np.empty(out_features)
        step = max(1, PIECE_BYTES // (4 * channels * dim))
        for begin in range(0, groups, step):
            piece = slice(begin, min(begin + step, groups))
            rows = slice(begin * dim, min(piece.stop * dim, out_features))
            count = rows.stop - rows.start
            ordered = assign_with_feedback(
                weights[self._order, begin * dim : piece.stop * dim],
                centroids,
                factor,
                out_features=count,
                importance=padded[begin * dim : piece.stop * dim],
                threads=threads,
                device=device,
            )
            codes[self._order, piece] = ordered
            wanted = torch.from_numpy(weights[:, rows])
            given = torch.from_numpy(centroids[codes[:, piece]].reshape(channels, -1)[:, :count])
            projected = damped @ given
            products = (wanted * projected).sum(0, dtype=torch.float64)
            squares = (given * projected).sum(0, dtype=torch.float64)
            factors[rows] = torch.where((squares > 0) & (products > 0), products / squares, 1.0).numpy()
        return codes, factors


@dataclass(frozen=True)
class Target:
    """What to encode a matrix for: its transpose plus a `correction` `[in_features, out_features]`, if any, under `moments`.

    `importance` `[out_features]` weights the squared errors of the outputs; None weights all alike.
    """

    moments: InputMoments
    correction: Floats | None = None
    importance: Floats | None = None


class MomentSums:
    """Sums over tokens of `x x^T` and, if wanted, `x e^T`: x the inputs of a matrix, e the residual of its output."""

    def __init__(self) -> None:
        self._inputs: torch.Tensor | None = None
        self._residuals: torch.Tensor | None = None
        self.tokens = 0

    def add(self, inputs: torch.Tensor, residuals: torch.Tensor | None, measure: torch.Tensor) -> None:
        """Add `inputs` `[..., in_features]` and `residuals` `[..., any]` of some tokens.

        Each token is weighted by the inverse of the mean square of `measure` `[..., any]`.
        """
        scale = measure.square().mean(-1, keepdim=True).sqrt().clamp(min=torch.finfo(measure.dtype).tiny)
        scaled = (inputs / scale).flatten(0, -2)
        self._inputs = _added(self._inputs, scaled.t() @ scaled)
        if residuals is not None:
            self._residuals = _added(self._residuals, scaled.t() @ (residuals / scale).flatten(0, -2))
        self.tokens += len(scaled)

    @property
    def features(self) -> int:
        """Width of the inputs; 0 before the first are added."""
        return 0 if self._inputs is None else len(self._inputs)

    def moments(self) -> InputMoments:
        """The moments of the inputs; takes the place of their sums."""
        if self._inputs is None:
            raise ValueError("there is nothing to take the mean of")
        return InputMoments(self._inputs.cpu().div_(self.tokens))

    def results(self) -> tuple[InputMoments, torch.Tensor]:
        """The moments of the inputs, and the mean of `x e^T`, float64 `[in_features, any]`; they take the place of the sums."""
        if self._residuals is None:
            raise ValueError("there is nothing to take the mean of")
        return self.moments(), self._residuals.cpu().div_(self.tokens)


def _added(sums: torch.Tensor | None, products: torch.Tensor) -> torch.Tensor:
    """float64 sums with float32 products added, in place."""
    if sums is None:
        return products.double()
    # Rows at a time: torch makes a float64 copy of what is added.
    for start in range(0, len(products), ROWS):
        sums[start : start + ROWS] += products[start : start + ROWS]
    return sums
