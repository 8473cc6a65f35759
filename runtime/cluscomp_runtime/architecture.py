"""What the decoder has to build: a Hugging Face `config.json` as checked settings, and the tensors they call for.

The decoder knows the Llama family. A configuration that asks for anything else is refused by field name; nothing is ignored
that would change the result.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from cluscomp_formats.errors import InvalidFileError, Problem, UnsupportedError
from cluscomp_formats.ir import FLOAT_DTYPES, DenseTensor, Model
from cluscomp_runtime.rope import RopeSettings

__all__ = ["MODEL_TYPES", "DecoderSettings", "check_tensors", "expected_tensors"]

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
"""Values of `model_type` the decoder can run. SmolLM and SmolLM2 are `llama`."""

ACTIVATIONS: dict[str, Literal["silu", "gelu", "gelu_tanh"]] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
ROPE_TYPES = ("default", "linear", "llama3")

REMEDY = "transformers may run it: cluscomp-export convert MODEL FOLDER --to hf (docs/hf-format.md)"
MAX_LAYERS = 4096
MAX_SIZE = 2**31 - 1


@dataclass(frozen=True)
class DecoderSettings:
    """The shape of a Llama-family decoder, in the field's usual names. Build it with `from_config`."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    activation: Literal["silu", "gelu", "gelu_tanh"]
    rope: RopeSettings
    windows: tuple[int | None, ...]
    """Sliding window of each layer in tokens, the current one included; None attends to everything before."""
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    tied: bool

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> DecoderSettings:
        """Check a configuration and read it.

        Raises UnsupportedError naming each field the decoder cannot honour, InvalidFileError naming each field that is
        missing or nonsensical.
        """
        model_type = config.get("model_type")
        if model_type not in MODEL_TYPES:
            expected = ", ".join(MODEL_TYPES)
            message = "the decoder does not know this architecture (model_type)"
            problem = Problem("unsupported_architecture", message, "config.json", None, repr(model_type), expected, REMEDY)
            raise UnsupportedError(problem)
        reader = _ConfigReader(config)
        settings = reader.settings(model_type)
        if reader.invalid:
            raise InvalidFileError(reader.invalid)
        if reader.unsupported:
            raise UnsupportedError(reader.unsupported)
        return settings


