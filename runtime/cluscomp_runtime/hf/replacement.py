"""Find the module of a transformers model for each clustered weight, and replace it by a clustered module."""

from __future__ import annotations

import re
from copy import copy
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from cluscomp_formats.errors import InvalidFileError, Problem, UnsupportedError
from cluscomp_formats.ir import ClusteredWeight, Model
from cluscomp_runtime.hf.modules import ClusteredEmbedding, ClusteredLinear, ClusteredModule, MatrixStore, transposed
from cluscomp_runtime.hf.stored_names import Merge, Places, places_of
from cluscomp_runtime.linear import decoded

__all__ = ["Replacement", "dtype_of", "merged_values", "module_kind", "replace_modules"]

WEIGHT = ".weight"

_MODIFIED_WEIGHTS = {"rwkv": r"\.(attention\.output|feed_forward\.value)\.weight$"}
"""Weights, by model type, that the model's code modifies: RWKV halves some of its weights every few blocks for inference."""


@dataclass
class Replacement:
    """The changes made to a model.

    `places` has the place of every stored tensor in the model. `modules` are the clustered modules, by key of their weight.
    `decoded` are parameters of modules that cannot be replaced, by key: they get the decoded weight. `merges` are parameters
    that transformers computes from several tensors, some of them clustered. `unused` are clustered weights of parts that this
    model does not have, such as the head in a base model.
    """

    places: Places
    modules: dict[str, ClusteredModule] = field(default_factory=dict)
    decoded: dict[str, ClusteredWeight] = field(default_factory=dict)
    merges: list[Merge] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)


def replace_modules(model: Any, stored: Model, store: MatrixStore, dtype: torch.dtype) -> Replacement:
    """Replace the modules of `model`, a PreTrainedModel on the meta device, whose weights are clustered in `stored`.

    If a clustered weight is tied, both modules are replaced and share it. Raises InvalidFileError if a shape differs from the
    model's; UnsupportedError if a clustered weight belongs to a part of the model that has no module for it.
    """
    places = places_of(model, stored.tensors)
    done = Replacement(places)
    done.merges = [merge for merge in places.merges if any(name in stored.clustered for name in merge.names)]
    placed = {key: stored.clustered[name] for name, key in places.keys.items() if name in stored.clustered}
    unplaced = {name: key for name, key in places.unplaced.items() if name in stored.clustered}
    done.unused = [name for name, key in unplaced.items() if _is_of_another_model(model, key)]
    problems = [
        Problem(
            "no_module",
            f"{type(model).__name__} has this part, but no module for this weight",
            None,
            name,
            remedy="load it with the class and the version of transformers that the checkpoint was made for",
        )
        for name in unplaced
        if name not in done.unused
    ]
    if problems:
        raise UnsupportedError(problems)
    dense = {key for name, key in places.keys.items() if name not in stored.clustered}
    _share_tied_weights(model.all_tied_weights_keys, placed, dense)
    for key, weight in placed.items():
        found = tuple(model.get_parameter_or_buffer(key).shape)
        if found != weight.shape:
            message = "the model's configuration requires another shape"
            problems.append(Problem("wrong_shape", message, None, weight.name, str(weight.shape), str(found)))
            continue
        path = key.removesuffix(WEIGHT)
        modified = re.search(_MODIFIED_WEIGHTS.get(model.config.model_type, "$^"), key)
        module = model.get_submodule(path) if path != key and not modified else None
        ours = None if module is None else _clustered_module(module, weight, store, dtype_of(model, key, dtype))
        if ours is None:
            done.decoded[key] = weight
        else:
            model.set_submodule(path, ours)
            done.modules[key] = ours
    if problems:
        raise InvalidFileError(problems)
    return done


def merged_values(model: Any, stored: Model, merge: Merge) -> dict[str, torch.Tensor]:
    """Return the parameters, by key, that transformers computes from the decoded values of several stored tensors.

    Raises UnsupportedError if the computation fails.
    """
    tensors = (decoded(stored.tensors[name]) for name in merge.names)
    try:
        return merge.parameters(model, tensors)
    except (KeyError, ValueError, RuntimeError, AttributeError) as error:
        message = f"transformers cannot compute {merge.key} from this tensor and similar ones"
        remedy = "check that the checkpoint has all tensors and its own config.json"
        raise UnsupportedError(Problem("cannot_merge", message, None, merge.names[0], str(error), None, remedy)) from error


