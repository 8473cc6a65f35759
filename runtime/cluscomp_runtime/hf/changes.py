"""Find the tensors and settings of a transformers model that changed since it was loaded from a ClusComp folder."""

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

_LOADING_SETTINGS = (
    "_attn_implementation",
    "_name_or_path",
    "architectures",
    "dtype",
    "quantization_config",
    "transformers_version",
)
"""Settings that describe how a model was loaded, not the model."""

_REMEDY = "save adapters separately (PeftModel.save_pretrained), or call model.dequantize() and save an ordinary model"


def changed_tensors(model: Any, stored: Model, replacement: Replacement) -> dict[str, Tensor]:
    """Return the tensors of `model` that differ from those of `stored`, by name, and the new ones.

    Compares every parameter and persistent buffer. Raises InvalidRequestError if one has no name in the folder, has been
    replaced, or is not in memory.
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
        missing = [key for key in made if key not in state]
        problems += [_cannot_save(key, "has been replaced") for key in missing]
        if not missing and any(_differ(state[key], value) for key, value in made.items()):
            parts = _unmerged(model, merge, {key: state[key] for key in made})
            if not parts:
                problems.append(_cannot_save(merge.key, "has changed and cannot be converted back to its stored tensors"))
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
            problems.append(_cannot_save(key, "has no name in the loaded folder"))
    if problems:
        raise InvalidRequestError(problems)
    return {name: DenseTensor(name, _array(value)) for name, value in changed.items()}


def changed_config(model: Any, stored: Mapping[str, Any], loaded: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration to write: `stored`, with the settings that were changed in `model`, when or since it was loaded.

    `loaded` is the configuration as transformers read it. Raises InvalidRequestError if a setting contradicts the weights, or
    would have another value when it is read again.
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
        raise _contradiction(wrong, "it contradicts the weights, or would have another value when read again")
    return config


def _contradiction(settings: Iterable[str], reason: str) -> InvalidRequestError:
    message, found = f"a changed setting cannot be saved: {reason}", ", ".join(sorted(settings))
    return InvalidRequestError(Problem("cannot_save", message, "config.json", None, found, None, "undo the change"))


def _fresh(model: Any, config: Mapping[str, Any], edits: Iterable[tuple[str, ...]] = ()) -> Any:
    """Build a model without weights from a configuration, because transformers changes some settings while it builds a model.

    `edits` are the paths of changed settings, for the error message.
    """
    try:
        with torch.device("meta"):
            # transformers encodes NaN and infinities in its own way, since JSON has no such numbers.
            return type(model)(type(model.config).from_dict(model.config._decode_special_floats(deepcopy(dict(config)))))
    except Exception as error:  # transformers raises many types for an invalid setting
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
    """Return the stored tensors, by name, that transformers merges to these parameters; empty if it cannot be reversed."""
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
    """Yield the path and new value of each setting in which two configurations differ; None for removed settings."""
    for name in [*now, *(name for name in before if name not in now)]:
        if name in _LOADING_SETTINGS:
            continue
        old, new = before.get(name), now.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from (((str(name), *path), value) for path, value in _edits(old, new))
        elif old != new and repr(old) != repr(new):  # NaN does not equal itself
            yield (str(name),), new


def _set(part: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    for name in path[:-1]:
        if not isinstance(part.get(name), dict):
            part[name] = {}
        part = part[name]
    part[path[-1]] = value


def _part_of(config: dict[str, Any], model_type: str) -> dict[str, Any] | None:
    """Return the configuration, or the part of it, of this model type: a text model has only a part of a composite one."""
    if config.get("model_type") == model_type:
        return config
    parts = (_part_of(value, model_type) for value in config.values() if isinstance(value, dict))
    return next((part for part in parts if part is not None), None)


def _shapes(model: Any) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a model's parameters and persistent buffers, including clustered weights."""
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, ClusteredModule):
            shapes[f"{name}{WEIGHT}"] = module.stored_shape
    return shapes
