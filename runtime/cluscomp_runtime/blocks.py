"""A decoder run block by block over many windows: between two blocks only activations are kept.

Memory is bounded by one block's matrices as float32, the activations of all windows, and what one batch of them needs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from cluscomp_formats.ir import Array, DenseTensor, Model, Tensor
from cluscomp_runtime.architecture import DecoderSettings, check_tensors
from cluscomp_runtime.decoder import Decoder, DecoderLayer
from cluscomp_runtime.generate import check_prompt
from cluscomp_runtime.linear import MatrixBuilder

__all__ = ["BlockRunner"]

BATCH = 4
"""Windows run at a time."""


class BlockRunner:
    """The blocks of a model of a known architecture, in float32 on the CPU.

    Raises UnsupportedError for any other architecture, InvalidFileError where tensors do not fit the configuration.
    """

    def __init__(self, model: Model) -> None:
        self.settings = DecoderSettings.from_config(model.config)
        check_tensors(model, self.settings)
        self._config = model.config
        # This builder reads no matrix before it is used.
        self._decoder = Decoder(model, self.settings, self._builder(None))

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

    def run(
        self,
        index: int,
        tensors: Mapping[str, Tensor],
        hidden: torch.Tensor,
        observe: Callable[[str, torch.Tensor], None] | None = None,
    ) -> torch.Tensor:
        """What flows out of block `index` for `hidden` `[windows, tokens, hidden_size]`, with its weights from `tensors`.

        `observe` is shown each matrix's name and its input `[batch, tokens, in_features]`; matrices with the same input are
        shown the same object, one after the other.
        """
        prefix = f"model.layers.{index}."
        block = {
            name: DenseTensor(name, Array.of(tensor.decode())) for name, tensor in tensors.items() if name.startswith(prefix)
        }
        with torch.inference_mode():
            layer = DecoderLayer(Model(self._config, block), self.settings, index, self._builder(observe))
            positions = self._decoder.positions(0, hidden.shape[1])
            outgoing = torch.empty_like(hidden)
            for start in range(0, len(hidden), BATCH):
                outgoing[start : start + BATCH] = layer(hidden[start : start + BATCH], positions, None)
            return outgoing

    def _builder(self, observe: Callable[[str, torch.Tensor], None] | None) -> MatrixBuilder:
        return MatrixBuilder("reference", torch.float32, torch.device("cpu"), observe)
