"""Where the finished units of work of a conversion are kept: a unit is a name and some arrays.

`MemoryStore` is for work that is not resumed; `work_folder.WorkFolder` keeps units on the disk.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

import numpy as np

from cluscomp_formats.ir import AnyArray

__all__ = ["ArraySpecs", "MemoryStore", "Store"]

ArraySpecs = Mapping[str, tuple[str, tuple[int, ...]]]
"""Dtype (a key of `cluscomp_formats.ir.DTYPES`) and shape of each array of a unit, by name."""


class Store(Protocol):
    """Keeps units. A unit that was not saved in full, or whose arrays do not fit their specs, counts as absent."""

    @property
    def started(self) -> bool:
        """Whether a unit was saved since the store was opened."""

    def load(self, name: str, specs: ArraySpecs) -> dict[str, AnyArray] | None:
        """The arrays of a unit, or None if it is absent. Raises StorageError."""

    def holds(self, name: str, specs: ArraySpecs) -> bool:
        """Whether a unit is there."""

    def save(self, name: str, arrays: Mapping[str, AnyArray]) -> None:
        """Keep a finished unit. Raises StorageError."""

    def discard(self, names: Iterable[str]) -> int:
        """Delete the units of these names that are there. Returns how many. Raises StorageError."""


class MemoryStore:
    """Keeps units in memory."""

    def __init__(self) -> None:
        self._units: dict[str, dict[str, AnyArray]] = {}

    @property
    def started(self) -> bool:
        return bool(self._units)

    def load(self, name: str, specs: ArraySpecs) -> dict[str, AnyArray] | None:
        unit = self._units.get(name)
        shapes = {key: shape for key, (_, shape) in specs.items()}
        if unit is None or {key: values.shape for key, values in unit.items()} != shapes:
            return None
        return unit

    def holds(self, name: str, specs: ArraySpecs) -> bool:
        return self.load(name, specs) is not None

    def save(self, name: str, arrays: Mapping[str, AnyArray]) -> None:
        self._units[name] = {key: np.asarray(values) for key, values in arrays.items()}

    def discard(self, names: Iterable[str]) -> int:
        return sum(self._units.pop(name, None) is not None for name in names)
