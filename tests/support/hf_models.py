"""Tiny random transformers models, their codebook versions, and the same models with decoded weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import transformers

import cluscomp_runtime.hf  # noqa: F401 - registers the quantizer
from cluscomp_formats.hf import write_hf
from cluscomp_formats.ir import Array, ClusteredWeight, Codebook, DenseTensor, Model, Outliers, Stage, Tensor

VOCABULARY = 96


def llama(**changes: Any) -> Any:
    settings = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 64,
    }
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**settings, **changes}))


def qwen3(vocab_size: int = VOCABULARY) -> Any:
    config = transformers.Qwen3Config(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=vocab_size,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    return transformers.Qwen3ForCausalLM(config)


def gpt2() -> Any:
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": VOCABULARY, "n_positions": 64}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))


def opt() -> Any:
    config = transformers.OPTConfig(
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=VOCABULARY,
        word_embed_proj_dim=16,
        max_position_embeddings=64,
    )
    return transformers.OPTForCausalLM(config)


def bert() -> Any:
    config = transformers.BertConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=VOCABULARY,
        max_position_embeddings=64,
    )
    return transformers.BertModel(config)


def random_weight(
    name: str, shape: tuple[int, int], group_axis: Literal["out", "in"] = "out", *, stages: int = 1, extras: bool = False
) -> ClusteredWeight:
    """Random codes into random codebooks, of about the size that a fresh model's weights have."""
    rng = np.random.default_rng(sum(name.encode()))
    along, across = shape if group_axis == "out" else shape[::-1]
    books = []
    for number in range(stages):
        values = rng.normal(0, 0.05, (19, 4)).astype(np.float16)
        codes = rng.integers(0, 19, (across, -(-along // 4))).astype(np.uint16)
        books.append(Stage(Codebook(f"{name}#{number}", Array.of(values)), Array.of(codes)))
    if not extras:
        return ClusteredWeight(name, shape, tuple(books), group_axis)
    positions = np.sort(rng.choice(shape[0] * shape[1], 5, replace=False)).astype(np.uint32)
    return ClusteredWeight(
        name,
        shape,
        tuple(books),
        group_axis,
        Array.of(rng.uniform(0.5, 2, shape[0]).astype(np.float32)),
        Array.of(rng.uniform(0.5, 2, shape[1]).astype(np.float32)),
        Outliers(Array.of(positions), Array.of(rng.normal(0, 0.3, 5).astype(np.float32))),
    )


def clustered_model(model: Any, clustered: Collection[ClusteredWeight]) -> Model:
    """The IR of a transformers model with some weights replaced by clustered ones, tied heads left out."""
    by_name = {weight.name: weight for weight in clustered}
    tied = set(model.all_tied_weights_keys)
    tensors: dict[str, Tensor] = {}
    for name, values in model.state_dict().items():
        if name in by_name:
            tensors[name] = by_name[name]
        elif name not in tied:
            tensors[name] = DenseTensor(name, Array.of(values.numpy()))
    config = {
        name: value for name, value in json.loads(model.config.to_json_string(use_diff=False)).items() if value is not None
    }
    return Model({**config, "architectures": [type(model).__name__]}, tensors)


def with_decoded_weights(model: Any, clustered: Collection[ClusteredWeight], dtype: torch.dtype = torch.float64) -> Any:
    """The model itself with the decoded weights in the place of its own: the oracle."""
    for weight in clustered:
        model.get_parameter(weight.name).data = torch.from_numpy(weight.decode())
    model.tie_weights()
    return model.to(dtype).eval()


def linear_names(model: Any) -> list[str]:
    """Names of the weights of the linears inside the layers."""
    kinds = (torch.nn.Linear, transformers.pytorch_utils.Conv1D)
    linears = [name for name, module in model.named_modules() if isinstance(module, kinds)]
    return [f"{name}.weight" for name in linears if any(part.isdigit() for part in name.split("."))]


SAFETY = 8.0
"""Room for other orders of summation, as in the self-test record."""


def ids() -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (2, 11), generator=torch.Generator().manual_seed(1))


def outputs(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Logits, or the last hidden state of an encoder."""
    with torch.no_grad():
        first: torch.Tensor = model(tokens)[0]
    return first


def expected_and_tolerance(model: Any, weights: list[ClusteredWeight]) -> tuple[torch.Tensor, float]:
    """Outputs in float64 of the model with decoded weights, and what float32 may differ from them.

    The same model in float32 shows how it amplifies rounding errors; see cluscomp_runtime.selftest.
    """
    exact = outputs(with_decoded_weights(model, weights, torch.float64), ids())
    rounded = outputs(with_decoded_weights(model, weights, torch.float32), ids())
    error = max((rounded - exact).abs().max().item(), torch.finfo(torch.float32).eps * exact.abs().max().item())
    return exact, SAFETY * error


EMBEDDINGS = {
    "llama": "model.embed_tokens.weight",
    "qwen3": "model.embed_tokens.weight",
    "gpt2": "transformer.wte.weight",
    "bert": "embeddings.word_embeddings.weight",
}
MODELS: dict[str, tuple[Callable[..., Any], Any]] = {
    "llama": (llama, transformers.AutoModelForCausalLM),
    "qwen3": (qwen3, transformers.AutoModelForCausalLM),
    "gpt2": (gpt2, transformers.AutoModelForCausalLM),
    "bert": (bert, transformers.AutoModel),
}


def weights_of(name: str, model: Any) -> list[ClusteredWeight]:
    """All linears of the layers, plain, with scales and outliers, and with two stages; and the embedding."""
    # Conv1D stores the transpose: kernels want the groups along its other axis.
    axis = "in" if name == "gpt2" else "out"
    weights = [
        random_weight(key, tuple(model.get_parameter(key).shape), axis, stages=1 + number % 2, extras=number % 3 == 0)
        for number, key in enumerate(linear_names(model))
    ]
    embedding = EMBEDDINGS[name]
    return [*weights, random_weight(embedding, tuple(model.get_parameter(embedding).shape), extras=True)]


def written(name: str, folder: Path) -> tuple[Any, list[ClusteredWeight], Model]:
    model = MODELS[name][0]()
    weights = weights_of(name, model)
    stored = clustered_model(model, weights)
    write_hf(stored, folder)
    return model, weights, stored
