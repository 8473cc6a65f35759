"""The hyperparameters of a GGUF file as the `config.json` of a Hugging Face model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from cluscomp_export.sources.gguf.decoding import PLAIN_DTYPES
from cluscomp_export.sources.gguf.rope import is_positive_float32, rope_config, shortest_float
from cluscomp_formats.errors import InvalidFileError, Problem, UnsupportedError
from cluscomp_formats.gguf.architectures import ARCHITECTURES, Architecture
from cluscomp_formats.gguf.container import StoredTensor

__all__ = ["build_config", "find_architecture"]


def find_architecture(file: str, metadata: Mapping[str, Any]) -> Architecture:
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
    architecture: Architecture,
    metadata: Mapping[str, Any],
    tensors: Mapping[str, StoredTensor],
    rope_divisors: npt.NDArray[np.float32] | None,
) -> dict[str, Any]:
    """The `config.json` of the model. `rope_divisors` is the content of `rope_freqs.weight`, if the file has one.

    Raises InvalidFileError for hyperparameters that are missing or contradict each other; UnsupportedError for mixtures of
    experts, partial rotation, and rotary scalings for which Hugging Face has no parameters.
    """
    keys = _Keys(file, architecture.name, metadata)
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
    if keys.problems:
        raise InvalidFileError(keys.problems)
    if metadata.get(f"{architecture.name}.expert_count"):
        found = f"{metadata[f'{architecture.name}.expert_count']} experts"
        raise UnsupportedError(Problem("experts", "a mixture of experts", file, None, found, "a dense model"))
    if value_dim != head_dim or rotated != head_dim:
        found = f"keys {head_dim}, values {value_dim}, rotated {rotated}"
        message = "heads whose keys, values and rotated part differ in size"
        raise UnsupportedError(Problem("head_sizes", message, file, None, found, "all equal"))

    embedding = tensors.get("token_embd.weight")
    vocabulary = metadata.get("tokenizer.ggml.tokens")
    config: dict[str, Any] = {
        "architectures": [architecture.class_name],
        "model_type": architecture.model_type,
        "torch_dtype": _dtype(embedding),
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads,
        "head_dim": head_dim,
        "max_position_embeddings": context,
        "rms_norm_eps": shortest_float(epsilon),
        "vocab_size": embedding.shape[0] if embedding is not None else len(vocabulary) if isinstance(vocabulary, list) else 0,
        "tie_word_embeddings": "output.weight" not in tensors,
        **rope_config(file, architecture.name, metadata, head_dim, rope_divisors),
    }
    if architecture.qkv_bias is None:
        config["attention_bias"] = "blk.0.attn_q.bias" in tensors
    if architecture.name == "llama":
        config["mlp_bias"] = "blk.0.ffn_gate.bias" in tensors
    window = metadata.get(f"{architecture.name}.attention.sliding_window")
    if window and window != context:
        message = "attention within a sliding window, which the file does not say which layers use"
        remedy = "use the Hugging Face checkpoint of this model"
        raise UnsupportedError(Problem("sliding_window", message, file, None, ascii(window)[:80], "none", remedy))
    for name in ("bos", "eos", "padding"):
        token = metadata.get(f"tokenizer.ggml.{name}_token_id")
        if isinstance(token, int):
            config[f"{'pad' if name == 'padding' else name}_token_id"] = token
    return config


def _dtype(embedding: StoredTensor | None) -> str:
    """The dtype the model computes in: that of a plain embedding, else float32, which quantised types decode to."""
    return PLAIN_DTYPES.get(embedding.type_name, "float32") if embedding is not None else "float32"