class _ConfigReader:
    """Reads fields with the defaults transformers gives them and collects what is wrong."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config
        self.invalid: list[Problem] = []
        self.unsupported: list[Problem] = []

    def settings(self, model_type: str) -> DecoderSettings:
        qwen = model_type in {"qwen2", "qwen3"}
        hidden_size = self.integer("hidden_size")
        num_heads = self.integer("num_attention_heads")
        num_kv_heads = self.integer("num_key_value_heads", num_heads)
        head_dim = self.integer("head_dim", 128 if model_type == "qwen3" else max(1, hidden_size // num_heads))
        num_layers = self.integer("num_hidden_layers", limit=MAX_LAYERS)
        context = self.integer("max_position_embeddings", {"llama": 2048, "mistral": 131072}.get(model_type, 32768))
        if num_heads % num_kv_heads:
            expected = f"a divisor of num_attention_heads ({num_heads})"
            self.invalid.append(_field("num_key_value_heads", num_kv_heads, expected))
        if head_dim % 2:
            self.refuse("head_dim", head_dim, "an even number")
        self.refuse_what_changes_the_result()
        attention_bias = model_type in {"llama", "qwen3"} and self.boolean("attention_bias", default=False)
        return DecoderSettings(
            model_type=model_type,
            vocab_size=self.integer("vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=self.integer("intermediate_size"),
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            max_position_embeddings=context,
            rms_norm_eps=self.number("rms_norm_eps", 1e-6),
            activation=self.activation(),
            rope=self.rope(context),
            windows=self.windows(num_layers, qwen=qwen, mistral=model_type == "mistral"),
            qkv_bias=attention_bias or model_type == "qwen2",
            output_bias=attention_bias,
            mlp_bias=model_type == "llama" and self.boolean("mlp_bias", default=False),
            qk_norm=model_type == "qwen3",
            tied=self.boolean("tie_word_embeddings", default=False),
        )

    def integer(self, name: str, default: int | None = None, limit: int = MAX_SIZE) -> int:
        value = self.config.get(name)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= limit:
            self.invalid.append(_field(name, value, f"an integer from 1 to {limit}"))
            return 1
        return value

    def number(self, name: str, default: float | None, source: Mapping[str, Any] | None = None) -> float:
        value = (self.config if source is None else source).get(name)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not (value > 0 and math.isfinite(value)):
            self.invalid.append(_field(name, value, "a positive number"))
            return 1.0
        return float(value)

    def boolean(self, name: str, *, default: bool) -> bool:
        value = self.config.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            self.invalid.append(_field(name, value, "true or false"))
            return default
        return value

    def refuse(self, name: str, found: object, expected: str) -> None:
        message = f"the decoder does not support this value of {name}"
        self.unsupported.append(Problem("unsupported_config", message, "config.json", None, repr(found), expected, REMEDY))

    def refuse_what_changes_the_result(self) -> None:
        for name in ("num_experts", "num_local_experts"):
            if self.config.get(name) not in (None, 0, 1):
                self.refuse(name, self.config[name], "no mixture of experts")
        if self.config.get("partial_rotary_factor") not in (None, 1):
            self.refuse("partial_rotary_factor", self.config["partial_rotary_factor"], "1.0")
        quantization = self.config.get("quantization_config")
        method = quantization.get("quant_method") if isinstance(quantization, Mapping) else quantization
        if method not in (None, "cluscomp"):
            self.refuse("quantization_config", method, "none, or cluscomp")

    def activation(self) -> Literal["silu", "gelu", "gelu_tanh"]:
        name = self.config.get("hidden_act") or "silu"
        if not isinstance(name, str) or name not in ACTIVATIONS:
            self.refuse("hidden_act", name, ", ".join(ACTIVATIONS))
            return "silu"
        return ACTIVATIONS[name]

    def rope(self, context: int) -> RopeSettings:
        """transformers 4 writes `rope_theta` and `rope_scaling`, transformers 5 `rope_parameters`, which holds both."""
        name = "rope_scaling" if self.config.get("rope_scaling") else "rope_parameters"
        parameters = self.config.get(name) or {}
        if not isinstance(parameters, Mapping):
            self.invalid.append(_field(name, parameters, "an object"))
            parameters = {}
        kind = parameters.get("rope_type", parameters.get("type", "default"))
        nested = any(isinstance(value, Mapping) for value in parameters.values())
        if nested or kind not in ROPE_TYPES:
            self.refuse(name, dict(parameters), f"one object with rope_type {', '.join(ROPE_TYPES)}")
            kind = "default"
        if parameters.get("partial_rotary_factor") not in (None, 1):
            self.refuse(f"{name}.partial_rotary_factor", parameters["partial_rotary_factor"], "1.0")
        theta = self.number("rope_theta", self.number("rope_theta", 10000.0), parameters)
        if kind == "default":
            return RopeSettings(theta)
        factor = self.number("factor", None, parameters)
        if kind == "linear":
            return RopeSettings(theta, "linear", factor)
        low = self.number("low_freq_factor", None, parameters)
        high = self.number("high_freq_factor", None, parameters)
        if high <= low:
            self.invalid.append(_field(f"{name}.high_freq_factor", high, f"more than low_freq_factor ({low})"))
        field = "original_max_position_embeddings"
        source = self.config if self.config.get(field) is not None else parameters
        original = self.number(field, float(context), source)
        return RopeSettings(theta, "llama3", factor, low, high, int(original))

    def windows(self, num_layers: int, *, qwen: bool, mistral: bool) -> tuple[int | None, ...]:
        in_use = mistral or (qwen and self.boolean("use_sliding_window", default=False))
        # Mistral's configuration has a window unless it says null; only a missing field means the default of 4096.
        if not in_use or ("sliding_window" in self.config and self.config["sliding_window"] is None):
            return (None,) * num_layers
        window = self.integer("sliding_window", 4096)
        if mistral:
            return (window,) * num_layers
        kinds = self.config.get("layer_types")
        if kinds is None:
            first = self.config.get("max_window_layers", 28)
            if isinstance(first, bool) or not isinstance(first, int) or first < 0:
                self.invalid.append(_field("max_window_layers", first, "an integer from 0"))
                first = 0
            return tuple(window if layer >= first else None for layer in range(num_layers))
        if not isinstance(kinds, list) or len(kinds) != num_layers:
            self.invalid.append(_field("layer_types", kinds, f"a list of {num_layers} names"))
            return (None,) * num_layers
        known = ("full_attention", "sliding_attention")
        unknown = [kind for kind in kinds if kind not in known]
        if unknown:
            self.refuse("layer_types", unknown[0], ", ".join(known))
        return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _field(name: str, found: object, expected: str) -> Problem:
    return Problem("invalid_config", f"{name} is missing or out of range", "config.json", None, repr(found)[:200], expected)


def expected_tensors(settings: DecoderSettings) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors the decoder needs; `lm_head.weight` not among them if the head is tied.

    Weights are `[out_features, in_features]`, embeddings `[vocab_size, hidden_size]`.
    """
    hidden, inner = settings.hidden_size, settings.intermediate_size
    queries, keys = settings.num_heads * settings.head_dim, settings.num_kv_heads * settings.head_dim
    linears = {
        "self_attn.q_proj": (queries, hidden, settings.qkv_bias),
        "self_attn.k_proj": (keys, hidden, settings.qkv_bias),
        "self_attn.v_proj": (keys, hidden, settings.qkv_bias),
        "self_attn.o_proj": (hidden, queries, settings.output_bias),
        "mlp.gate_proj": (inner, hidden, settings.mlp_bias),
        "mlp.up_proj": (inner, hidden, settings.mlp_bias),
        "mlp.down_proj": (hidden, inner, settings.mlp_bias),
    }
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (settings.vocab_size, hidden),
        "model.norm.weight": (hidden,),
    }
    for index in range(settings.num_layers):
        layer = f"model.layers.{index}"
        shapes[f"{layer}.input_layernorm.weight"] = (hidden,)
        shapes[f"{layer}.post_attention_layernorm.weight"] = (hidden,)
        for name, (out_features, in_features, bias) in linears.items():
            shapes[f"{layer}.{name}.weight"] = (out_features, in_features)
            if bias:
                shapes[f"{layer}.{name}.bias"] = (out_features,)
        if settings.qk_norm:
            shapes[f"{layer}.self_attn.q_norm.weight"] = (settings.head_dim,)
            shapes[f"{layer}.self_attn.k_norm.weight"] = (settings.head_dim,)
    if not settings.tied:
        shapes["lm_head.weight"] = (settings.vocab_size, hidden)
    return shapes


