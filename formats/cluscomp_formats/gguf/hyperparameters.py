"""The hyperparameters of a GGUF file, by the description of a model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from cluscomp_formats.architectures import (
    FAMILIES,
    Activation,
    DecoderDescription,
    Experts,
    Family,
    FeedForward,
    describe,
    find_family,
)
from cluscomp_formats.errors import InvalidFileError, InvalidRequestError, Problem, UnsupportedError
from cluscomp_formats.gguf.container_encoding import Value
from cluscomp_formats.gguf.rope import llama3_divisors

__all__ = [
    "ARCHITECTURES",
    "GEMMA3_PERIOD",
    "Hyperparameters",
    "base_architecture",
    "gemma3_attention_divisor",
    "read_hyperparameters",
]

_REMEDY = "write another format, such as packed"
_KNOWN = ("llama", "qwen2", "qwen3", "gemma3", "qwen3moe")
"""Architectures of which `_values` knows the keys and `_inexpressible` what llama.cpp computes differently."""

GEMMA3_PERIOD = 6
"""llama.cpp's Gemma 3 has a layer that sees all tokens after each five that see a window."""

ARCHITECTURES: dict[str, Family] = {}
"""Families by `general.architecture`. Mistral and SmolLM models are `llama` in GGUF."""
for _family in FAMILIES.values():
    if _family.gguf in _KNOWN:
        ARCHITECTURES.setdefault(_family.gguf, _family)


def base_architecture(config: Mapping[str, Any]) -> str | None:
    """What llama.cpp calls the model's architecture, otherwise its `model_type`; None if there is none."""
    family = find_family(config)
    if family is not None:
        return family.gguf
    model_type = config.get("model_type")
    return model_type if isinstance(model_type, str) else None


def gemma3_attention_divisor(num_layers: int, hidden_size: int, heads: int, head_dim: int) -> int:
    """By whose root llama.cpp divides the attention scores of Gemma 3: it takes 62 layers for the model of 27B."""
    return hidden_size // heads if num_layers == 62 else head_dim


@dataclass(frozen=True)
class Hyperparameters:
    """What a file says of a model with that description.

    `rope_divisors` float32 `[head_dim / 2]`: by what each rotary frequency is divided, None if by nothing or all by one factor.
    """

    architecture: str
    description: DecoderDescription
    metadata: Mapping[str, Value]
    rope_divisors: npt.NDArray[np.float32] | None


def read_hyperparameters(config: Mapping[str, Any]) -> Hyperparameters:
    """Check a configuration and read it.

    Raises UnsupportedError for what llama.cpp's architectures cannot express, InvalidRequestError naming each field that is
    missing or nonsensical.
    """
    family = find_family(config)
    if family is None or family.gguf not in ARCHITECTURES:
        known = (name for name, each in FAMILIES.items() if each.gguf in ARCHITECTURES)
        found, expected = repr(config.get("model_type"))[:80], ", ".join(known)
        message = "no GGUF architecture is known for this model_type"
        raise UnsupportedError(Problem("unknown_architecture", message, "config.json", None, found, expected, _REMEDY))
    try:
        description = describe(config)
    except InvalidFileError as error:
        raise InvalidRequestError(error.problems) from error
    except UnsupportedError as error:
        raise UnsupportedError([replace(problem, remedy=_REMEDY) for problem in error.problems]) from error
    problems = list(_inexpressible(config, description, family.gguf))
    if problems:
        raise UnsupportedError(problems)
    metadata = {f"{family.gguf}.{key}": value for key, value in _values(config, description, family.gguf).items()}
    return Hyperparameters(family.gguf, description, metadata, _rope_divisors(description))


