"""Checkpoints whose tensors are not plain weights of a transformers model: quantised ones, adapters, Mistral's own format.

Without these checks, each would convert without an error into a file that no program can run.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from cluscomp_formats.errors import Problem, UnsupportedError

__all__ = ["adapter_problem", "refuse_foreign_tensors", "refuse_quantized_config"]

ADAPTER_CONFIG = "adapter_config.json"
_QUANTIZE_CONFIG = "quantize_config.json"
"""In folders of AutoGPTQ, which did not write to config.json."""

_QUANTIZED = re.compile(r".*\.(?:weight_scale|weight_scale_inv|weight_packed|qweight|qzeros|SCB)")
_BLOCKS, _SCALES = "_blocks", "_scales"
_ADAPTER = re.compile(r".*\.lora_(?:embedding_)?[AB](?:\..*)?")
_CONSOLIDATED = re.compile(r"layers\.\d+\.attention\.w[qkvo]\.weight")

_DEQUANTIZING = {
    "fp8": "FineGrainedFP8Config",
    "mxfp4": "Mxfp4Config",
    "compressed-tensors": "CompressedTensorsConfig",
}
"""Classes of transformers that decode a quantised checkpoint while loading it, by `quant_method`."""


def refuse_quantized_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Raises UnsupportedError for a configuration that says, at any depth, that the weights are quantised."""
    method = next(_methods(config), None)
    if method is None and (folder / _QUANTIZE_CONFIG).is_file():
        method = f"gptq ({_QUANTIZE_CONFIG})"
    if method is not None:
        raise UnsupportedError(_quantized(folder, None, method))


def _methods(config: Mapping[str, Any]) -> Iterator[str]:
    for key, value in config.items():
        if key in ("quantization_config", "compression_config") and value:
            yield str(value.get("quant_method", "unknown") if isinstance(value, Mapping) else value)
        elif isinstance(value, Mapping):
            yield from _methods(value)


def _quantized(folder: Path, tensor: str | None, method: str) -> Problem:
    message = "the checkpoint is already quantised: its packed weights are not plain matrices"
    remedy = "start from the checkpoint from which it was made"
    found = _DEQUANTIZING.get(method)
    if found is not None:
        load = f'from_pretrained(FOLDER, quantization_config={found}(dequantize=True), dtype="bfloat16")'
        remedy += "; if that is not available, decode this one first, in Python: "
        remedy += f"from transformers import AutoModelForCausalLM, {found}; "
        # By default transformers writes the format that it read.
        remedy += f"AutoModelForCausalLM.{load}.save_pretrained(NEW_FOLDER, save_original_format=False)"
    return Problem("already_quantized", message, str(folder), tensor, method, "none", remedy)


def refuse_foreign_tensors(folder: Path, names: Collection[str]) -> None:
    """Raises UnsupportedError for tensors whose names show that they are not a model's weights."""
    for name in names:
        blocks = name.endswith(_BLOCKS) and name.removesuffix(_BLOCKS) + _SCALES in names
        if blocks or _QUANTIZED.fullmatch(name):
            raise UnsupportedError(_quantized(folder, name, "mxfp4" if blocks else "unknown"))
        if _ADAPTER.fullmatch(name):
            raise UnsupportedError(adapter_problem(folder, name))
        if _CONSOLIDATED.fullmatch(name):
            message, remedy = "tensors of Mistral's own format", "use the model-*.safetensors files of the same repository"
            expected = "the names of transformers"
            raise UnsupportedError(Problem("foreign_names", message, str(folder), name, None, expected, remedy))


def adapter_problem(folder: Path, tensor: str | None = None) -> Problem:
    """The problem of an adapter, with the way to convert the model with it."""
    message = "a LoRA adapter, which is a change to a model and not a model"
    remedy = "merge it into its model first, in Python with peft: merge_and_unload().save_pretrained(NEW_FOLDER)"
    return Problem("adapter", message, str(folder), tensor, remedy=remedy)