_HEAD = "lm_head.weight"
_IGNORED = re.compile(r"(?:model\.)?mtp\..*|.*rotary_emb\.inv_freq")
"""What the decoder leaves out, as transformers does: layers that predict further tokens at once, which training and some
servers use, and in old checkpoints the rotary frequencies, which follow from the configuration."""


def check_tensors(model: Model, settings: DecoderSettings, *, head: bool = True) -> None:
    """Hold a model's tensors against its settings.

    Without `head` only what gives the last hidden states is looked at: the embedding, the blocks and the last norm. A tied
    model may bring a head of its own, which then wins over the embedding.

    Raises InvalidFileError with every tensor that is missing or of a wrong shape or type; UnsupportedError for tensors of other
    names than the decoder's, with every tensor it would leave unused, and for a model without the head of a language model.
    """
    expected = expected_tensors(settings)
    expected.pop(_HEAD, None)
    if not expected.keys() & model.tensors.keys():
        message, found = "the tensors have other names than the decoder's", ", ".join(sorted(model.tensors)[:3])
        wanted = ", ".join([*expected][:3])
        raise UnsupportedError(Problem("other_names", message, None, None, f"{found}, ...", f"{wanted}, ...", REMEDY))
    if _HEAD in model.tensors:
        expected[_HEAD] = (settings.vocab_size, settings.hidden_size)
    wrong: list[Problem] = []
    for name, shape in expected.items():
        tensor = model.tensors.get(name)
        if tensor is None:
            wrong.append(Problem("missing_tensor", "the model lacks a tensor its configuration calls for", None, name))
        elif tuple(tensor.shape) != shape:
            wrong.append(Problem("wrong_shape", "wrong shape", None, name, str(tuple(tensor.shape)), str(shape)))
        elif isinstance(tensor, DenseTensor) and tensor.values.dtype not in FLOAT_DTYPES:
            wrong.append(Problem("wrong_dtype", "not a float", None, name, tensor.values.dtype, ", ".join(FLOAT_DTYPES)))
    if wrong:
        raise InvalidFileError(wrong)
    others = sorted(name for name in model.tensors if name not in expected and not _IGNORED.fullmatch(name))
    inside = [name for name in others if name.startswith("model.")]
    if inside:
        message = "the configuration has no use for this tensor; running without it could give wrong results"
        raise UnsupportedError([Problem("unused_tensor", message, None, name, remedy=REMEDY) for name in inside])
    if not head:
        return
    if others:
        message = "the model has another head than a language model's, and gives no next token"
        raise UnsupportedError([Problem("other_head", message, None, name, remedy=REMEDY) for name in others])
    if not settings.tied and _HEAD not in model.tensors:
        message = "the model has no head: it gives hidden states, as embedding models do, and no next token"
        raise UnsupportedError(Problem("no_head", message, None, _HEAD, "nothing", "a tensor, or a tied head", REMEDY))
