"""What of a transformers model changed since it was loaded from a folder of ours, as tensors and settings of that folder."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from copy import deepcopy
from typing import Any

import numpy as np
import torch

from cluscomp_formats.errors import InvalidRequestError, Problem
from cluscomp_formats.ir import Array, DenseTensor, Model, Tensor
from cluscomp_runtime.hf.modules import ClusteredModule
from cluscomp_runtime.hf.replacement import WEIGHT, Replacement, merged_values
from cluscomp_runtime.hf.stored_names import Merge
from cluscomp_runtime.linear import decoded

__all__ = ["changed_config", "changed_tensors"]

_OF_LOADING = ("_attn_implementation", "_name_or_path", "architectures", "dtype", "quantization_config", "transformers_version")
"""Settings that say how a model was loaded, not what it is."""

_REMEDY = "save adapters by themselves (PeftModel.save_pretrained), or call model.dequantize() and save an ordinary model"


def changed_tensors(model: Any, stored: Model, replacement: Replacement) -> dict[str, Tensor]:
    """The tensors to write in the place of those of `stored` of the same names, and new ones: all that `model` has otherwise.

    Looks at every parameter and persistent buffer. Raises InvalidRequestError for what the folder has no name for, for what is
    gone, and for what is not in memory.
    """
    state = {key: value for key, value in model.state_dict(keep_vars=True).items() if isinstance(value, torch.Tensor)}
    problems = [_cannot_save(key, "is not in memory") for key, value in state.items() if value.is_meta]
    changed: dict[str, torch.Tensor] = {}
    seen: set[str] = set()
    for name, key in replacement.places.keys.items():
        if key in state:
            seen.add(key)
            if not problems and _differ(state[key], decoded(stored.tensors[name])):
                changed[name] = state[key]
        elif not isinstance(_module(model, key), ClusteredModule):
            problems.append(_cannot_save(key, "has been replaced"))
    for merge in [] if problems else replacement.places.merges:
        made = merged_values(model, stored, merge)
        seen.update(made)
        gone = [key for key in made if key not in state]
        problems += [_cannot_save(key, "has been replaced") for key in gone]
        if not gone and any(_differ(state[key], value) for key, value in made.items()):
            parts = _unmerged(model, merge, {key: state[key] for key in made})
            problems += [] if parts else [_cannot_save(merge.key, "has changed, and is made of several stored tensors")]
            changed |= parts
    known = {id(state[key]) for key in seen if key in state}
    optional = [*(model._keys_to_ignore_on_load_missing or ()), *(model._keys_to_ignore_on_save or ())]
    new = [key for key, value in state.items() if key not in seen and id(value) not in known]
    new = [key for key in new if not any(re.search(pattern, key) for pattern in optional)]
    expected = _fresh(model, model.config.to_dict()).state_dict() if new else {}
    for key in new:
        if key in expected and key not in stored.tensors:
            changed[key] = state[key]
        else:
            problems.append(_cannot_save(key, "has no name in the folder that was loaded"))
    if problems:
        raise InvalidRequestError(problems)
    return {name: DenseTensor(name, _array(value)) for name, value in changed.items()}


def changed_config(model: Any, stored: Mapping[str, Any], loaded: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration to write: `stored` with the settings that `model` has otherwise, since it was loaded or given to load.

    `loaded` is what transformers made of it. Raises InvalidRequestError for settings that contradict the weights, or that
    would not be read back as they are.
    """
    now = model.config.to_dict()
    config = deepcopy(dict(stored))
    part = _part_of(config, model.config.model_type)
    if part is None:
        wrong = {path[0] for path, _ in _edits(loaded, now)}
    else:
        try:
            before = _fresh(model, part).config.to_dict()
        except InvalidRequestError:
            before = loaded
        edits = dict(_edits(before, now))
        if not edits:
            return config
        for path, value in edits.items():
            _set(part, path, json.loads(json.dumps(model.config._encode_special_floats(value), default=str)))
        again = _fresh(model, part, edits)
        wrong = {path[0] for path, _ in _edits(again.config.to_dict(), now)}
        wrong |= {path[0] for path in edits} if _shapes(again) != _shapes(model) else set()
    if wrong:
        raise _contradiction(wrong, "it contradicts the weights, or would not be read back as it is")
    return config


def _contradiction(settings: Iterable[str], reason: str) -> InvalidRequestError:
    message, found = f"a changed setting cannot be saved: {reason}", ", ".join(sorted(settings))
    return InvalidRequestError(Problem("cannot_save", message, "config.json", None, found, None, "undo the change"))


def _fresh(model: Any, config: Mapping[str, Any], edits: Iterable[tuple[str, ...]] = ()) -> Any:
    """A model without weights of this configuration, with these edits: transformers changes some while it builds one."""
    try:
        with torch.device("meta"):
            # transformers has a form of its own for numbers that JSON has not.
            return type(model)(type(model.config).from_dict(model.config._decode_special_floats(deepcopy(dict(config)))))
    except Exception as error:  # what transformers raises for a setting it does not take is of many kinds
        raise _contradiction({path[0] for path in edits}, str(error).strip().split("\n")[0][:300]) from error


def _cannot_save(key: str, what: str) -> Problem:
    return Problem("cannot_save", f"the parameter {what}", None, key, remedy=_REMEDY)


def _module(model: Any, key: str) -> Any:
    try:
        return model.get_submodule(key.removesuffix(WEIGHT))
    except AttributeError:
        return None


def _differ(now: torch.Tensor, loaded: torch.Tensor) -> bool:
    now = now.detach().cpu()
    return now.shape != loaded.shape or not torch.equal(now, loaded.detach().cpu().to(now.dtype))


def _unmerged(model: Any, merge: Merge, parameters: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The stored tensors that give these parameters, by name; none if there is no way back."""
    try:
        parts = merge.stored(model, parameters)
        again = merge.parameters(model, [parts[name] for name in merge.names])
    except (AttributeError, KeyError, NotImplementedError, RuntimeError, ValueError):
        return {}
    same = all(key in again and not _differ(value, again[key]) for key, value in parameters.items())
    return parts if same else {}


def _array(values: torch.Tensor) -> Array:
    values = values.detach().cpu().contiguous()
    if values.dtype == torch.bfloat16:
        return Array.of(values.view(torch.int16).numpy().view(np.uint16), "bfloat16")
    return Array.of(values.numpy())


def _edits(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """The settings in which two configurations differ, by path, as they are now; None for those that are gone."""
    for name in [*now, *(name for name in before if name not in now)]:
        if name in _OF_LOADING:
            continue
        old, new = before.get(name), now.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from (((str(name), *path), value) for path, value in _edits(old, new))
        elif old != new and repr(old) != repr(new):  # NaN is not itself
            yield (str(name),), new


def _set(part: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    for name in path[:-1]:
        if not isinstance(part.get(name), dict):
            part[name] = {}
        part = part[name]
    part[path[-1]] = value


def _part_of(config: dict[str, Any], model_type: str) -> dict[str, Any] | None:
    """The configuration, or the part of it, that is of this type of model: what a class of the text part has of it."""
    if config.get("model_type") == model_type:
        return config
    parts = (_part_of(value, model_type) for value in config.values() if isinstance(value, dict))
    return next((part for part in parts if part is not None), None)


def _shapes(model: Any) -> dict[str, tuple[int, ...]]:
    """The shapes of the parameters and persistent buffers of a model, clustered weights included."""
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, ClusteredModule):
            shapes[f"{name}{WEIGHT}"] = module.stored_shape
    return shapes
