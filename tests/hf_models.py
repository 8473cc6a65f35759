"""Tiny random transformers models, their codebook versions, and the same models with decoded weights."""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Any, Literal

import numpy as np
import torch
import transformers

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


def qwen3() -> Any:
    config = transformers.Qwen3Config(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=VOCABULARY,
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
