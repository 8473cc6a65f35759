"""Tiny models as transformers stores them, under names that are not those of its modules, with clustered weights."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from hf_models import VOCABULARY, random_weight
from safetensors.torch import load_file, save_file

from cluscomp_formats.hf import write_hf
from cluscomp_formats.ir import Array, DenseTensor, Model, Tensor

TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
}


def llava() -> Any:
    """Stored as `language_model.model.layers...`, which is `model.language_model.layers...`."""
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**TEXT),
        vision_config=transformers.CLIPVisionConfig(**VISION, projection_dim=32),
        image_token_index=VOCABULARY - 1,
    )
    return transformers.LlavaForConditionalGeneration(config)


def vit() -> Any:
    return transformers.ViTForImageClassification(transformers.ViTConfig(**VISION))


def gpt_neox() -> Any:
    """Its head is stored as `embed_out`."""
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    return transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**{name: TEXT[name] for name in names}))


def qwen3_moe() -> Any:
    """Its experts are stored one by one, and merged."""
    config = transformers.Qwen3MoeConfig(**TEXT, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=12)
    return transformers.Qwen3MoeForCausalLM(config)


def granitemoe() -> Any:
    """Its experts are stored merged, under other names."""
    sizes = {name: value for name, value in TEXT.items() if name != "head_dim"}
    config = transformers.GraniteMoeConfig(**sizes, num_local_experts=4, num_experts_per_tok=2)
    return transformers.GraniteMoeForCausalLM(config)


def llama4() -> Any:
    """A multimodal model whose text part has a class of its own and no dtype."""
    vision = {"vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32}
    config = transformers.Llama4Config(
        text_config={**TEXT, "intermediate_size_mlp": 48, "moe_layers": [], "num_local_experts": 2},
        vision_config={**VISION, "intermediate_size": 128, **vision},
    )
    return transformers.Llama4ForConditionalGeneration(config)


def t5() -> Any:
    """Four parameters share the embedding."""
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=VOCABULARY, **sizes))


def mamba() -> Any:
    """Reads the weight of a linear, `dt_proj`, itself."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "time_step_rank": 4}
    return transformers.MambaForCausalLM(transformers.MambaConfig(vocab_size=VOCABULARY, **sizes))


def rwkv() -> Any:
    """Halves some of its weights before it computes, and doubles them to be trained."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "attention_hidden_size": 32, "context_length": 64}
    return transformers.RwkvForCausalLM(transformers.RwkvConfig(vocab_size=VOCABULARY, **sizes, rescale_every=1))


def falcon() -> Any:
    """Its linears have a class of their own."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    return transformers.FalconForCausalLM(transformers.FalconConfig(vocab_size=VOCABULARY, **sizes))


@dataclass(frozen=True)
class Checkpoint:
    """`folder` holds the codebook model `stored`, `plain` the same model with decoded weights, as transformers has them."""

    stored: Model
    folder: Path
    plain: Path


def checkpoint(
    make: Callable[[], Any],
    folder: Path,
    clustered: str = r"\.\d+\.",
    dense: str = "$^",
    extra: dict[str, Tensor] | None = None,
) -> Checkpoint:
    """The matrices whose stored names match `clustered` and not `dense` get random codebooks; norms get random values, too."""
    torch.manual_seed(0)
    model = make()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    plain = folder / "plain"
    model.save_pretrained(plain)
    values = load_file(plain / "model.safetensors")
    tensors: dict[str, Tensor] = {}
    for name, value in values.items():
        if value.ndim == 2 and name.endswith(".weight") and re.search(clustered, name) and not re.search(dense, name):
            weight = random_weight(name, (value.shape[0], value.shape[1]))
            tensors[name], values[name] = weight, torch.from_numpy(weight.decode())
        else:
            tensors[name] = DenseTensor(name, Array.of(np.ascontiguousarray(value.numpy())))
    save_file(values, plain / "model.safetensors", metadata={"format": "pt"})
    stored = Model(json.loads((plain / "config.json").read_text()), tensors)
    write_hf(stored, folder / "m")
    return Checkpoint(stored, folder / "m", plain)


def run(model: Any) -> torch.Tensor:
    """Logits, or the last hidden state, for the same input every time."""
    generator = torch.Generator().manual_seed(1)
    if model.main_input_name == "pixel_values":
        inputs = {"pixel_values": torch.rand(1, 3, 16, 16, generator=generator)}
    else:
        inputs = {"input_ids": torch.randint(3, VOCABULARY - 4, (2, 9), generator=generator)}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = inputs["input_ids"][:, :5]
    with torch.no_grad():
        output: torch.Tensor = model.eval()(**inputs)[0]
    return output


def tolerance(expected: torch.Tensor) -> float:
    """What another order of summation may change of float32 results in models of a few layers: some units in the last place."""
    return 64 * torch.finfo(torch.float32).eps * max(1.0, expected.abs().max().item())
