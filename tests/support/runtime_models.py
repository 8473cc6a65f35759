"""Small models for the runtime's tests: transformers' as the oracle, random clustered ones, and a tokenizer."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.numpy import load_file

from cluscomp_formats.architectures import describe
from cluscomp_formats.ir import Array, ClusteredWeight, Codebook, DenseTensor, Model, Outliers, Stage, Tensor

EPSILON = torch.finfo(torch.float32).eps

SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}

ORACLES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-gqa": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-one-kv-head": ("llama", {"num_key_value_heads": 1}),
    "llama-multi-head": ("llama", {"num_key_value_heads": 4}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-head-dim": ("llama", {"head_dim": 14}),
    "llama-gelu": ("llama", {"hidden_act": "gelu"}),
    "llama-gelu-tanh": ("llama", {"hidden_act": "gelu_pytorch_tanh"}),
    "llama-linear-rope": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 3.0}}),
    "llama-llama3-rope": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
    ),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral-window": ("mistral", {"sliding_window": 5}),
    "qwen2": ("qwen2", {}),
    "qwen2-tied-window": (
        "qwen2",
        {"tie_word_embeddings": True, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    ),
    "qwen3": ("qwen3", {"head_dim": 20}),
    "qwen3-bias": ("qwen3", {"head_dim": 8, "attention_bias": True}),
    # The second layer sees everything, the others a window.
    "gemma3": ("gemma3_text", {"head_dim": 12, "query_pre_attn_scalar": 20, "sliding_window": 5, "sliding_window_pattern": 2}),
    "gemma3-linear-rope": (
        "gemma3_text",
        {
            "head_dim": 8,
            "attention_bias": True,
            "tie_word_embeddings": False,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 3.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 300.0},
            },
        },
    ),
    "qwen3-moe": (
        "qwen3_moe",
        {"head_dim": 8, "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 20, "norm_topk_prob": True},
    ),
    # The first layer has no experts by the step, the second by the list.
    "qwen3-moe-some-dense": (
        "qwen3_moe",
        {
            "num_experts": 5,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 12,
            "decoder_sparse_step": 2,
            "mlp_only_layers": [0],
            "use_sliding_window": True,
            "sliding_window": 6,
            "attention_bias": True,
        },
    ),
}


def oracle(name: str) -> tuple[transformers.PreTrainedModel, Model]:
    """A random transformers model in float32 and the same as an IR model of dense tensors."""
    with tempfile.TemporaryDirectory() as folder:
        peer = save_oracle(name, Path(folder))
        # As it is stored: in memory transformers merges experts.
        stored = load_file(Path(folder) / "model.safetensors")
        config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    return peer, dense_model(config, stored)


def save_oracle(name: str, folder: Path, **changes: object) -> transformers.PreTrainedModel:
    """A random transformers model in float32, which is written to a folder. `changes` are of its configuration."""
    model_type, options = ORACLES[name]
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(model_type, **{**SMALL, **options, **changes})
    peer = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager", experts_implementation="eager")
    with torch.no_grad():
        for parameter in peer.parameters():
            # Larger than the usual initialisation, so that attention, norms and biases all matter.
            parameter.copy_(torch.randn_like(parameter) * 0.3 + (1.0 if parameter.dim() == 1 else 0.0))
    peer.save_pretrained(folder)
    return peer.eval()


def token_ids(batch: int, tokens: int, vocab_size: int = 97) -> torch.Tensor:
    return torch.randint(0, vocab_size, (batch, tokens), generator=torch.Generator().manual_seed(3))


def rounding(single: torch.Tensor, double: torch.Tensor) -> float:
    """What float32 may differ by: 8 times the larger of what it was seen to differ by and one rounding of the result."""
    return 8 * max((single.double() - double).abs().max().item(), double.abs().max().item() * EPSILON)


def dense_model(
    config: Mapping[str, Any], tensors: Mapping[str, np.ndarray], files: Mapping[str, Array] | None = None
) -> Model:
    """An uncompressed model; a tied head is left out."""
    kept = {
        name: DenseTensor(name, Array.of(np.array(values)))
        for name, values in tensors.items()
        if not (name == "lm_head.weight" and config.get("tie_word_embeddings"))
    }
    return Model(json.loads(json.dumps(config, default=str)), kept, files or {})


def random_clustered(
    name: str,
    shape: tuple[int, int],
    random: np.random.Generator,
    *,
    cluster_dim: int = 4,
    num_clusters: int = 40,
    stages: int = 1,
    group_axis: str = "out",
    row_scale: bool = False,
    column_scale: bool = False,
    outliers: int = 0,
    codebook: Codebook | None = None,
    scale: float = 0.3,
) -> ClusteredWeight:
    """A clustered weight `(out_features, in_features)` with random codes and whatever features are asked for."""
    along, across = shape if group_axis == "out" else shape[::-1]
    made = []
    for index in range(stages):
        values = (random.standard_normal((num_clusters, cluster_dim)) * scale).astype(np.float16)
        used = codebook or Codebook(f"{name}.{index}", Array.of(values))
        codes = random.integers(0, used.num_clusters, (across, -(-along // used.cluster_dim)), dtype=np.uint16)
        made.append(Stage(used, Array.of(codes)))
    positions = np.sort(random.choice(shape[0] * shape[1], outliers, replace=False)).astype(np.uint32)
    corrections = random.standard_normal(outliers).astype(np.float16)
    return ClusteredWeight(
        name,
        shape,
        tuple(made),
        group_axis,  # type: ignore[arg-type]
        Array.of(random.uniform(0.5, 2.0, shape[0]).astype(np.float16)) if row_scale else None,
        Array.of(random.uniform(0.5, 2.0, shape[1]).astype(np.float16)) if column_scale else None,
        Outliers(Array.of(positions), Array.of(corrections)) if outliers else None,
    )


def clustered_model(config: Mapping[str, Any], files: Mapping[str, Array] | None = None, **features: Any) -> Model:
    """A model with every matrix clustered, `features` as in `random_clustered`; other tensors dense."""
    random = np.random.default_rng(1)
    tensors: dict[str, Tensor] = {}
    for name, spec in describe(config).tensors.items():
        if spec.role in ("matrix", "embedding", "head"):
            tensors[name] = random_clustered(name, (spec.shape[0], spec.shape[1]), random, **features)
        else:
            tensors[name] = DenseTensor(name, Array.of((1 + 0.2 * random.standard_normal(spec.shape)).astype(np.float32)))
    return Model(config, tensors, files or {})


def small_config(model_type: str = "llama", **options: Any) -> dict[str, Any]:
    """A config.json for a small model."""
    return {"model_type": model_type, **SMALL, **options}


def byte_tokenizer_files(**settings: Any) -> dict[str, Array]:
    """Side files of a tokenizer whose tokens are the 256 bytes, with `<s>` 256 and `</s>` 257."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    alphabet = {chr(code): index for index, code in enumerate(_byte_level_alphabet())}
    backend = tokenizers.Tokenizer(models.BPE(alphabet, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>"])
    config = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, **settings}
    return {
        "tokenizer.json": side_file(backend.to_str()),
        "tokenizer_config.json": side_file(json.dumps(config)),
    }


def _byte_level_alphabet() -> list[int]:
    """GPT-2's printable stand-in for each byte value: itself where printable, else 256 and up in order."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [byte if byte in printable else next(others) for byte in range(256)]


def side_file(text: str) -> Array:
    return Array.of(np.frombuffer(text.encode(), np.uint8))
