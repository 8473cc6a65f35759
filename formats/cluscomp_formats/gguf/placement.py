"""The tensors of a dense GGUF file: those of the decoder's description, with llama.cpp's names and in its order.

Files are compared with them when they are read, so a tensor that is missing, unknown or of another shape is reported. Written
files have exactly these tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from cluscomp_formats.architectures import DecoderDescription, TensorSpec

__all__ = ["Placed", "stored_tensors"]


@dataclass(frozen=True)
class Placed:
    """A tensor of a file: one tensor of the model, or a tensor of each expert of a layer, stacked along a new first axis."""

    parts: tuple[TensorSpec, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        first = self.parts[0]
        return first.shape if first.expert is None else (len(self.parts), *first.shape)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the model's tensors."""
        return tuple(part.name for part in self.parts)


def stored_tensors(description: DecoderDescription, *, head: bool) -> Mapping[str, Placed]:
    """Return every tensor of a file by GGUF name, in the order of the file; with or without a head."""
    specs = [*description.embedding.tensors()]
    for block in description.blocks:
        specs += sorted(block.tensors(), key=lambda spec: spec.role != "norm")
    specs += description.norm.tensors()
    if head:
        specs += description.head.tensors()
    parts: dict[str, list[TensorSpec]] = {}
    for spec in specs:
        parts.setdefault(spec.gguf_name, []).append(spec)
    return {name: Placed(tuple(found)) for name, found in parts.items()}