def _inexpressible(config: Mapping[str, Any], description: DecoderDescription, architecture: str) -> Iterator[Problem]:
    """What llama.cpp would do otherwise than the description says."""

    def refused(name: str, expected: str, found: object = None) -> Problem:
        message = f"GGUF cannot express this value of {name}"
        found = repr(config.get(name) if found is None else found)[:80]
        return Problem("unsupported_config", message, "config.json", None, found, expected, _REMEDY)

    attentions = [attention for block in description.blocks for attention in block.attentions]
    networks = [network for block in description.blocks for network in block.networks]
    first = attentions[0]
    # llama.cpp's other architectures have no bias of the output projection; no published model has one either.
    if first.output.bias and architecture != "llama":
        yield refused("attention_bias", "false")
    gemma3 = architecture == "gemma3"
    activation: Activation = "gelu_tanh" if gemma3 else "silu"
    if any(expert.activation != activation for network in networks for expert in _feed_forwards(network)):
        yield refused("hidden_activation" if gemma3 else "hidden_act", "gelu_pytorch_tanh" if gemma3 else "silu or swish")
    if description.ropes[0].type == "llama3" and architecture != "llama":
        yield refused("rope_type", "default or linear", "llama3")
    if gemma3:
        windows = [(index + 1) % GEMMA3_PERIOD != 0 for index in range(description.num_layers)]
        if [attention.window is not None for attention in attentions] != windows:
            yield refused("layer_types", f"full_attention at each layer number {GEMMA3_PERIOD}, the others sliding_attention")
        divisor = gemma3_attention_divisor(description.num_layers, description.hidden_size, first.heads, first.head_dim)
        if not math.isclose(first.scale, 1.0 / math.sqrt(divisor)):
            yield refused("query_pre_attn_scalar", str(divisor), round(first.scale**-2, 6))
        if description.ropes[1].type != "default":
            yield refused("rope_parameters.sliding_attention", "rope_type default", description.ropes[1].type)
    if architecture == "qwen3moe":
        if not all(isinstance(network, Experts) for network in networks):
            message, expected = "some layers have no experts, which GGUF cannot express", "experts in each layer"
            fields = "decoder_sparse_step, mlp_only_layers"
            yield Problem("unsupported_config", message, "config.json", None, fields, expected, _REMEDY)
        if any(isinstance(network, Experts) and not network.normalised for network in networks):
            yield refused("norm_topk_prob", "true")


def _feed_forwards(network: FeedForward | Experts) -> tuple[FeedForward, ...]:
    return network.experts if isinstance(network, Experts) else (network,)


def _values(config: Mapping[str, Any], description: DecoderDescription, architecture: str) -> dict[str, Value]:
    block, rope = description.blocks[0], description.ropes[0]
    attention, network = block.attentions[0], block.networks[0]
    width, context = network.width, description.max_position_embeddings
    windows = [each.window for block in description.blocks for each in block.attentions if each.window is not None]
    if isinstance(network, Experts):
        # Of layers without experts, of which there are none.
        width = config.get("intermediate_size") or network.experts[0].width
    if windows and architecture != "gemma3":
        # Up to there attention is the same without a window.
        context = min(context, *windows)
    numbers = {
        "context_length": context,
        "embedding_length": description.hidden_size,
        "block_count": description.num_layers,
        "feed_forward_length": width,
        "attention.head_count": attention.heads,
        "attention.head_count_kv": attention.kv_heads,
        "attention.key_length": attention.head_dim,
        "attention.value_length": attention.head_dim,
        "rope.dimension_count": attention.head_dim,
        "vocab_size": description.vocab_size,
    }
    values = {key: Value("uint32", number) for key, number in numbers.items()}
    values["attention.layer_norm_rms_epsilon"] = Value("float32", description.norm.eps)
    values["rope.freq_base"] = Value("float32", rope.theta)
    if rope.type == "linear":
        values["rope.scaling.type"] = Value("string", "linear")
        values["rope.scaling.factor"] = Value("float32", rope.factor)
    if architecture == "gemma3":
        values["attention.sliding_window"] = Value("uint32", windows[0])
        values["rope.freq_base_swa"] = Value("float32", description.ropes[1].theta)
    if isinstance(network, Experts):
        values["expert_count"] = Value("uint32", len(network.experts))
        values["expert_used_count"] = Value("uint32", network.top_k)
        values["expert_feed_forward_length"] = Value("uint32", network.experts[0].width)
    return values


def _rope_divisors(description: DecoderDescription) -> npt.NDArray[np.float32] | None:
    rope, head_dim = description.ropes[0], description.blocks[0].attentions[0].head_dim
    if rope.type != "llama3":
        return None
    low, high = rope.low_freq_factor, rope.high_freq_factor
    return llama3_divisors(
        rope.theta, head_dim, factor=rope.factor, low=low, high=high, original_context=rope.original_context
    ).astype(np.float32)
