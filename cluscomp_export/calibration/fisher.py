"""Gradients of a model's predictions, block by block: what the diagonal of the Fisher information is made of.

For small changes of anything a prediction depends on, the divergence of the model from itself is half the mean of the squared
gradient of the log-likelihood of labels the model draws, times the squared change. Instead of drawing labels, the gradient with
respect to a token's logits is `sqrt(p) * z - p * (sqrt(p) . z)` with random signs `z`, which has the same covariance `diag(p) -
p p^T`, varies less, and does not jump when a probability changes in its last bit. Every token's prediction counts alike.

Memory: one block's matrices as float32, what flows between blocks for a few windows, twice the largest matrix; each block is
computed again in the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from cluscomp_export.progress import Progress, silent
from cluscomp_formats.architectures import check_tensors, describe
from cluscomp_formats.ir import Array, DenseTensor, Model
from cluscomp_runtime.decoder import Decoder, DecoderLayer, Positions
from cluscomp_runtime.generate import check_prompt
from cluscomp_runtime.linear import MatrixBuilder, decoded

__all__ = ["EMBEDDING", "HEAD", "HEAD_TOKENS", "WINDOWS", "FisherPass", "head_name"]

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"

WINDOWS = 4
"""Windows of the calibration text that are enough."""
GROUP = 4
"""Windows that go through a block together: every group decodes every matrix twice."""
HEAD_TOKENS = 128
"""Tokens whose logits are in memory at a time."""


def head_name(model: Model) -> str:
    """The matrix that gives a decoder's logits: its head, or the embedding."""
    return HEAD if HEAD in model.tensors else EMBEDDING


class FisherPass:
    """Takes windows of a text through a model and gradients back; what is made of them is up to who inherits it.

    Raises UnsupportedError for an architecture the runtime does not know, InvalidFileError where tensors do not fit the
    configuration.
    """

    def __init__(self, source: Model, seed: int) -> None:
        self.source = source
        self.description = describe(source.config)
        check_tensors(source, self.description)
        # This builder reads no matrix before it is used.
        self.decoder = Decoder(source, self.description, MatrixBuilder("reference", torch.float32, torch.device("cpu")))
        self.head = head_name(source)
        self.seed = seed

    def run(self, windows: torch.Tensor, stage: str, on_progress: Progress = silent) -> None:
        """All of it for ids int64 `[windows, tokens]`. Raises InvalidRequestError for ids the model does not have."""
        for row in windows.tolist():
            check_prompt(row, self.description.vocab_size, self.description.max_position_embeddings)
        blocks = self.description.num_layers
        groups = torch.split(windows, GROUP)
        for number, group in enumerate(groups):
            before, total = 2 * blocks * number, 2 * blocks * len(groups)
            positions = self.decoder.positions(0, group.shape[1])
            inputs = [self.decoder.embed(group).float()]
            for index in range(blocks):
                inputs.append(self._outputs(index, inputs[-1], positions))
                on_progress(stage, before + index + 1, total)
            gradients = self._head_gradients(inputs.pop(), number * GROUP)
            for index in reversed(range(blocks)):
                self.block_gradients(index, inputs.pop(), positions, gradients)
                on_progress(stage, before + 2 * blocks - index, total)
            self.see_embedding(group, gradients)

    def layer(self, index: int, builder: MatrixBuilder) -> DecoderLayer:
        """Block `index`, its matrices built by `builder`."""
        block = self.description.blocks[index]
        tensors = {
            name: DenseTensor(name, Array.of(tensor.decode()))
            for name, tensor in self.source.tensors.items()
            if name.startswith(block.prefix)
        }
        return DecoderLayer(Model(self.source.config, tensors), block, index, builder)

    def builder(self) -> MatrixBuilder:
        """Builds the matrices of blocks in the forward pass."""
        raise NotImplementedError

    def block_gradients(self, index: int, inputs: torch.Tensor, positions: Positions, gradients: torch.Tensor) -> None:
        """Take `gradients` from behind block `index` to before it; both are as `inputs`, `[windows, tokens, hidden_size]`."""
        raise NotImplementedError

    def watch_head(self, hidden: torch.Tensor, weight: torch.Tensor) -> Callable[[torch.Tensor, torch.Tensor], None]:
        """What flows into the head's norm, `[windows, tokens, hidden_size]`, and the head's weight.

        What is returned is called with what flows into the head for some tokens, `[tokens, hidden_size]`, and the probabilities
        that come of it, `[tokens, vocab_size]`; it is not kept longer than the head's weight.
        """
        del hidden, weight
        return lambda normed, probabilities: None

    def see_embedding(self, windows: torch.Tensor, gradients: torch.Tensor) -> None:
        """Ids `[windows, tokens]` and gradients with respect to their embeddings, `[windows, tokens, hidden_size]`."""

    @torch.no_grad()
    def _outputs(self, index: int, inputs: torch.Tensor, positions: Positions) -> torch.Tensor:
        """What block `index` makes of `[windows, tokens, hidden_size]`, window by window."""
        layer = self.layer(index, self.builder())
        return torch.stack([layer(window[None], positions, None)[0] for window in inputs])

    def _head_gradients(self, hidden: torch.Tensor, first: int) -> torch.Tensor:
        """Gradients with respect to what flows into the last norm, `[windows, tokens, hidden_size]`; the first window is number
        `first` of all."""
        weight = decoded(self.source.tensors[self.head]).float()
        with torch.no_grad():
            see_predictions = self.watch_head(hidden, weight)
        gradients = torch.empty_like(hidden)
        for number, window in enumerate(hidden):
            generator = torch.Generator().manual_seed((self.seed * 1_000_003 + first + number) % 2**63)
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
                    see_predictions(some, probabilities)
            gradients[number] = torch.autograd.grad(normed, leaf, of_normed)[0]
        return gradients
