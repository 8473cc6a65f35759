"""Map stored tensors to parameters of a transformers model, as transformers 5 does while it loads.

Tensor names in checkpoints often differ from parameter names: transformers renames them (`embed_out` is `lm_head`), adds or
removes the prefix of the base model, and converts several tensors to one parameter (the experts of a mixture) or one to
several.
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
    """Stored tensors from which transformers computes parameters.

    `key` is the first parameter. `sources` has, for each stored tensor, its name, the renamed name, and the pattern of
    transformers' converter that matches it, in the order that the converter expects.
    """

    key: str
    converter: Any
    sources: tuple[tuple[str, str, str], ...]

    @property
    def names(self) -> list[str]:
        return [name for name, _, _ in self.sources]

    def parameters(self, model: Any, tensors: Iterable[torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the parameters by key, computed from the values of the sources, which are given in order."""
        converter = deepcopy(self.converter)
        for (name, _, pattern), tensor in zip(self.sources, tensors, strict=True):
            converter.add_tensor(self.key, name, pattern, tensor)
        made = converter.convert(self.key, model=model, config=model.config)
        return {key: value[0] if isinstance(value, list) else value for key, value in made.items()}

    def stored(self, model: Any, parameters: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the stored tensors by name, computed from the parameters by key. Raises KeyError if one is missing."""
        converter = self.converter.reverse_transform()
        first = ""
        for key, value in parameters.items():
            renamed, pattern = converter.rename_source_key(key)
            converter.add_tensor(renamed, key, pattern, value.detach())
            first = first or renamed
        made = converter.convert(first, model=model, config=model.config)
        # Names may have or lack the prefix of the base model.
        prefix = f"{model.base_model_prefix}."
        bare = {name.removeprefix(prefix): value for name, value in made.items()}
        return {name: bare[renamed.removeprefix(prefix)] for name, renamed, _ in self.sources}


@dataclass(frozen=True)
class Places:
    """The places of stored tensors in a model.

    `keys` has the parameter or buffer of each tensor that is loaded unchanged, `merges` the tensors that are converted.
    `unplaced` has the other names, with the parameter names that transformers derives from them.
    """

    keys: dict[str, str]
    merges: tuple[Merge, ...]
    unplaced: dict[str, str]


def places_of(model: Any, names: Iterable[str]) -> Places:
    """Return the places of stored tensors in `model`, a PreTrainedModel."""
    conversions = get_model_conversion_mapping(model)
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    state, prefix = model.state_dict(), model.base_model_prefix
    keys: dict[str, str] = {}
    unplaced: dict[str, str] = {}
    taken: set[str] = set()
    merged: dict[str, list[tuple[str, str, str]]] = {}
    # Converters rely on transformers' order: expert 2 before expert 10.
    for name in sorted(names, key=dot_natural_key):
        key, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if key not in state and name in state:
            key, pattern = rename_source_key(name, [], [], prefix, state)
        # If two names map to one parameter, transformers uses the first.
        if key not in state or key in taken:
            unplaced[name] = key
        elif pattern is None:
            taken.add(key)
            keys[name] = key
        else:
            merged.setdefault(key, []).append((name, rename_source_key(name, renamings, [])[0], pattern))
    merges = tuple(Merge(key, by_pattern[sources[0][2]], tuple(sources)) for key, sources in merged.items())
    return Places(keys, merges, unplaced)
