"""Finds finished units of work that are void, because a unit that they were computed from is missing or damaged.

A missing unit that is computed again can differ, for example with another number of threads. Units that were computed from the
old one would then belong to another model, so they are computed again as well. Every unit depends on what was measured on the
calibration text. A matrix also depends on its codebook and, with error feedback or tuning, on all units before it in the order
of the model. A training depends on everything.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from cluscomp_export.store import ArraySpecs, Store

__all__ = ["UnitOrder", "discard_void"]


@dataclass(frozen=True)
class UnitOrder:
    """The units of a compression, by name, and the order in which they are computed.

    `codebooks` and `alone` (matrices that depend on their codebook only) have no order. `steps` follow one another; the units
    of a step have no order. `trainings` come last. `codebook_of` maps the unit of a matrix to that of its codebook.
    """

    codebooks: Mapping[str, ArraySpecs]
    alone: Mapping[str, ArraySpecs]
    steps: Sequence[Mapping[str, ArraySpecs]]
    codebook_of: Mapping[str, str]
    trainings: Sequence[str] = field(default=("training", "recovery"))


def discard_void(store: Store, order: UnitOrder, *, from_scratch: bool) -> int:
    """Delete the void units and return how many there were.

    `from_scratch`: the measurements on the calibration text are new, so all units are void. Reads every finished unit once.
    Raises StorageError.
    """
    if from_scratch:
        names = [*order.codebooks, *order.alone, *(name for step in order.steps for name in step), *order.trainings]
        return store.discard(names)
    return store.discard(list(_void(store, order)))


def _void(store: Store, order: UnitOrder) -> Iterator[str]:
    lost = {name for name, specs in order.codebooks.items() if not store.holds(name, specs)}
    gap = False
    for step in order.steps:
        unsound = [
            name for name, specs in step.items() if gap or order.codebook_of.get(name) in lost or not store.holds(name, specs)
        ]
        yield from unsound
        gap = gap or bool(unsound)
    unsound = [name for name, specs in order.alone.items() if order.codebook_of[name] in lost or not store.holds(name, specs)]
    yield from unsound
    if gap or unsound:
        yield from order.trainings