def _is_of_another_model(model: Any, key: str) -> bool:
    """Return whether `model` does not need a weight: transformers lists it as ignored, or the model lacks that part."""
    ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    if any(re.search(pattern, key) for pattern in ignored):
        return True
    prefix = model.base_model_prefix
    base = model._modules.get(prefix) or model
    part = (key.removeprefix(f"{prefix}.") if prefix else key).split(".")[0]
    return part not in model._modules and part not in base._modules


def _share_tied_weights(ties: dict[str, str], placed: dict[str, ClusteredWeight], dense: set[str]) -> None:
    """Assign the clustered weight of a tie to its keys that have no tensor of their own, and remove those ties."""
    for source in dict.fromkeys(ties.values()):
        group = [source, *(target for target, other in ties.items() if other == source)]
        clustered = [key for key in group if key in placed]
        if not clustered:
            continue
        for key in group:
            # A key that is tied to a dense source stays tied to it.
            if key != source and key not in placed and source in dense:
                continue
            if key not in placed and key not in dense:
                placed[key] = placed[clustered[0]]
            ties.pop(key, None)


def dtype_of(model: Any, key: str, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of a parameter of a model in `dtype`; transformers keeps some parameters in float32."""
    plan: dict[str, torch.dtype] = getattr(model, "_get_dtype_plan", lambda _: {})(dtype)
    return next((kept for pattern, kept in plan.items() if re.search(pattern.replace("*", ".*"), key)), dtype)


def _clustered_module(module: Any, weight: ClusteredWeight, store: MatrixStore, dtype: torch.dtype) -> ClusteredModule | None:
    """Return the clustered module that replaces `module`; None if its kind is not supported."""
    device = torch.device("meta")
    kind = module_kind(module)
    if kind == "linear":
        return ClusteredLinear(weight, store, dtype, device, module.bias)
    if kind == "conv1d":
        ours = ClusteredLinear(transposed(weight), store, dtype, device, module.bias)
        ours.transposed = True
        return ours
    if kind == "embedding":
        return ClusteredEmbedding(weight, store, dtype, device, module.padding_idx)
    return None


def module_kind(module: nn.Module) -> Literal["linear", "conv1d", "embedding"] | None:
    """Return the operation of a module on its weight: `x @ weight.T`, `x @ weight`, or a lookup of rows.

    None for other classes, including derived ones, which may do more, except for subclasses of `Linear` that only multiply.
    """
    if type(module) is nn.Linear or (isinstance(module, nn.Linear) and _only_multiplies(module)):
        return "linear"
    if type(module) is Conv1D:
        return "conv1d"
    return "embedding" if type(module) is nn.Embedding and module.max_norm is None else None


def _only_multiplies(module: nn.Linear) -> bool:
    """Return whether a subclass of `Linear`, such as Falcon's, only computes `x @ weight.T + bias` in its own way.

    This holds if the class defines only `forward`, the module has only the members of every linear, and `forward` gives the
    result of a linear for an example, in training and in evaluation.
    """
    kind = type(module)
    own = {name for name in vars(kind) if not name.startswith("__")}
    plain = nn.Linear(3, 2, bias=module.bias is not None, device="cpu", dtype=torch.float32)
    if kind.__mro__[1] is not nn.Linear or own - {"forward"} or vars(module).keys() - vars(plain).keys() - _FLAGS:
        return False
    if vars(plain)["_parameters"].keys() != module._parameters.keys() or module._buffers or module._modules:
        return False
    if any(getattr(module, hooks) for hooks in ("_forward_hooks", "_forward_pre_hooks")):
        return False
    probe = copy(plain)
    probe.__class__ = kind
    # transformers builds models with "meta" as the default device.
    x = torch.linspace(-1, 1, 12, device="cpu", dtype=torch.float32).reshape(4, 3)
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.copy_(torch.linspace(-2, 3, parameter.numel(), device="cpu").reshape(parameter.shape))
        expected = F.linear(x, plain.weight, plain.bias)
        try:
            return all(torch.allclose(probe.train(mode)(x), expected) for mode in (True, False))
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError):
            return False


_FLAGS = {"_is_hf_initialized"}
