"""How much the model's predictions suffer from errors of each tensor, measured on a calibration text.

For small, independent, zero-mean errors of a matrix's weights the divergence of the model from itself grows by

    KL ~ 1/2 * sum over weights of (mean squared gradient of the log-likelihood of labels the model draws) * (variance)

nats per token: the diagonal of the Fisher information. Instead of drawing labels, the gradient with respect to a token's logits
is `sqrt(p) * z - p * (sqrt(p) . z)` with random signs `z`, which has the same covariance `diag(p) - p p^T`, varies less, and
does not jump when a probability changes in its last bit. The gradients of a window's tokens add up before they are squared,
as they meet in the same weight. Every token's prediction counts alike.

Memory: one block's matrices as float32 and their gradients, what flows between blocks for a few windows, twice the largest
matrix; each block is computed again in the backward pass.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from cluscomp_export.calibration import MAX_WINDOWS, calibration_windows
from cluscomp_export.planning import Sensitivity
from cluscomp_export.progress import Progress, silent
from cluscomp_export.trial_errors import trial_errors
from cluscomp_formats.ir import Array, DenseTensor, Model, Tensor
from cluscomp_runtime.architecture import DecoderSettings, check_tensors
from cluscomp_runtime.decoder import Decoder, DecoderLayer, Positions
from cluscomp_runtime.generate import check_prompt
from cluscomp_runtime.linear import DenseLinear, MatrixBuilder, decoded

__all__ = ["measure_sensitivities", "sensitive_tensors", "sensitivity_windows"]

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"

WINDOWS = 4
GROUP = 4
"""Windows that go through a block together: every group decodes every matrix twice."""
HEAD_TOKENS = 128
"""Tokens whose logits are in memory at a time."""


class _Leaf(DenseLinear):
    """A dense matrix whose weight takes gradients, and which sums up the energies of its inputs in the forward pass."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, energy: torch.Tensor) -> None:
        super().__init__(weight, bias)
        self.energy = energy

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.is_grad_enabled():
            self.energy += _energies(x)
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
        return _Leaf(weight, None if bias is None else self.vector(bias), self.sums[tensor.name].energy)


def _energies(x: torch.Tensor) -> torch.Tensor:
    """Each channel's share of a token's energy, summed over all tokens, float64 `[channels]`; see `channel_energies`."""
    energy = x.double().square().flatten(0, -2)
    return (energy / energy.mean(1, keepdim=True).clamp(min=torch.finfo(energy.dtype).tiny)).sum(0)


class _Sums:
    """What is summed up for a matrix: energies of its inputs, losses of trial errors."""

    def __init__(self, in_features: int) -> None:
        self.energy = torch.zeros(in_features, dtype=torch.float64)
        self.relative = self.flat = 0.0

    def trial(self, weight: torch.Tensor, *, row_scale: bool = True) -> torch.Tensor:
        """`trial_errors` of the matrix."""
        energy = self.energy.numpy().astype(np.float32)
        return torch.from_numpy(trial_errors(weight.detach().numpy(), energy, row_scale=row_scale))


