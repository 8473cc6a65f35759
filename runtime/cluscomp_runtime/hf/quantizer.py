"""What transformers calls when `config.json` says `quant_method` `cluscomp`.

transformers loads the dense tensors, which are stored as usual. The clustered ones are read by our own reader, which checks
them, from the folder of the files that transformers found; to transformers their arrays are unexpected, and ignored.
"""

from __future__ import annotations

import functools
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from cluscomp_formats.errors import InvalidRequestError, Problem
from cluscomp_formats.hf import open_hf
from cluscomp_formats.hf.layout import METHOD, RECORD
from cluscomp_formats.ir import Model
from cluscomp_runtime.hf.modules import MatrixStore
from cluscomp_runtime.hf.replacement import Replacement, replace_modules
from cluscomp_runtime.hf.saving import save_pretrained

__all__ = ["ClusCompConfig", "ClusCompQuantizer"]

_ARRAYS = (
    r"\.codes(_\d+)?$",
    r"\.(row_scale|column_scale|outlier_positions|outlier_values)$",
    r"(^|\.)codebooks\.",
)
"""Patterns of the names of the arrays that our own reader reads."""


@register_quantization_config(METHOD)
class ClusCompConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """The `quantization_config` of a folder, as it is; our reader checks it."""

    def __init__(self, **settings: Any) -> None:
        self.__dict__.update(settings)
        self.quant_method = METHOD


@register_quantizer(METHOD)
class ClusCompQuantizer(HfQuantizer):  # type: ignore[misc]
    """Replaces modules before transformers loads the dense tensors, and prepares kernels afterwards. Inference only."""

    stored: Model
    replacement: Replacement

    def _process_model_before_weight_loading(
        self,
        model: Any,
        *,
        dtype: torch.dtype | None = None,
        checkpoint_files: list[str] | None = None,
        **_: Any,
    ) -> None:
        if not checkpoint_files:
            message = "a codebook model is loaded from its folder, not from a state dict"
            raise InvalidRequestError(Problem("no_folder", message, remedy="call from_pretrained with the folder"))
        folder = Path(checkpoint_files[0]).parent
        self.stored = open_hf(folder, weights_only=not (folder / RECORD).exists())
        self.replacement = replace_modules(model, self.stored, MatrixStore(), dtype or torch.get_default_dtype())
        _ignore(model, "_keys_to_ignore_on_load_unexpected", _ARRAYS)
        _ignore(model, "_keys_to_ignore_on_load_missing", [f"^{re.escape(key)}$" for key in self.replacement.decoded])

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> None:
        with torch.no_grad():
            for key, weight in self.replacement.decoded.items():
                parameter = model.get_parameter(key)
                parameter.copy_(torch.from_numpy(weight.decode()))
        # A prepared weight has no backward pass.
        model.requires_grad_(requires_grad=False)
        builders = {}
        for module in self.replacement.modules.values():
            module.matrix()
            builders[id(module._builder)] = module._builder
        for builder in builders.values():
            if builder is not None:
                builder.warn_without_kernel()
        if self.replacement.decoded:
            _warn(list(self.replacement.decoded), "belong to modules of classes of their own: they were decoded to dense")
        if self.replacement.unused:
            _warn(self.replacement.unused, f"have no place in {type(model).__name__}: they were not loaded")
        # transformers writes its own idea of the configuration and no side files; what is read back would be another model.
        model.save_pretrained = functools.partial(save_pretrained, model, self.stored)

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


def _ignore(model: Any, attribute: str, patterns: Any) -> None:
    setattr(model, attribute, {*(getattr(model, attribute, None) or ()), *patterns})


def _warn(names: list[str], what: str) -> None:
    warnings.warn(f"{len(names)} clustered weights ({names[0]}, ...) {what}", stacklevel=2)
