"""Which finished units of work are void, because one that they were computed from is missing or damaged.

Computed anew, the missing one may come out otherwise: in a block that has been tuned since, or with another number of threads.
What was computed from it before would then belong to another model, so it is computed again as well. A unit depends on what was
measured on the calibration text, a matrix also on its codebook and, with error feedback or tuning, on all that comes before it
in the order of the model; a training depends on everything.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from cluscomp_export.store import ArraySpecs, Store

__all__ = ["UnitOrder", "discard_void"]


@dataclass(frozen=True)
class UnitOrder:
    """The units of a clustering by name.

    `codebooks` and `alone`, matrices that depend on their codebook only, come in any order; `steps` one after the other, units
    of a step in any order; `trainings` last. `codebook_of` has for matrices the unit of their codebook.
    """

    codebooks: Mapping[str, ArraySpecs]
    alone: Mapping[str, ArraySpecs]
    steps: Sequence[Mapping[str, ArraySpecs]]
    codebook_of: Mapping[str, str]
    trainings: Sequence[str] = field(default=("training", "recovery"))


def discard_void(store: Store, order: UnitOrder, *, from_scratch: bool) -> int:
    """Delete the units that are void: how many. `from_scratch` says that what all are computed from was measured anew.

    Reads every finished unit once. Raises StorageError.
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
