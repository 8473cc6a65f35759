"""A decoder taken apart into blocks, and each block into its branches, so that few matrices need be in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

from cluscomp_formats import architectures
from cluscomp_formats.architectures import check_tensors, describe
from cluscomp_formats.ir import Model, Tensor
from cluscomp_runtime.decoder import Branch, Decoder, DecoderLayer, Experts, Mixed, Positions
from cluscomp_runtime.generate import check_prompt
from cluscomp_runtime.linear import MatrixBuilder

__all__ = ["BlockBranch", "BlockRunner"]


class BlockBranch:
    """A branch of a block (attention, or a feed-forward network, or experts), in float32 and without gradients.

    `inputs` names the input projections, whose input is the normed residual stream, and `outputs` the output projections, whose
    sum is added to the stream. Projections of a group of `inputs` have the same input. With experts there is a group of each
    and an output projection of each, in the order of their numbers, and only the tokens that the router sends to an expert
    count. All activations are `[windows, tokens, features]`, on the device of the branch.
    """

    def __init__(
        self, runner: BlockRunner, index: int, described: architectures.Branch, model: Model, device: torch.device
    ) -> None:
        first, last = described.part.steps
        self.inputs = [tuple(linear.weight for linear in group) for group in first.groups]
        self.outputs = list(last.weights)
        self._runner = runner
        self._branch = Branch(model, described, index, MatrixBuilder("dense", torch.float32, device))
        self.has_post_norm = described.post_norm is not None
        """Whether a norm follows the output projections, before their output is added to the stream."""
        self.has_experts = isinstance(described.part, architectures.Experts)

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """The residual stream after the branch."""
        return self.added(hidden, self.projected(self.mixed(self.normed(hidden))))

    def normed(self, hidden: torch.Tensor) -> torch.Tensor:
        """The inputs of the input projections; `hidden` may as well be some tokens `[tokens, hidden_size]`."""
        with torch.inference_mode():
            return self._branch.norm(hidden)

    def chosen(self, normed: torch.Tensor) -> torch.Tensor:
        """The experts of each token, int64 `[windows, tokens, top_k]`."""
        with torch.inference_mode():
            return self._experts().route(normed)[1]

    def mixed(self, normed: torch.Tensor) -> Mixed:
        """The inputs of the output projections."""
        with torch.inference_mode():
            return self._branch.mix(normed, self._runner.positions(normed), None)

    def mixed_by(self, expert: int, normed: torch.Tensor) -> torch.Tensor:
        """The inputs that an expert's output projection would have if all tokens went to it."""
        with torch.inference_mode():
            return self._experts().experts[expert].mix(normed)

    def projected(self, mixed: Mixed) -> torch.Tensor:
        """Sum of the outputs of the output projections."""
        with torch.inference_mode():
            return self._branch.project(mixed)

    def added(self, hidden: torch.Tensor, projected: torch.Tensor) -> torch.Tensor:
        """The residual stream `hidden` with `projected` added, after the post norm if there is one."""
        with torch.inference_mode():
            return self._branch.added(hidden, projected)

    def _experts(self) -> Experts:
        if not isinstance(self._branch.part, Experts):
            raise TypeError("the branch has no experts")
        return self._branch.part


class BlockRunner:
    """The blocks of a model of a known architecture.

    Raises UnsupportedError for any other architecture, InvalidFileError where tensors do not fit the configuration.
    """

    def __init__(self, model: Model) -> None:
        self.description = describe(model.config)
        check_tensors(model, self.description, head=False)
        self._config = model.config
        # This builder reads no matrix before it is used.
        self._decoder = Decoder(model, self.description, MatrixBuilder("reference", torch.float32, torch.device("cpu")))

    @property
    def num_blocks(self) -> int:
        return self.description.num_layers

    def embed(self, windows: torch.Tensor) -> torch.Tensor:
        """Inputs of the first block, float32 `[windows, tokens, hidden_size]`, for ids int64 `[windows, tokens]`.

        Raises InvalidRequestError for ids outside the vocabulary and windows longer than the model allows.
        """
        for row in windows.tolist():
            check_prompt(row, self.description.vocab_size, self.description.max_position_embeddings)
        with torch.inference_mode():
            return self._decoder.embed(windows)

    def normed(self, hidden: torch.Tensor) -> torch.Tensor:
        """Inputs of the head, for outputs of the last block, on the CPU."""
        with torch.inference_mode():
            return self._decoder.norm(hidden)

    def branches(self, index: int, tensors: Mapping[str, Tensor], device: torch.device | str = "cpu") -> Iterator[BlockBranch]:
        """The branches of block `index` one after the other; each has its weights from `tensors`, all decoded at once."""
        for number in range(len(self.description.blocks[index].branches)):
            yield self.branch(index, number, tensors, device)

    def branch(self, index: int, number: int, tensors: Mapping[str, Tensor], device: torch.device | str = "cpu") -> BlockBranch:
        """Branch `number` of block `index`."""
        described = self.description.blocks[index].branches[number]
        return BlockBranch(self, index, described, self.block(index, tensors), torch.device(device))

    def past(
        self, index: int, tensors: Mapping[str, Tensor], streams: Sequence[torch.Tensor], device: torch.device | str = "cpu"
    ) -> list[torch.Tensor]:
        """The residual streams after block `index` for those before it, batches `[windows, tokens, hidden_size]` on the CPU;
        one branch of the block is decoded at a time."""
        for branch in self.branches(index, tensors, device):
            streams = [branch(batch.to(device)).cpu() for batch in streams]
        return list(streams)

    def block(self, index: int, tensors: Mapping[str, Tensor]) -> Model:
        """Block `index` of a model with these `tensors`, as a model of its own."""
        prefix = self.description.blocks[index].prefix
        return Model(self._config, {name: tensor for name, tensor in tensors.items() if name.startswith(prefix)})

    def layer(self, index: int, model: Model, builder: MatrixBuilder) -> DecoderLayer:
        """Block `index` of `model`, its matrices as `builder` builds them."""
        return DecoderLayer(model, self.description.blocks[index], index, builder)

    def positions(self, hidden: torch.Tensor) -> Positions:
        """Positions of the tokens of `hidden` `[windows, tokens, features]`, on its device and in its dtype."""
        # The decoder keeps the tables it makes, and a training cannot use any that were made in inference mode.
        with torch.inference_mode(False):
            positions = self._decoder.positions(0, hidden.shape[1])
        masks = {window: None if mask is None else mask.to(hidden.device) for window, mask in positions.masks.items()}
        # Copies: the tables may have been made in inference mode, and this may be for a training.
        rotations = [(cosines.to(hidden).clone(), sines.to(hidden).clone()) for cosines, sines in positions.rotations]
        return Positions(rotations, 0, masks)
