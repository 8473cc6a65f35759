"""Which module of a transformers model takes which clustered weight, and the replacement of modules."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from cluscomp_formats.errors import InvalidFileError, Problem, UnsupportedError
from cluscomp_formats.ir import ClusteredWeight, Model
from cluscomp_runtime.hf.modules import ClusteredEmbedding, ClusteredLinear, ClusteredModule, MatrixStore, transposed

__all__ = ["Replacement", "candidates", "module_kind", "replace_modules"]

WEIGHT = ".weight"


@dataclass
class Replacement:
    """What was done to a model.

    `decoded` are parameters, by name, of modules of a class of their own: they get the decoded weight. `unused` are clustered
    weights of parts that this model does not have, such as the head in a base model.
    """

    modules: dict[str, ClusteredModule] = field(default_factory=dict)
    decoded: dict[str, ClusteredWeight] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)


def candidates(name: str, base_model_prefix: str) -> Iterator[str]:
    """Names that a stored tensor may have in a model: its own; with or without the prefix of the base model."""
    yield name
    if base_model_prefix:
        yield f"{base_model_prefix}.{name}"
        if name.startswith(f"{base_model_prefix}."):
            yield name.removeprefix(f"{base_model_prefix}.")


def replace_modules(model: Any, stored: Model, store: MatrixStore, dtype: torch.dtype) -> Replacement:
    """Replace the modules of `model`, a PreTrainedModel on the meta device, whose weights are clustered in `stored`.

    Ties with a clustered weight are taken over: both ends get modules of the same weight. Raises InvalidFileError for shapes
    that the model does not have, UnsupportedError for clustered weights that have no place in a part the model has.
    """
    done = Replacement()
    prefix = str(getattr(model, "base_model_prefix", ""))
    problems: list[Problem] = []
    placed: dict[str, ClusteredWeight] = {}
    for name, weight in stored.clustered.items():
        key = next((key for key in candidates(name, prefix) if _module(model, key) is not None), None)
        if key is not None:
            placed[key] = weight
        elif any(key.split(".")[0] in model._modules for key in candidates(name, prefix)):
            remedy = "load it with cluscomp_runtime.load, or convert the model with this weight left dense"
            message = f"{type(model).__name__} has this part, but no module for this weight"
            problems.append(Problem("no_module", message, None, name, remedy=remedy))
        else:
            done.unused.append(name)
    if problems:
        raise UnsupportedError(problems)
    dense = {key for name in stored.tensors if name not in stored.clustered for key in candidates(name, prefix)}
    for first, second in list(model.all_tied_weights_keys.items()):
        if first in placed or second in placed:
            # What has no weight of its own gets the other's.
            for key, other in ((first, second), (second, first)):
                if key not in placed and key not in dense:
                    placed[key] = placed[other]
            del model.all_tied_weights_keys[first]
    for key, weight in placed.items():
        module = model.get_submodule(key.removesuffix(WEIGHT))
        found = tuple(module.weight.shape)
        if found != weight.shape:
            message = "the model's configuration calls for another shape"
            problems.append(Problem("wrong_shape", message, None, weight.name, str(weight.shape), str(found)))
            continue
        ours = _clustered_module(module, weight, store, dtype)
        if ours is None:
            done.decoded[key] = weight
        else:
            model.set_submodule(key.removesuffix(WEIGHT), ours)
            done.modules[key] = ours
    if problems:
        raise InvalidFileError(problems)
    return done


def _module(model: Any, key: str) -> nn.Module | None:
    """The module with the parameter `key`, if it is called `weight`."""
    if not key.endswith(WEIGHT):
        return None
    try:
        module: nn.Module = model.get_submodule(key.removesuffix(WEIGHT))
    except AttributeError:
        return None
    return module if isinstance(module._parameters.get("weight"), nn.Parameter) else None


def _clustered_module(module: Any, weight: ClusteredWeight, store: MatrixStore, dtype: torch.dtype) -> ClusteredModule | None:
    """A module that takes the place of `module`; None for kinds that are not known here."""
    device = torch.device("meta")
    kind = module_kind(module)
    if kind == "linear":
        return ClusteredLinear(weight, store, dtype, device, module.bias)
    if kind == "conv1d":
        return ClusteredLinear(transposed(weight), store, dtype, device, module.bias)
    if kind == "embedding":
        return ClusteredEmbedding(weight, store, dtype, device, module.padding_idx)
    return None


def module_kind(module: nn.Module) -> Literal["linear", "conv1d", "embedding"] | None:
    """What a module does with its weight: `x @ weight.T`, `x @ weight`, or pick rows.

    None for classes of other names, which may do more, whatever they derive from.
    """
    if type(module) is nn.Linear:
        return "linear"
    if type(module) is Conv1D:
        return "conv1d"
    return "embedding" if type(module) is nn.Embedding and module.max_norm is None else None
