"""Which parameter of a transformers model a stored tensor belongs to: what transformers 5 does with names while it loads.

Many checkpoints have other names than the modules: transformers renames (`embed_out` is `lm_head`), adds or takes off the
prefix of the base model, and makes one parameter of several tensors (the experts of a mixture) or several of one.
"""

from __future__ import annotations

from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

__all__ = ["Merge", "Places", "places_of"]


@dataclass(frozen=True)
class Merge:
    """Stored tensors that transformers computes parameters from, rather than taking them as they are.

    `key` is the first parameter; `sources` are the names of the stored tensors, each with what renaming makes of it and the
    pattern of transformers' converter that this matches, in the order in which the converter wants them.
    """

    key: str
    converter: Any
    sources: tuple[tuple[str, str, str], ...]

    @property
    def names(self) -> list[str]:
        return [name for name, _, _ in self.sources]

    def parameters(self, model: Any, tensors: Iterable[torch.Tensor]) -> dict[str, torch.Tensor]:
        """The parameters by key, computed from the values of the sources, in their order."""
        converter = deepcopy(self.converter)
        for (name, _, pattern), tensor in zip(self.sources, tensors, strict=True):
            converter.add_tensor(self.key, name, pattern, tensor)
        made = converter.convert(self.key, model=model, config=model.config)
        return {key: value[0] if isinstance(value, list) else value for key, value in made.items()}

    def stored(self, model: Any, parameters: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The way back: the stored tensors by name, from the parameters by key. Raises KeyError if one does not come back."""
        converter = self.converter.reverse_transform()
        first = ""
        for key, value in parameters.items():
            renamed, pattern = converter.rename_source_key(key)
            converter.add_tensor(renamed, key, pattern, value.detach())
            first = first or renamed
        made = converter.convert(first, model=model, config=model.config)
        # What is loaded into the base model, or from it, has or lacks its prefix.
        prefix = f"{model.base_model_prefix}."
        bare = {name.removeprefix(prefix): value for name, value in made.items()}
        return {name: bare[renamed.removeprefix(prefix)] for name, renamed, _ in self.sources}


@dataclass(frozen=True)
class Places:
    """`keys` has the parameter or buffer of each stored tensor that is loaded as it is; `merges` has those that are not.

    `lost` has the names without a place in the model, with what transformers would call them.
    """

    keys: dict[str, str]
    merges: tuple[Merge, ...]
    lost: dict[str, str]


def places_of(model: Any, names: Iterable[str]) -> Places:
    """The places of stored tensors in `model`, a PreTrainedModel."""
    conversions = get_model_conversion_mapping(model)
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    state, prefix = model.state_dict(), model.base_model_prefix
    keys: dict[str, str] = {}
    lost: dict[str, str] = {}
    taken: set[str] = set()
    merged: dict[str, list[tuple[str, str, str]]] = {}
    # In transformers' own order, on which converters rely: expert 2 before expert 10.
    for name in sorted(names, key=dot_natural_key):
        key, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if key not in state and name in state:
            key, pattern = rename_source_key(name, [], [], prefix, state)
        # Of two names of one parameter, transformers takes the first.
        if key not in state or key in taken:
            lost[name] = key
        elif pattern is None:
            taken.add(key)
            keys[name] = key
        else:
            merged.setdefault(key, []).append((name, rename_source_key(name, renamings, [])[0], pattern))
    merges = tuple(Merge(key, by_pattern[sources[0][2]], tuple(sources)) for key, sources in merged.items())
    return Places(keys, merges, lost)
