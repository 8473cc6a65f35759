"""The hyperparameters of a GGUF file as the `config.json` of a Hugging Face model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from cluscomp_export.sources.gguf.decoding import PLAIN_DTYPES
from cluscomp_export.sources.gguf.rope import is_positive_float32, rope_config, shortest_float
from cluscomp_formats.architectures import DecoderDescription, Family, describe, describe_loosely
from cluscomp_formats.errors import InvalidFileError, Problem, UnsupportedError
from cluscomp_formats.gguf.container import StoredTensor
from cluscomp_formats.gguf.hyperparameters import ARCHITECTURES, GEMMA3_PERIOD, gemma3_attention_divisor

__all__ = ["build_config", "description_of", "find_architecture"]


def find_architecture(file: str, metadata: Mapping[str, Any]) -> Family:
    """The file's architecture. Raises UnsupportedError for an unknown one, InvalidFileError if the file names none."""
    name = metadata.get("general.architecture")
    if not isinstance(name, str):
        raise InvalidFileError(Problem("missing_key", "the file names no architecture", file, expected="general.architecture"))
    if name not in ARCHITECTURES:
        remedy = "use the Hugging Face checkpoint of this model"
        message = "this architecture cannot be mapped to Hugging Face names"
        raise UnsupportedError(Problem("unknown_architecture", message, file, None, name, ", ".join(ARCHITECTURES), remedy))
    return ARCHITECTURES[name]


class _Keys:
    """Reads hyperparameters of the metadata, collecting what is missing or of the wrong type."""

    def __init__(self, file: str, arch: str, metadata: Mapping[str, Any]) -> None:
        self.file, self.arch, self.metadata = file, arch, metadata
        self.problems: list[Problem] = []

    def number(self, key: str, types: tuple[type, ...], default: float | None = None) -> Any:
        """A positive number, in the range of float32 if it is a float; 1 after recording a problem."""
        full = f"{self.arch}.{key}"
        value = self.metadata.get(full, default)
        if type(value) in types and (is_positive_float32(value) if type(value) is float else value > 0):
            return value
        found = "nothing" if value is None else ascii(value)[:80]
        problem = Problem("bad_key", f"the metadata key {full} is missing or not a positive number", self.file, found=found)
        self.problems.append(problem)
        return 1

    def integer(self, key: str, default: int | None = None) -> int:
        return int(self.number(key, (int,), default))


