"""Convert the `config.json` of a model of the Llama family to the hyperparameters of a GGUF file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cluscomp_formats.errors import InvalidRequestError, Problem, UnsupportedError
from cluscomp_formats.gguf.architectures import ARCHITECTURES, Architecture
from cluscomp_formats.gguf.container_encoding import Value
from cluscomp_formats.gguf.rope import llama3_divisors

__all__ = ["Hyperparameters", "base_architecture", "read_hyperparameters"]

_ALIASES = {"mistral": "llama"}
_MAX_INTEGER = 1 << 31
_REMEDY = "write another format, such as packed"


def base_architecture(config: Mapping[str, Any]) -> str | None:
    """Return llama.cpp's name of the model's architecture, by its `model_type`; None if there is none."""
    model_type = config.get("model_type")
    return _ALIASES.get(model_type, model_type) if isinstance(model_type, str) else None


@dataclass(frozen=True)
class Hyperparameters:
    """A checked configuration. `settings` has the fields that `architectures.expected_tensors` reads, including defaults.

    `rope_divisors` float32 `[head_dim / 2]` divide the rotary frequencies; None if they are unchanged or have a common factor.
    """

    architecture: Architecture
    settings: Mapping[str, Any]
    metadata: Mapping[str, Value]
    rope_divisors: npt.NDArray[np.float32] | None


def read_hyperparameters(config: Mapping[str, Any]) -> Hyperparameters:
    """Check a configuration and read it, with transformers' defaults for missing fields.

    Raises UnsupportedError if llama.cpp's Llama, Qwen2 and Qwen3 do not support a setting; InvalidRequestError, naming each
    field that is missing or out of range.
    """
    architecture = ARCHITECTURES.get(base_architecture(config) or "")
    if architecture is None:
        found, expected = repr(config.get("model_type"))[:80], ", ".join([*ARCHITECTURES, *_ALIASES])
        message = "no GGUF architecture is known for this model_type"
        raise UnsupportedError(Problem("unknown_architecture", message, "config.json", None, found, expected, _REMEDY))
    reader = _Reader(config)
    result = reader.hyperparameters(architecture)
    if reader.invalid:
        raise InvalidRequestError(reader.invalid)
    if reader.unsupported:
        raise UnsupportedError(reader.unsupported)
    return result


class _Reader:
    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config
        self.invalid: list[Problem] = []
        self.unsupported: list[Problem] = []

    def hyperparameters(self, architecture: Architecture) -> Hyperparameters:
        hidden = self.integer("hidden_size")
        heads = self.integer("num_attention_heads")
        key_heads = self.integer("num_key_value_heads", heads)
        head_dim = self.integer("head_dim", 128 if architecture.name == "qwen3" else max(1, hidden // heads))
        settings = {
            "hidden_size": hidden,
            "intermediate_size": self.integer("intermediate_size"),
            "vocab_size": self.integer("vocab_size"),
            "num_hidden_layers": self.integer("num_hidden_layers"),
            "num_attention_heads": heads,
            "num_key_value_heads": key_heads,
            "head_dim": head_dim,
            "tie_word_embeddings": bool(self.config.get("tie_word_embeddings", False)),
            "mlp_bias": architecture.name == "llama" and bool(self.config.get("mlp_bias", False)),
        }
        # Qwen2 always has biases; its configuration has no setting for them.
        if architecture.qkv_bias is None:
            settings["attention_bias"] = bool(self.config.get("attention_bias", False))
        if architecture.query_key_norms:
            # llama.cpp's Qwen3 has no bias of the output projection, and no published model has one.
            self.refuse_unless("attention_bias", (None, False))
        if heads % key_heads or head_dim % 2:
            found = f"{heads} heads, {key_heads} key heads, head_dim {head_dim}"
            self.invalid.append(
                Problem("bad_config", "the sizes of the attention are inconsistent", "config.json", None, found)
            )
        self.refuse_unless("hidden_act", ("silu", "swish"), "silu")
        self.refuse_unless("partial_rotary_factor", (None, 1, 1.0))
        for name in ("num_experts", "num_local_experts"):
            self.refuse_unless(name, (None, 0, 1))
        rope, divisors = self.rope(head_dim)
        numbers = {
            "context_length": self.context(architecture),
            "embedding_length": hidden,
            "block_count": settings["num_hidden_layers"],
            "feed_forward_length": settings["intermediate_size"],
            "attention.head_count": heads,
            "attention.head_count_kv": key_heads,
            "attention.key_length": head_dim,
            "attention.value_length": head_dim,
            "rope.dimension_count": head_dim,
            "vocab_size": settings["vocab_size"],
        }
        values = {key: Value("uint32", number) for key, number in numbers.items()}
        values["attention.layer_norm_rms_epsilon"] = Value("float32", self.number(self.config, "rms_norm_eps", 1e-6))
        metadata = {f"{architecture.name}.{key}": value for key, value in {**values, **rope}.items()}
        return Hyperparameters(architecture, settings, metadata, divisors)

    def integer(self, name: str, default: int | None = None) -> int:
        value = self.config.get(name)
        if value is None and default is not None:
            return default
        if type(value) is not int or not 0 < value < _MAX_INTEGER:
            self.bad(name, value, "a positive integer")
            return 1
        return value

    def number(self, source: Mapping[str, Any], name: str, default: float | None = None) -> float:
        value = source.get(name, default)
        if type(value) not in (int, float) or not 0 < value < 3e38:
            self.bad(name, value, "a positive number")
            return 1.0
        return float(value)

    def bad(self, name: str, found: object, expected: str) -> None:
        message = f"{name} is missing or out of range"
        self.invalid.append(Problem("bad_config", message, "config.json", None, repr(found)[:80], expected))

    def refuse_unless(self, name: str, allowed: tuple[object, ...], default: object = None) -> None:
        value = self.config.get(name, default)
        if value not in allowed:
            message = f"GGUF does not support this value of {name}"
            expected = " or ".join(map(repr, allowed))
            found = repr(value)[:80]
            self.unsupported.append(Problem("unsupported_config", message, "config.json", None, found, expected, _REMEDY))

    def context(self, architecture: Architecture) -> int:
        """Return the context length, at most that of a sliding window: up to there, the window does not change attention."""
        context = self.integer("max_position_embeddings", 2048)
        model_type = self.config["model_type"]
        sliding = model_type == "mistral" or (architecture.name != "llama" and self.config.get("use_sliding_window") is True)
        if not sliding or ("sliding_window" in self.config and self.config["sliding_window"] is None):
            return context
        return min(context, self.integer("sliding_window", 4096))

    def rope(self, head_dim: int) -> tuple[dict[str, Value], npt.NDArray[np.float32] | None]:
        """Read the rotary settings: `rope_theta` and `rope_scaling` (transformers 4) or `rope_parameters` (transformers 5)."""
        parameters = self.config.get("rope_scaling") or self.config.get("rope_parameters") or {}
        if not isinstance(parameters, Mapping):
            self.bad("rope_scaling", parameters, "an object")
            parameters = {}
        theta = self.number({**self.config, **parameters}, "rope_theta", 10000.0)
        values = {"rope.freq_base": Value("float32", theta)}
        kind = parameters.get("rope_type", parameters.get("type", "default"))
        if kind == "default":
            return values, None
        if kind not in ("linear", "llama3"):
            message = "GGUF does not support this rotary scaling, or defines it differently"
            found, expected = repr(kind)[:80], "default, linear or llama3"
            self.unsupported.append(Problem("rope_scaling", message, "config.json", None, found, expected, _REMEDY))
            return values, None
        factor = self.number(parameters, "factor")
        if kind == "linear":
            return {
                **values,
                "rope.scaling.type": Value("string", "linear"),
                "rope.scaling.factor": Value("float32", factor),
            }, None
        low, high = self.number(parameters, "low_freq_factor"), self.number(parameters, "high_freq_factor")
        original = self.number({**self.config, **parameters}, "original_max_position_embeddings")
        if high <= low:
            self.bad("high_freq_factor", high, f"more than low_freq_factor ({low})")
            return values, None
        divisors = llama3_divisors(theta, head_dim, factor=factor, low=low, high=high, original_context=int(original))
        return values, divisors.astype(np.float32)
