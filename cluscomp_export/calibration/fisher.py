"""Gradients of a model's predictions, block by block, for the diagonal of the Fisher information.

For a small change of a quantity on which predictions depend, the divergence of the changed model is the squared change times
half the mean squared gradient of the log-likelihood of labels drawn from the model. No labels are drawn here: the gradient with
respect to a token's logits is `sqrt(p) * z - p * (sqrt(p) . z)` with random signs `z`. It has the same covariance
`diag(p) - p p^T`, varies less, and does not jump when a probability changes in its last bit. All tokens count alike.

Memory: one block's matrices as float32, the activations between blocks for a few windows, twice the largest matrix. Each block
is computed again in the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from cluscomp_formats.architectures import check_tensors, describe
from cluscomp_formats.ir import Array, DenseTensor, Model
from cluscomp_formats.progress import Progress, silent
from cluscomp_runtime.decoder import Decoder, DecoderLayer, Positions
from cluscomp_runtime.generate import check_prompt
from cluscomp_runtime.linear import MatrixBuilder, decoded

__all__ = ["EMBEDDING", "HEAD", "HEAD_TOKENS", "WINDOWS", "FisherPass", "block_matrices", "head_name"]

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"

WINDOWS = 4
"""Number of calibration windows, which is enough."""
GROUP = 4
"""Windows that go through a block together. Every group decodes every matrix twice."""
HEAD_TOKENS = 128
"""Tokens whose logits are in memory at a time."""


def head_name(model: Model) -> str:
    """The matrix that gives a decoder's logits: its head, or the embedding."""
    return HEAD if HEAD in model.tensors else EMBEDDING


def block_matrices(model: Model) -> list[str]:
    """The matrices of the decoder blocks, routers of experts left out, in the order of the model."""
    specs = describe(model.config).tensors
    return [name for name in model.tensors if name in specs and specs[name].role == "matrix"]


class FisherPass:
    """Runs windows of a text forward through a model and gradients back; subclasses decide what to compute from them.

    Raises UnsupportedError for an architecture that the runtime does not know, InvalidFileError if tensors do not fit the
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
        """Run both passes for ids int64 `[windows, tokens]`. Raises InvalidRequestError for ids out of range."""
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
        """Block `index`, with matrices from `builder`."""
        block = self.description.blocks[index]
        tensors = {
            name: DenseTensor(name, Array.of(tensor.decode()))
            for name, tensor in self.source.tensors.items()
            if name.startswith(block.prefix)
        }
        return DecoderLayer(Model(self.source.config, tensors), block, index, builder)

    def builder(self) -> MatrixBuilder:
        """Return the builder of matrices in the forward pass."""
        raise NotImplementedError

    def block_gradients(self, index: int, inputs: torch.Tensor, positions: Positions, gradients: torch.Tensor) -> None:
        """Replace `gradients` after block `index` by those before it, in place; both are shaped as `inputs`."""
        raise NotImplementedError

    def watch_head(self, hidden: torch.Tensor, weight: torch.Tensor) -> Callable[[torch.Tensor, torch.Tensor], None]:
        """Observe the input of the last norm, `[windows, tokens, hidden_size]`, and the head's weight.

        The returned function is called with the head's input for some tokens, `[tokens, hidden_size]`, and the resulting
        probabilities, `[tokens, vocab_size]`. It is dropped together with the head's weight.
        """
        del hidden, weight
        return lambda normed, probabilities: None

    def see_embedding(self, windows: torch.Tensor, gradients: torch.Tensor) -> None:
        """Observe ids `[windows, tokens]` and gradients with respect to their embeddings, `[windows, tokens, hidden_size]`."""

    @torch.no_grad()
    def _outputs(self, index: int, inputs: torch.Tensor, positions: Positions) -> torch.Tensor:
        """The output of block `index` for inputs `[windows, tokens, hidden_size]`, computed window by window."""
        layer = self.layer(index, self.builder())
        return torch.stack([layer(window[None], positions, None)[0] for window in inputs])

    def _head_gradients(self, hidden: torch.Tensor, first: int) -> torch.Tensor:
        """Gradients with respect to the input of the last norm, `[windows, tokens, hidden_size]`; `first` is the number of the
        first window."""
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
