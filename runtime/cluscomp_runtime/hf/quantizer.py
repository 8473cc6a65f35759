"""The quantizer that transformers calls if `config.json` has `"quant_method": "cluscomp"`.

transformers loads the dense tensors, which are stored as usual. Our own reader reads and checks the clustered ones, from the
folder of the files that transformers found; transformers ignores their arrays as unexpected. If transformers needs a decoded
weight as a parameter, one of our converters supplies it.
"""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming, rename_source_key
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from cluscomp_formats.errors import InvalidFileError, InvalidRequestError, Problem
from cluscomp_formats.hf import open_hf
from cluscomp_formats.hf.spec import METHOD, RECORD
from cluscomp_formats.ir import ClusteredWeight, Model
from cluscomp_formats.sections.stored_arrays import part_key
from cluscomp_runtime.hf.dense_modules import make_dense
from cluscomp_runtime.hf.model_methods import attach_methods, detach_methods
from cluscomp_runtime.hf.modules import ClusteredModule, MatrixStore
from cluscomp_runtime.hf.replacement import Replacement, dtype_of, merged_values, replace_modules
from cluscomp_runtime.hf.stored_names import Merge
from cluscomp_runtime.linear import decoded

__all__ = ["ClusCompConfig", "ClusCompQuantizer"]

_ARRAYS = (
    r"\.codes(_\d+)?$",
    r"\.(row_scale|column_scale|outlier_positions|outlier_values)$",
    r"(^|\.)codebooks\.",
)
"""Patterns of the names of arrays of clustered weights."""


@register_quantization_config(METHOD)
class ClusCompConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """The unchanged `quantization_config` of a folder; our reader checks it."""

    def __init__(self, **settings: Any) -> None:
        self.__dict__.update(settings)
        self.quant_method = METHOD


@register_quantizer(METHOD)
class ClusCompQuantizer(HfQuantizer):  # type: ignore[misc]
    """Replaces modules before transformers loads the dense tensors, and prepares kernels afterwards."""

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
            message = "a codebook model must be loaded from its folder, not from a state dict"
            raise InvalidRequestError(Problem("no_folder", message, remedy="call from_pretrained with the folder"))
        folder = Path(checkpoint_files[0]).parent
        self.stored = open_hf(folder, weights_only=not (folder / RECORD).exists())
        self.replacement = replace_modules(model, self.stored, MatrixStore(), dtype or torch.get_default_dtype())
        patterns = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
        model._keys_to_ignore_on_load_unexpected = {*patterns, *_ARRAYS}
        _forbid_missing(model)

    def update_weight_conversions(self, weight_conversions: Any, *_: Any) -> Any:
        """Return the conversions, preceded by a converter for each parameter that gets a decoded weight.

        The converter matches the codes of the parameter's first weight, and the dense tensors that transformers would merge
        with it.
        """
        renamings = deepcopy([entry for entry in weight_conversions if isinstance(entry, WeightRenaming)])
        clustered = self.stored.clustered

        def converter(key: str, names: Sequence[str], values: Callable[[Any], dict[str, torch.Tensor]]) -> Any:
            first = next(name for name in names if name in clustered)
            found = [part_key(first, "codes"), *(name for name in names if name not in clustered)]
            patterns = [f"^{re.escape(rename_source_key(name, renamings, [])[0])}$" for name in found]
            return WeightConverter(patterns, key, operations=[_Decode(values)])

        ours = [
            converter(key, [weight.name], functools.partial(_decoded, key, weight))
            for key, weight in self.replacement.decoded.items()
        ]
        ours += [
            converter(merge.key, merge.names, functools.partial(_merged, self.stored, merge))
            for merge in self.replacement.merges
        ]
        return [*ours, *weight_conversions]

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> None:
        # The loaded weights are not trained; adapters have their own parameters.
        model.requires_grad_(requires_grad=False)
        builders = {}
        for module in self.replacement.modules.values():
            module.matrix()
            builders[id(module._builder)] = module._builder
        for builder in builders.values():
            if builder is not None:
                builder.warn_without_kernel()
        if self.replacement.decoded:
            names = [weight.name for weight in self.replacement.decoded.values()]
            _warn(names, "belong to modules of unsupported classes: they were decoded to dense")
        if self.replacement.merges:
            names = [name for merge in self.replacement.merges for name in merge.names if name in self.stored.clustered]
            size = sum(self.stored.tensors[name].num_weights for name in names) * model.dtype.itemsize
            _warn(names, f"are merged by transformers, as experts are: they were decoded to dense, {size / 1e6:.1f} MB")
        if self.replacement.unused:
            _warn(self.replacement.unused, f"have no place in {type(model).__name__}: they were not loaded")
        # Our converters are not reversible and cannot be pickled.
        model._weight_conversions = [entry for entry in model._weight_conversions if not _is_ours(entry)]
        attach_methods(model, self.stored, self.replacement)

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        """Replace all clustered modules by dense ones, for `model.dequantize()`; the result is an ordinary model."""
        make_dense(model, [module for module in model.modules() if isinstance(module, ClusteredModule)])
        detach_methods(model)
        return model if dtype is None else model.to(dtype)

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """True: adapters can be trained."""
        return True


class _Decode(ConversionOps):  # type: ignore[misc]
    """Converts any arrays to the parameters that `values(model)` returns, with the device and dtype of loaded parameters."""

    def __init__(self, values: Callable[[Any], dict[str, torch.Tensor]]) -> None:
        self.values = values

    def convert(self, input_dict: dict[str, Any], model: Any = None, **_: Any) -> dict[str, torch.Tensor]:
        arrays = next(iter(input_dict.values()))
        device = (arrays[0] if isinstance(arrays, list) else arrays).device
        made = self.values(model)
        dtypes = {key: dtype_of(model, key, model.get_parameter_or_buffer(key).dtype) for key in made}
        return {key: value.to(device, dtypes[key]) for key, value in made.items()}


def _is_ours(conversion: Any) -> bool:
    return any(isinstance(operation, _Decode) for operation in getattr(conversion, "operations", ()))


def _decoded(key: str, weight: ClusteredWeight, _: Any) -> dict[str, torch.Tensor]:
    return {key: decoded(weight)}


def _merged(stored: Model, merge: Merge, model: Any) -> dict[str, torch.Tensor]:
    return merged_values(model, stored, merge)


def _forbid_missing(model: Any) -> None:
    """Make loading fail if a parameter has no value in the folder; transformers would initialize it at random."""
    adjust = model._adjust_missing_and_unexpected_keys

    def check(loading_info: Any) -> None:
        del model._adjust_missing_and_unexpected_keys
        adjust(loading_info)
        message = f"{type(model).__name__} has a parameter that the folder has no value for"
        remedy = "load it with the class that config.json names in architectures"
        if loading_info.missing_keys:
            raise InvalidFileError(
                [Problem("missing_tensor", message, None, key, remedy=remedy) for key in sorted(loading_info.missing_keys)]
            )

    model._adjust_missing_and_unexpected_keys = check


def _warn(names: list[str], what: str) -> None:
    warnings.warn(f"{len(names)} clustered weights ({names[0]}, ...) {what}", stacklevel=2)
