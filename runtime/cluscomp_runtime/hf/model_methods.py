"""Methods of transformers' models that must handle clustered weights, attached to a loaded model."""

from __future__ import annotations

import functools
import warnings
from typing import Any

from cluscomp_formats.ir import ClusteredWeight, Model
from cluscomp_runtime.hf.dense_modules import make_dense
from cluscomp_runtime.hf.modules import ClusteredEmbedding, ClusteredModule
from cluscomp_runtime.hf.replacement import WEIGHT, Replacement
from cluscomp_runtime.hf.saving import Loaded, save_pretrained

__all__ = ["attach_methods", "detach_methods"]

_METHODS = (
    "save_pretrained",
    "resize_token_embeddings",
    "num_parameters",
    "get_memory_footprint",
    "get_expanded_tied_weights_keys",
)


def attach_methods(model: Any, stored: Model, replacement: Replacement) -> None:
    """Override methods of `model`, which has just been loaded from `stored`, with those of this module."""
    # transformers' own method would write a changed configuration and no side files, which gives another model.
    model.save_pretrained = functools.partial(save_pretrained, model, Loaded.snapshot(model, stored, replacement))
    model.resize_token_embeddings = functools.partial(_resize_token_embeddings, model)
    model.num_parameters = functools.partial(_num_parameters, model)
    model.get_memory_footprint = functools.partial(_get_memory_footprint, model)
    model.get_expanded_tied_weights_keys = functools.partial(_get_expanded_tied_weights_keys, model)


def detach_methods(model: Any) -> None:
    """Restore transformers' own methods and ties of `model`, which has no clustered modules any more."""
    for name in _METHODS:
        delattr(model, name)
    ties = model.get_expanded_tied_weights_keys(all_submodels=True)
    shared = {key: source for key, source in ties.items() if model.get_parameter(key) is model.get_parameter(source)}
    model.all_tied_weights_keys = shared


def _resize_token_embeddings(
    model: Any, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
) -> Any:
    """Decode a clustered embedding and head to dense, so that rows can be added, then resize as transformers does."""
    rows = model.get_input_embeddings().weight.shape[0]
    wanted = rows if new_num_tokens is None else new_num_tokens
    if pad_to_multiple_of:
        wanted = -(-wanted // pad_to_multiple_of) * pad_to_multiple_of
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    clustered = [end for end in ends if isinstance(end, ClusteredModule)]
    if wanted != rows and clustered:
        size = make_dense(model, clustered)
        names = ", ".join(dict.fromkeys(module.clustered.name for module in clustered))
        warnings.warn(f"{names}: decoded to dense for resizing, {size / 1e6:.1f} MB", stacklevel=2)
    return type(model).resize_token_embeddings(model, new_num_tokens, pad_to_multiple_of, mean_resizing)


def _num_parameters(model: Any, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
    """Count a clustered weight as the dense matrix it represents."""
    count: int = type(model).num_parameters(model, only_trainable, exclude_embeddings)
    if only_trainable:
        return count
    weights = _clustered_weights(model)
    if exclude_embeddings:
        tables = {id(module.clustered) for module in model.modules() if isinstance(module, ClusteredEmbedding)}
        weights = [weight for weight in weights if id(weight) not in tables]
    return count + sum(weight.num_weights for weight in weights)


def _get_memory_footprint(model: Any, return_buffers: bool = True) -> int:
    """Count clustered weights as stored, including codebooks; the kernels' layouts have about the same size."""
    weights = _clustered_weights(model)
    books = {stage.codebook.name: stage.codebook.values.nbytes for weight in weights for stage in weight.stages}
    dense: int = type(model).get_memory_footprint(model, return_buffers)
    return dense + sum(-(-weight.own_bits // 8) for weight in weights) + sum(books.values())


def _clustered_weights(model: Any) -> list[ClusteredWeight]:
    """Return the clustered weights, each once, even if several modules share it."""
    found = {module.clustered.name: module.clustered for module in model.modules() if isinstance(module, ClusteredModule)}
    return list(found.values())


def _get_expanded_tied_weights_keys(model: Any, all_submodels: bool = False) -> dict[str, str]:
    """Return the ties without those of clustered modules, which share their weight already."""
    ties: dict[str, str] = type(model).get_expanded_tied_weights_keys(model, all_submodels)
    clustered = {f"{name}{WEIGHT}" for name, module in model.named_modules() if isinstance(module, ClusteredModule)}
    return {key: source for key, source in ties.items() if key not in clustered and source not in clustered}
