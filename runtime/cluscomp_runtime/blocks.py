"""A decoder taken apart: into blocks, and each block into two halves, so that few matrices need be in memory at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from cluscomp_formats.ir import Model, Tensor
from cluscomp_runtime.architecture import DecoderSettings, check_tensors
from cluscomp_runtime.decoder import Attention, Decoder, DecoderLayer, FeedForward, Positions, RMSNorm
from cluscomp_runtime.generate import check_prompt
from cluscomp_runtime.linear import MatrixBuilder

__all__ = ["HALVES", "BlockRunner", "Half", "steps_of_block"]

HALVES = ("attention", "feed_forward")

_MATRICES = {
    "attention": ("self_attn", ("q_proj", "k_proj", "v_proj"), "o_proj"),
    "feed_forward": ("mlp", ("gate_proj", "up_proj"), "down_proj"),
}


def steps_of_block(index: int) -> list[tuple[str, ...]]:
    """The matrices of block `index` in the order in which its activations flow: none of a group depends on another of it."""
    halves = [_MATRICES[half] for half in HALVES]
    steps = [(module, names) for module, readers, writer in halves for names in (readers, (writer,))]
    return [tuple(f"model.layers.{index}.{module}.{name}.weight" for name in names) for module, names in steps]


class Half:
    """The attention or the feed-forward network of a block, in float32 and without gradients.

    `readers` names the matrices whose input is the normed residual stream, `writer` the one whose output is added to that
    stream. All activations are `[windows, tokens, features]`, on the device of the half.
    """

    def __init__(self, runner: BlockRunner, index: int, half: str, model: Model, device: torch.device) -> None:
        prefix = f"model.layers.{index}"
        first = 2 * HALVES.index(half)
        self.readers, (self.writer,) = steps_of_block(index)[first : first + 2]
        self._runner = runner
        builder, settings = MatrixBuilder("dense", torch.float32, device), runner.settings
        norm = {"attention": "input_layernorm", "feed_forward": "post_attention_layernorm"}[half]
        self._norm = RMSNorm(builder.norm(model.tensors[f"{prefix}.{norm}.weight"]), settings.rms_norm_eps)
        self._part: Attention | FeedForward = (
            Attention(model, settings, index, builder) if half == "attention" else FeedForward(model, settings, index, builder)
        )

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """The residual stream behind the half."""
        return self.written(hidden, self.mixed(self.normed(hidden)))

    def normed(self, hidden: torch.Tensor) -> torch.Tensor:
        """What flows into the readers."""
        with torch.inference_mode():
            return self._norm(hidden)

    def mixed(self, normed: torch.Tensor) -> torch.Tensor:
        """What flows into the writer."""
        with torch.inference_mode():
            if isinstance(self._part, Attention):
                return self._part.mix(normed, self._runner.positions(normed), None)
            return self._part.mix(normed)

    def written(self, hidden: torch.Tensor, mixed: torch.Tensor) -> torch.Tensor:
        """The residual stream `hidden` with the writer's output added."""
        with torch.inference_mode():
            return hidden + (self._part.output if isinstance(self._part, Attention) else self._part.down)(mixed)


class BlockRunner:
    """The blocks of a model of a known architecture.

    Raises UnsupportedError for any other architecture, InvalidFileError where tensors do not fit the configuration.
    """

    def __init__(self, model: Model) -> None:
        self.settings = DecoderSettings.from_config(model.config)
        check_tensors(model, self.settings, head=False)
        self._config = model.config
        # This builder reads no matrix before it is used.
        self._decoder = Decoder(model, self.settings, MatrixBuilder("reference", torch.float32, torch.device("cpu")))

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
        prefix = f"model.layers.{index}."
        return Model(self._config, {name: tensor for name, tensor in tensors.items() if name.startswith(prefix)})

    def layer(self, index: int, model: Model, builder: MatrixBuilder) -> DecoderLayer:
        """Block `index` of `model`, its matrices as `builder` builds them."""
        return DecoderLayer(model, self.settings, index, builder)

    def positions(self, hidden: torch.Tensor) -> Positions:
        """What a block needs to know about `hidden` `[windows, tokens, features]`, on its device and in its dtype."""
        # The decoder keeps the tables it makes, and a training cannot use any that were made in inference mode.
        with torch.inference_mode(False):
            positions = self._decoder.positions(0, hidden.shape[1])
        masks = {window: None if mask is None else mask.to(hidden.device) for window, mask in positions.masks.items()}
        # Copies: the tables may have been made in inference mode, and this may be for a training.
        return Positions(positions.cosines.to(hidden).clone(), positions.sines.to(hidden).clone(), 0, masks)
