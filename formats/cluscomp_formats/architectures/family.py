"""A decoder family: what a value of `model_type` stands for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from cluscomp_formats.architectures.config_reader import ConfigReader
from cluscomp_formats.architectures.description import DecoderDescription

__all__ = ["Family"]


@dataclass(frozen=True)
class Family:
    """A family by its `model_type`.

    `class_name` is transformers' class of the language model, `gguf` llama.cpp's name of the architecture
    (`general.architecture`). `describe` reads a configuration; it notes in the reader what is wrong and raises nothing.
    """

    model_type: str
    class_name: str
    gguf: str
    describe: Callable[[ConfigReader, Family], DecoderDescription]
