"""A decoder taken apart into its blocks, so that no more than half a block's matrices need be in memory, as float32."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from cluscomp_formats.ir import Array, DenseTensor, Model, Tensor
from cluscomp_runtime.architecture import DecoderSettings, check_tensors
from cluscomp_runtime.decoder import Decoder, DecoderLayer, Positions
from cluscomp_runtime.generate import check_prompt
from cluscomp_runtime.linear import MatrixBuilder

__all__ = ["BlockRunner"]


class BlockRunner:
    """The blocks of a model of a known architecture, in float32 on the CPU.

    Raises UnsupportedError for any other architecture, InvalidFileError where tensors do not fit the configuration.
    """

    def __init__(self, model: Model) -> None:
        self.settings = DecoderSettings.from_config(model.config)
        check_tensors(model, self.settings)
        self._config = model.config
        # This builder reads no matrix before it is used.
        builder = MatrixBuilder("reference", torch.float32, torch.device("cpu"))
        self._decoder = Decoder(model, self.settings, builder)

    @property
    def num_blocks(self) -> int:
        return self.settings.num_layers

    def embed(self, windows: torch.Tensor) -> torch.Tensor:
        """What flows into the first block, float32 `[windows, tokens, hidden_size]`, for ids int64 `[windows, tokens]`.

        Raises InvalidRequestError for ids outside the vocabulary and windows longer than the model allows.
        """
        for row in windows.tolist():
            check_prompt(row, self.settings.vocab_size, self.settings.max_position_embeddings)
        with torch.inference_mode():
            return self._decoder.embedding.embedding(windows)

    def half(
        self,
        index: int,
        half: int,
        tensors: Mapping[str, Tensor],
        observe: Callable[[str, torch.Tensor], None] | None = None,
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        """The attention (`half` 0) or the feed-forward network (1) of block `index` with its weights from `tensors`.

        Takes what flows in, `[windows, tokens, hidden_size]`, and gives what flows out: that plus what the half adds.
        `observe` is shown each matrix's name and its input `[windows, tokens, in_features]`; matrices with the same input are
        shown the same object, one after the other.
        """
        block = self.block(index, tensors)
        attention = f"model.layers.{index}.self_attn."
        decoded = {
            # Norms are small and in both halves.
            name: DenseTensor(name, Array.of(tensor.decode()))
            if len(tensor.shape) < 2 or name.startswith(attention) == (half == 0)
            else tensor
            for name, tensor in block.tensors.items()
        }
        builder = MatrixBuilder("reference", torch.float32, torch.device("cpu"), observe)
        layer = self.layer(index, Model(block.config, decoded), builder)

        def run(hidden: torch.Tensor) -> torch.Tensor:
            with torch.inference_mode():
                return layer.attend(hidden, self.positions(hidden), None) if half == 0 else layer.feed(hidden)

        return run

    def block(self, index: int, tensors: Mapping[str, Tensor]) -> Model:
        """The part of a model with these `tensors` that block `index` is."""
        prefix = f"model.layers.{index}."
        return Model(self._config, {name: tensor for name, tensor in tensors.items() if name.startswith(prefix)})

    def layer(self, index: int, model: Model, builder: MatrixBuilder) -> DecoderLayer:
        """Block `index` of `model`, its matrices as `builder` builds them."""
        return DecoderLayer(model, self.settings, index, builder)

    def positions(self, hidden: torch.Tensor) -> Positions:
        """What a block needs to know about `hidden` `[windows, tokens, hidden_size]`, on its device and in its dtype."""
        # The decoder keeps the tables it makes, and a training cannot use any that were made in inference mode.
        with torch.inference_mode(False):
            positions = self._decoder.positions(0, hidden.shape[1])
        masks = {window: None if mask is None else mask.to(hidden.device) for window, mask in positions.masks.items()}
        return Positions(positions.cosines.to(hidden), positions.sines.to(hidden), 0, masks)
