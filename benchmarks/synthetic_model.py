"""Llama models of random weights in many shards, of any shape: what the benchmarks of memory convert."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from cluscomp_formats.architectures import describe
from cluscomp_formats.safetensors.spec import Entry
from cluscomp_formats.safetensors.writer import header_bytes

__all__ = ["llama_config", "write_model"]


def llama_config(
    hidden: int, inner: int, layers: int, heads: int, kv_heads: int, vocabulary: int, **changes: Any
) -> dict[str, Any]:
    """A `config.json` with a tied head."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "num_hidden_layers": layers,
        "vocab_size": vocabulary,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        **changes,
    }


def write_model(folder: Path, config: dict[str, Any]) -> int:
    """Write the model in bfloat16, a shard per layer; its size in bytes. All matrices are cut from one random block."""
    shapes = {name: spec.shape for name, spec in describe(config).tensors.items()}
    shards: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        layer = name.split(".")[2] if name.startswith("model.layers.") else "rest"
        shards.setdefault(layer, {})[name] = shape
    largest = max(int(np.prod(shape)) for shape in shapes.values())
    generator = np.random.default_rng(0)
    values = generator.standard_normal(largest + 4096 * len(shards), dtype=np.float32) * np.float32(0.02)
    block = (values.view(np.uint32) >> 16).astype(np.uint16)
    weight_map: dict[str, str] = {}
    total = 0
    for number, shard in enumerate(shards.values(), 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        entries, position = {}, 0
        for name, shape in shard.items():
            end = position + 2 * int(np.prod(shape))
            entries[name] = Entry("bfloat16", shape, position, end)
            position = end
            weight_map[name] = file
        with (folder / file).open("wb") as stream:
            stream.write(header_bytes(entries))
            for place, shape in enumerate(shard.values()):
                start = 4096 * (number - 1) + 64 * place
                size = int(np.prod(shape))
                stream.write((np.full(size, 0x3F80, dtype=np.uint16) if len(shape) == 1 else block[start : start + size]).data)
            total += stream.tell()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config))
    return total
