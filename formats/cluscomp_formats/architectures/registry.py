"""The families there are, and the description of a model by its configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cluscomp_formats.architectures import gemma3, llama, qwen3_moe
from cluscomp_formats.architectures.config_reader import REMEDY, ConfigReader
from cluscomp_formats.architectures.description import DecoderDescription
from cluscomp_formats.architectures.family import Family
from cluscomp_formats.errors import Problem, UnsupportedError

__all__ = ["FAMILIES", "describe", "describe_loosely", "find_family"]

FAMILIES: Mapping[str, Family] = {
    family.model_type: family for module in (llama, gemma3, qwen3_moe) for family in module.FAMILIES
}
"""By `model_type`. A new family is a file beside this one, and here its module."""


def find_family(config: Mapping[str, Any]) -> Family | None:
    """The family of a model with this configuration, if it is known."""
    model_type = config.get("model_type")
    return FAMILIES.get(model_type) if isinstance(model_type, str) else None


def describe(config: Mapping[str, Any]) -> DecoderDescription:
    """Check a configuration and read it.

    Raises UnsupportedError for an unknown family and naming each field that the decoder cannot honour, InvalidFileError naming
    each field that is missing or nonsensical.
    """
    family = find_family(config)
    if family is None:
        message = "the decoder does not know this architecture (model_type)"
        found, expected = repr(config.get("model_type")), ", ".join(FAMILIES)
        raise UnsupportedError(Problem("unsupported_architecture", message, "config.json", None, found, expected, REMEDY))
    reader = ConfigReader(config)
    description = family.describe(reader, family)
    reader.raise_problems()
    return description


def describe_loosely(config: Mapping[str, Any]) -> DecoderDescription | None:
    """Describe a configuration without checking its fields; None for an unknown family.

    For what tensors are called. Shapes, and how many layers there are, are right only where `describe` raises nothing.
    """
    family = find_family(config)
    return None if family is None else family.describe(ConfigReader(config), family)