def build_config(
    file: str,
    family: Family,
    metadata: Mapping[str, Any],
    tensors: Mapping[str, StoredTensor],
    rope_divisors: npt.NDArray[np.float32] | None,
) -> dict[str, Any]:
    """The `config.json` of the model. `rope_divisors` is the content of `rope_freqs.weight`, if the file has one.

    Raises InvalidFileError for hyperparameters that are missing or contradict each other; UnsupportedError for mixtures of
    experts, partial rotation, and rotary scalings for which Hugging Face has no parameters.
    """
    keys = _Keys(file, family.gguf, metadata)
    hidden, heads = keys.integer("embedding_length"), keys.integer("attention.head_count")
    key_value_heads = keys.integer("attention.head_count_kv", heads)
    head_dim = keys.integer("attention.key_length", hidden // heads)
    rotated = keys.integer("rope.dimension_count", head_dim)
    value_dim = keys.integer("attention.value_length", head_dim)
    layers = keys.integer("block_count")
    inner, context = keys.integer("feed_forward_length"), keys.integer("context_length")
    epsilon = keys.number("attention.layer_norm_rms_epsilon", (float,))
    if heads % key_value_heads or head_dim % 2:
        found = f"{heads} heads, {key_value_heads} key heads, head_dim {head_dim}"
        keys.problems.append(Problem("bad_key", "the sizes of the attention contradict each other", file, found=found))
    if layers > len(tensors):
        found, expected = f"{layers} blocks", f"no more than its {len(tensors)} tensors"
        keys.problems.append(Problem("bad_key", "more blocks than tensors", file, None, found, expected))
    experts = _expert_fields(keys, inner) if family.gguf == "qwen3moe" else {}
    if keys.problems:
        raise InvalidFileError(keys.problems)
    if family.gguf != "qwen3moe" and metadata.get(f"{family.gguf}.expert_count"):
        found = f"{metadata[f'{family.gguf}.expert_count']} experts"
        raise UnsupportedError(Problem("experts", "a mixture of experts", file, None, found, "a dense model"))
    if value_dim != head_dim or rotated != head_dim:
        found = f"keys {head_dim}, values {value_dim}, rotated {rotated}"
        message = "heads whose keys, values and rotated part differ in size"
        raise UnsupportedError(Problem("head_sizes", message, file, None, found, "all equal"))

    embedding = tensors.get("token_embd.weight")
    tokens = metadata.get("tokenizer.ggml.tokens")
    vocabulary = len(tokens) if isinstance(tokens, list) and tokens else 1
    gemma3 = family.gguf == "gemma3"
    activation_field, activation = ("hidden_activation", "gelu_pytorch_tanh") if gemma3 else ("hidden_act", "silu")
    config: dict[str, Any] = {
        "architectures": [family.class_name],
        "model_type": family.model_type,
        "torch_dtype": _dtype(embedding),
        activation_field: activation,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads,
        "head_dim": head_dim,
        "max_position_embeddings": context,
        "rms_norm_eps": shortest_float(epsilon),
        # A file without an embedding is refused when its tensors are checked.
        "vocab_size": embedding.shape[0] if embedding is not None else vocabulary,
        "tie_word_embeddings": "output.weight" not in tensors,
        **rope_config(file, family.gguf, metadata, head_dim, rope_divisors),
    }
    config |= experts
    # Qwen2 has its biases whatever the configuration says.
    if family.gguf != "qwen2":
        config["attention_bias"] = "blk.0.attn_q.bias" in tensors
    if family.gguf == "llama":
        config["mlp_bias"] = "blk.0.ffn_gate.bias" in tensors
    window = metadata.get(f"{family.gguf}.attention.sliding_window")
    if gemma3:
        config |= _gemma3_fields(keys, config)
    elif window and window != context:
        message = "attention within a sliding window, which the file does not say which layers use"
        remedy = "use the Hugging Face checkpoint of this model"
        raise UnsupportedError(Problem("sliding_window", message, file, None, ascii(window)[:80], "none", remedy))
    for name in ("bos", "eos", "padding"):
        token = metadata.get(f"tokenizer.ggml.{name}_token_id")
        if isinstance(token, int):
            config[f"{'pad' if name == 'padding' else name}_token_id"] = token
    return config


def description_of(file: str, config: Mapping[str, Any]) -> DecoderDescription:
    """Return the description of the model. Raises InvalidFileError if sizes are out of range."""
    try:
        return describe(config)
    except InvalidFileError as error:
        raise InvalidFileError([replace(problem, file=file) for problem in error.problems]) from error
    except UnsupportedError:
        # The decoder does not run this model, because of a rotary scaling for example, but the tensors are the same.
        description = describe_loosely(config)
        if description is None:
            raise
        return description


def _expert_fields(keys: _Keys, inner: int) -> dict[str, Any]:
    """The fields of a mixture of experts in each layer, with probabilities divided by their sum as in llama.cpp."""
    count, used = keys.integer("expert_count"), keys.integer("expert_used_count")
    return {
        "num_experts": count,
        "num_experts_per_tok": used,
        "moe_intermediate_size": keys.integer("expert_feed_forward_length", max(1, inner // used)),
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def _gemma3_fields(keys: _Keys, config: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of Gemma 3 alone. What the file does not say is as llama.cpp assumes it."""
    layers, heads, head_dim = config["num_hidden_layers"], config["num_attention_heads"], config["head_dim"]
    window = keys.integer("attention.sliding_window")
    period = keys.integer("attention.sliding_window_pattern", GEMMA3_PERIOD)
    sliding_theta = keys.number("rope.freq_base_swa", (float,), 10000.0)
    capped = keys.metadata.get("gemma3.final_logit_softcapping", 0.0) != 0.0
    soft_cap = keys.number("final_logit_softcapping", (float,)) if capped else None
    if keys.problems:
        raise InvalidFileError(keys.problems)
    return {
        "query_pre_attn_scalar": gemma3_attention_divisor(layers, config["hidden_size"], heads, head_dim),
        "sliding_window": window,
        "layer_types": ["sliding_attention" if (index + 1) % period else "full_attention" for index in range(layers)],
        "rope_local_base_freq": shortest_float(sliding_theta),
        "final_logit_softcapping": soft_cap,
    }


def _dtype(embedding: StoredTensor | None) -> str:
    """The dtype the model computes in: that of a plain embedding, else float32, which quantised types decode to."""
    return PLAIN_DTYPES.get(embedding.type_name, "float32") if embedding is not None else "float32"
