"""A decoder taken apart: into blocks, and each block into two halves, so that few matrices need be in memory at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from cluscomp_formats.architectures import check_tensors, describe
from cluscomp_formats.ir import Model, Tensor
from cluscomp_runtime.decoder import Branch, Decoder, DecoderLayer, Positions, Routed
from cluscomp_runtime.generate import check_prompt
from cluscomp_runtime.linear import MatrixBuilder

__all__ = ["HALVES", "BlockRunner", "Half"]

HALVES = ("attention", "feed_forward")


class Half:
    """The attention or the feed-forward network of a block, in float32 and without gradients.

    `readers` names the matrices whose input is the normed residual stream, `writer` the one whose output is added to that
    stream. All activations are `[windows, tokens, features]`, on the device of the half.
    """

    def __init__(self, runner: BlockRunner, index: int, half: str, model: Model, device: torch.device) -> None:
        number = HALVES.index(half)
        described = runner.description.blocks[index].branches[number]
        first, last = described.part.steps
        self.readers, (self.writer,) = first.weights, last.weights
        self._runner = runner
        self._branch = Branch(model, described, index, MatrixBuilder("dense", torch.float32, device))

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """The residual stream behind the half."""
        return self.written(hidden, self.mixed(self.normed(hidden)))

    def normed(self, hidden: torch.Tensor) -> torch.Tensor:
        """What flows into the readers."""
        with torch.inference_mode():
            return self._branch.norm(hidden)

    def mixed(self, normed: torch.Tensor) -> torch.Tensor:
        """What flows into the writer."""
        with torch.inference_mode():
            mixed = self._branch.mix(normed, self._runner.positions(normed), None)
        if isinstance(mixed, Routed):
            raise TypeError("experts have an input each")
        return mixed

    def written(self, hidden: torch.Tensor, mixed: torch.Tensor) -> torch.Tensor:
        """The residual stream `hidden` with the writer's output added."""
        with torch.inference_mode():
            return self._branch.added(hidden, self._branch.project(mixed))


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
        """What flows into the first block, float32 `[windows, tokens, hidden_size]`, for ids int64 `[windows, tokens]`.

        Raises InvalidRequestError for ids outside the vocabulary and windows longer than the model allows.
        """
        for row in windows.tolist():
            check_prompt(row, self.description.vocab_size, self.description.max_position_embeddings)
        with torch.inference_mode():
            return self._decoder.embed(windows)

    def normed(self, hidden: torch.Tensor) -> torch.Tensor:
        """What flows into the head for what flows out of the last block, on the CPU."""
        with torch.inference_mode():
            return self._decoder.norm(hidden)

    def half(self, index: int, half: str, tensors: Mapping[str, Tensor], device: torch.device | str = "cpu") -> Half:
        """A half, one of `HALVES`, of block `index` with its weights from `tensors`, all decoded at once."""
        return Half(self, index, half, self.block(index, tensors), torch.device(device))

    def past(
        self, index: int, tensors: Mapping[str, Tensor], streams: Sequence[torch.Tensor], device: torch.device | str = "cpu"
    ) -> list[torch.Tensor]:
        """The residual streams behind block `index` for those before it, batches `[windows, tokens, hidden_size]` on the CPU;
        one half of the block is decoded at a time."""
        for name in HALVES:
            half = self.half(index, name, tensors, device)
            streams = [half(batch.to(device)).cpu() for batch in streams]
        return list(streams)

    def block(self, index: int, tensors: Mapping[str, Tensor]) -> Model:
        """The part of a model with these `tensors` that block `index` is."""
        prefix = self.description.blocks[index].prefix
        return Model(self._config, {name: tensor for name, tensor in tensors.items() if name.startswith(prefix)})

    def layer(self, index: int, model: Model, builder: MatrixBuilder) -> DecoderLayer:
        """Block `index` of `model`, its matrices as `builder` builds them."""
        return DecoderLayer(model, self.description.blocks[index], index, builder)

    def positions(self, hidden: torch.Tensor) -> Positions:
        """What a block needs to know about `hidden` `[windows, tokens, features]`, on its device and in its dtype."""
        # The decoder keeps the tables it makes, and a training cannot use any that were made in inference mode.
        with torch.inference_mode(False):
            positions = self._decoder.positions(0, hidden.shape[1])
        masks = {window: None if mask is None else mask.to(hidden.device) for window, mask in positions.masks.items()}
        # Copies: the tables may have been made in inference mode, and this may be for a training.
        rotations = [(cosines.to(hidden).clone(), sines.to(hidden).clone()) for cosines, sines in positions.rotations]
        return Positions(rotations, 0, masks)