class _Measurement:
    def __init__(self, source: Model, seed: int) -> None:
        self.source = source
        self.settings = DecoderSettings.from_config(source.config)
        check_tensors(source, self.settings)
        # This builder reads no matrix before it is used.
        self.decoder = Decoder(source, self.settings, MatrixBuilder("reference", torch.float32, torch.device("cpu")))
        self.seed = seed
        self.sums = {}
        for name in sensitive_tensors(source):
            self.sums[name] = _Sums(source.tensors[name].shape[1])
        self.head = HEAD if HEAD in source.tensors else EMBEDDING

    def layer(self, index: int) -> tuple[DecoderLayer, dict[str, torch.Tensor]]:
        """Block `index` and its matrices by name."""
        prefix = f"model.layers.{index}."
        block = {
            name: DenseTensor(name, Array.of(tensor.decode()))
            for name, tensor in self.source.tensors.items()
            if name.startswith(prefix)
        }
        leaves = _Leaves(self.sums)
        return DecoderLayer(Model(self.source.config, block), self.settings, index, leaves), leaves.weights

    def group(self, windows: torch.Tensor, first: int, on_block: Progress) -> None:
        """Add what ids int64 `[windows, tokens]` tell; the first is number `first` of all."""
        positions = self.decoder.positions(0, windows.shape[1])
        blocks = self.settings.num_layers
        inputs = [self.decoder.embedding.embedding(windows).float()]
        for index in range(blocks):
            inputs.append(self._outputs(index, inputs[-1], positions))
            on_block("sensitivity", index + 1, 2 * blocks)
        gradients = self._head_gradients(inputs.pop(), first)
        for index in reversed(range(blocks)):
            self._block_gradients(index, inputs.pop(), positions, gradients)
            on_block("sensitivity", 2 * blocks - index, 2 * blocks)
        self._embedding_gradients(windows, gradients)

    @torch.no_grad()
    def _outputs(self, index: int, inputs: torch.Tensor, positions: Positions) -> torch.Tensor:
        """What block `index` makes of `[windows, tokens, hidden_size]`, window by window."""
        layer, _ = self.layer(index)
        return torch.stack([layer(window[None], positions, None)[0] for window in inputs])

    def _block_gradients(self, index: int, inputs: torch.Tensor, positions: Positions, gradients: torch.Tensor) -> None:
        """Adds the share of block `index`, and takes `gradients` from behind it to before it, both as `inputs`."""
        layer, weights = self.layer(index)
        trials = {
            name: [self.sums[name].trial(weight, row_scale=row_scale) for row_scale in (True, False)]
            for name, weight in weights.items()
        }
        for number, gradient in enumerate(gradients):
            window = inputs[number, None].requires_grad_()
            of_window, *found = torch.autograd.grad(layer(window, positions, None), [window, *weights.values()], gradient[None])
            for name in weights:
                # Taken off the list: a matrix's gradient goes before the next window's are computed.
                of_weight = found.pop(0)
                scaled, flat = trials[name]
                self.sums[name].relative += _square_sum(of_weight * scaled)
                self.sums[name].flat += _square_sum(of_weight.mul_(flat))
            del of_weight
            gradients[number] = of_window[0]

    def _head_gradients(self, hidden: torch.Tensor, first: int) -> torch.Tensor:
        """Adds the head's share; gradients with respect to what flows into the last norm, `[windows, tokens, hidden_size]`."""
        weight = decoded(self.source.tensors[self.head]).float()
        sums = self.sums[self.head]
        with torch.no_grad():
            sums.energy += _energies(self.decoder.norm(hidden))
        errors = sums.trial(weight)
        gradients = torch.empty_like(hidden)
        for number, window in enumerate(hidden):
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + first + number)
            leaf = window.clone().requires_grad_()
            normed = self.decoder.norm(leaf)
            of_normed = torch.empty_like(window)
            with torch.no_grad():
                for begin in range(0, len(window), HEAD_TOKENS):
                    some = normed[begin : begin + HEAD_TOKENS]
                    probabilities = torch.softmax(some @ weight.t(), dim=-1)
                    signs = torch.randint(0, 2, probabilities.shape, generator=generator, dtype=torch.int8)
                    noise = probabilities.sqrt() * (2 * signs - 1)
                    noise -= probabilities * noise.sum(-1, keepdim=True)
                    of_normed[begin : begin + HEAD_TOKENS] = noise @ weight
                    # What all logits have in common changes nothing: here the whole covariance counts.
                    changes = some @ errors.t()
                    means = (probabilities * changes).sum(-1, keepdim=True)
                    sums.relative += float((probabilities * (changes - means).square_()).sum(dtype=torch.float64))
            gradients[number] = torch.autograd.grad(normed, leaf, of_normed)[0]
        return gradients

    def _embedding_gradients(self, windows: torch.Tensor, gradients: torch.Tensor) -> None:
        """Adds the share of the look-up; its product with the share of a tied head, which has either sign, is left out."""
        sums = self.sums[EMBEDDING]
        if self.head != EMBEDDING:
            sums.energy += 1.0
        errors = sums.trial(decoded(self.source.tensors[EMBEDDING]).float())
        for ids, gradient in zip(windows, gradients, strict=True):
            distinct, places = ids.unique(return_inverse=True)
            of_rows = torch.zeros(len(distinct), gradient.shape[1]).index_add_(0, places, gradient)
            sums.relative += _square_sum(of_rows * errors[distinct])


def _square_sum(values: torch.Tensor) -> float:
    return float(values.square_().sum(dtype=torch.float64))


def sensitive_tensors(model: Model) -> list[str]:
    """Names of the tensors that are measured: the matrices of the decoder blocks, the embedding and the head."""
    return [
        name
        for name, tensor in model.tensors.items()
        if len(tensor.shape) == 2 and (name in (EMBEDDING, HEAD) or name.startswith("model.layers."))
    ]


def sensitivity_windows(model: Model, text: str) -> torch.Tensor:
    """The windows of a calibration text to measure on, int64 `[windows, tokens]`, spread over the text.

    Raises what `calibration_windows` does.
    """
    windows = calibration_windows(model, text, MAX_WINDOWS)
    count = min(WINDOWS, len(windows))
    return windows[[(2 * number + 1) * len(windows) // (2 * count) for number in range(count)]]


def measure_sensitivities(
    source: Model, windows: torch.Tensor, *, seed: int = 0, on_progress: Progress = silent
) -> Mapping[str, Sensitivity]:
    """Sensitivity of every matrix of a decoder block, the embedding and the head, by name, on ids int64 `[windows, tokens]`.

    A tied embedding counts as look-up and as head. Raises UnsupportedError for an architecture the runtime does not know,
    InvalidFileError where tensors do not fit the configuration, InvalidRequestError for ids the model does not have.
    """
    measurement = _Measurement(source, seed)
    for row in windows.tolist():
        check_prompt(row, measurement.settings.vocab_size, measurement.settings.max_position_embeddings)
    groups = torch.split(windows, GROUP)
    for number, group in enumerate(groups):

        def on_block(stage: str, done: int, total: int, number: int = number) -> None:
            on_progress(stage, number * total + done, len(groups) * total)

        measurement.group(group, number * GROUP, on_block)
    result = {}
    half = 0.5 / windows.numel()
    for name, sums in measurement.sums.items():
        # Embedding and head are never without row scales.
        flat = sums.relative if name in (EMBEDDING, HEAD) else sums.flat
        result[name] = Sensitivity(_rounded(half * sums.relative), _rounded(half * flat))
    return result


def _rounded(value: float) -> float:
    """To three digits: what is beyond them is noise, and may depend on the machine."""
    return float(f"{value:.3g}")
