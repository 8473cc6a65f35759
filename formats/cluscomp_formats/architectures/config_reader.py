"""Reads fields of a `config.json` with the defaults that transformers gives them, and collects what is wrong."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cluscomp_formats.architectures.description import Activation, Rope
from cluscomp_formats.errors import InvalidFileError, Problem, UnsupportedError

__all__ = ["REMEDY", "ConfigReader", "Heads"]

REMEDY = "transformers may run it: cluscomp-export convert MODEL FOLDER --to hf (docs/hf-format.md)"
MAX_LAYERS = 4096
MAX_SIZE = 2**31 - 1

ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
ROPE_TYPES = ("default", "linear", "llama3")
LAYER_TYPES = ("full_attention", "sliding_attention")


@dataclass(frozen=True)
class Heads:
    """Sizes of an attention."""

    heads: int
    kv_heads: int
    head_dim: int


class ConfigReader:
    """Fields of `config`. One that is missing or nonsensical is noted, and a harmless value is given in its place.

    A field that asks for what the decoder cannot do is refused by name; nothing is ignored that would change the result.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config
        self.invalid: list[Problem] = []
        self.unsupported: list[Problem] = []

    def raise_problems(self) -> None:
        """Raises InvalidFileError with what is missing or nonsensical, else UnsupportedError with what is refused."""
        if self.invalid:
            raise InvalidFileError(self.invalid)
        if self.unsupported:
            raise UnsupportedError(self.unsupported)

    def integer(self, name: str, default: int | None = None, limit: int = MAX_SIZE) -> int:
        value = self.config.get(name)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= limit:
            self.bad(name, value, f"an integer from 1 to {limit}")
            return 1
        return value

    def number(self, name: str, default: float | None, source: Mapping[str, Any] | None = None) -> float:
        """A positive number, of `source` if that is given."""
        value = (self.config if source is None else source).get(name)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not (value > 0 and math.isfinite(value)):
            self.bad(name, value, "a positive number")
            return 1.0
        return float(value)

    def boolean(self, name: str, *, default: bool) -> bool:
        value = self.config.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            self.bad(name, value, "true or false")
            return default
        return value

    def bad(self, name: str, found: object, expected: str) -> None:
        """Note a field that is missing or nonsensical."""
        message = f"{name} is missing or out of range"
        self.invalid.append(Problem("invalid_config", message, "config.json", None, repr(found)[:200], expected))

    def refuse(self, name: str, found: object, expected: str) -> None:
        """Note a field that asks for what the decoder cannot do."""
        message = f"the decoder does not support this value of {name}"
        self.unsupported.append(Problem("unsupported_config", message, "config.json", None, repr(found), expected, REMEDY))

    def refuse_unless(self, name: str, allowed: tuple[object, ...], expected: str) -> None:
        """Refuse a field that is there and none of the values `allowed`."""
        found = self.config.get(name)
        if found is not None and found not in allowed:
            self.refuse(name, found, expected)

    def refuse_what_no_family_does(self) -> None:
        """Refuse weights that another tool has quantised, and rotary positions of some of the features only."""
        self.refuse_unless("partial_rotary_factor", (1,), "1.0")
        quantization = self.config.get("quantization_config")
        method = quantization.get("quant_method") if isinstance(quantization, Mapping) else quantization
        if method not in (None, "cluscomp"):
            self.refuse("quantization_config", method, "none, or cluscomp")

    def layers(self) -> int:
        return self.integer("num_hidden_layers", limit=MAX_LAYERS)

    def heads(self, hidden_size: int, head_dim: int | None = None) -> Heads:
        """Sizes of the attention; `head_dim` where the configuration does not say, by default hidden_size over heads."""
        heads = self.integer("num_attention_heads")
        kv_heads = self.integer("num_key_value_heads", heads)
        width = self.integer("head_dim", head_dim or max(1, hidden_size // heads))
        if heads % kv_heads:
            self.bad("num_key_value_heads", kv_heads, f"a divisor of num_attention_heads ({heads})")
        if width % 2:
            self.refuse("head_dim", width, "an even number")
        return Heads(heads, kv_heads, width)

    def activation(self, field: str = "hidden_act", default: str = "silu") -> Activation:
        name = self.config.get(field) or default
        if not isinstance(name, str) or name not in ACTIVATIONS:
            self.refuse(field, name, ", ".join(ACTIVATIONS))
            return "silu"
        return ACTIVATIONS[name]

    def rope(self, context: int) -> Rope:
        """The rotary positions of a model that has one kind of them.

        transformers 4 writes `rope_theta` and `rope_scaling`, transformers 5 `rope_parameters`, which holds both.
        """
        name = "rope_scaling" if self.config.get("rope_scaling") else "rope_parameters"
        return self.rope_of(name, self.config.get(name), self.number("rope_theta", 10000.0), context)

    def rope_of(self, name: str, parameters: object, theta: float, context: int) -> Rope:
        """Rotary positions by the `parameters` of the field `name`, with `theta` where they do not say."""
        parameters = parameters or {}
        if not isinstance(parameters, Mapping):
            self.bad(name, parameters, "an object")
            parameters = {}
        kind = parameters.get("rope_type", parameters.get("type", "default"))
        nested = any(isinstance(value, Mapping) for value in parameters.values())
        if nested or kind not in ROPE_TYPES:
            self.refuse(name, dict(parameters), f"one object with rope_type {', '.join(ROPE_TYPES)}")
            kind = "default"
        if parameters.get("partial_rotary_factor") not in (None, 1):
            self.refuse(f"{name}.partial_rotary_factor", parameters["partial_rotary_factor"], "1.0")
        theta = self.number("rope_theta", theta, parameters)
        if kind == "default":
            return Rope(theta)
        factor = self.number("factor", None, parameters)
        if kind == "linear":
            return Rope(theta, "linear", factor)
        low = self.number("low_freq_factor", None, parameters)
        high = self.number("high_freq_factor", None, parameters)
        if high <= low:
            self.bad(f"{name}.high_freq_factor", high, f"more than low_freq_factor ({low})")
        field = "original_max_position_embeddings"
        source = self.config if self.config.get(field) is not None else parameters
        original = self.number(field, float(context), source)
        return Rope(theta, "llama3", factor, low, high, int(original))

    def layer_types(self, num_layers: int) -> list[str] | None:
        """For each layer `full_attention` or `sliding_attention`; None if the configuration does not say."""
        kinds = self.config.get("layer_types")
        if kinds is None:
            return None
        if not isinstance(kinds, list) or len(kinds) != num_layers:
            self.bad("layer_types", kinds, f"a list of {num_layers} names")
            return ["full_attention"] * num_layers
        unknown = [kind for kind in kinds if kind not in LAYER_TYPES]
        if unknown:
            self.refuse("layer_types", unknown[0], ", ".join(LAYER_TYPES))
        return kinds
