"""Profiles of machines: what a look-up in a codebook and a byte from memory cost there.

Time per weight depends on where a codebook lives. One that vector registers hold is looked up for many weights at once; any
other is gathered from, one row for every code, and the time of that depends on the cache that the codebook fits.
`speed.py` makes times of codebooks and tokens from a profile. Shipped profiles are in `data/machines.json`; which of them were
measured, and which were derived on paper, is part of each.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from importlib import resources
from typing import Any

from cluscomp_formats.errors import InvalidRequestError, Problem
from cluscomp_formats.strict_json import parse_strict

__all__ = ["DEFAULT_MACHINE", "Machine", "machine_from", "shipped_machine", "shipped_machines"]

DEFAULT_MACHINE = "avx512"
"""The profile of plans that name no machine. It is the same everywhere, so that a plan does not depend on where it is made."""

Steps = tuple[tuple[float, float], ...]
"""Limits in increasing order, and the time up to each."""

_FIELDS = {"measured", "note", "cores", "registers", "gathers", "bandwidth", "layer_us"}


@dataclass(frozen=True)
class Machine:
    """What decoding costs on a machine. Times are those of one core.

    `measured` is False for figures that were derived on paper. `registers`: ns per weight for codebooks of int8 in vector
    registers, by the most clusters; empty if registers hold none. `gathers`: ns per code for all others, by the most bytes of
    the codebook as the kernels hold it; the last limit is infinite. `bandwidth`: GB/s from memory for one core, and for all.
    `layer_us`: microseconds of a block besides its matrix products.
    """

    name: str
    measured: bool
    note: str
    cores: int
    registers: Steps
    gathers: Steps
    bandwidth: tuple[float, float]
    layer_us: float

    def value(self) -> dict[str, Any]:
        """The profile as JSON, without its name; see `machine_from`."""
        fields = asdict(self)
        del fields["name"]
        fields["registers"] = [list(step) for step in self.registers]
        fields["gathers"] = [[None if math.isinf(most) else most, ns] for most, ns in self.gathers]
        fields["bandwidth"] = list(self.bandwidth)
        return fields


def machine_from(name: str, value: Any) -> Machine:
    """The profile in a JSON value. Raises ValueError, which says what is wrong with it."""
    if not isinstance(value, dict) or value.keys() != _FIELDS:
        raise ValueError(f"not an object with {', '.join(sorted(_FIELDS))}")
    if not isinstance(value["measured"], bool) or not isinstance(value["note"], str):
        raise ValueError("measured is not true or false, or note is not a text")
    if type(value["cores"]) is not int or not 1 <= value["cores"] <= 1 << 16:
        raise ValueError("cores is not an integer from 1 to 65536")
    registers, gathers = _steps(value["registers"]), _steps(value["gathers"])
    if not gathers or not math.isinf(gathers[-1][0]):
        raise ValueError("gathers has no last step without limit")
    bandwidth = value["bandwidth"]
    if not isinstance(bandwidth, list) or len(bandwidth) != 2:
        raise ValueError("bandwidth is not a pair")
    one, every = (_positive(rate) for rate in bandwidth)
    return Machine(
        name, value["measured"], value["note"], value["cores"], registers, gathers, (one, every), _positive(value["layer_us"])
    )


def _steps(value: Any) -> Steps:
    if not isinstance(value, list) or not all(isinstance(step, list) and len(step) == 2 for step in value):
        raise ValueError("not a list of pairs")
    steps = tuple((math.inf if most is None else _positive(most), _positive(time)) for most, time in value)
    if any(before[0] >= after[0] for before, after in itertools.pairwise(steps)):
        raise ValueError("limits do not increase")
    return steps


def _positive(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"{value!r:.40} is not a positive number")
    return float(value)


@cache
def shipped_machines() -> Mapping[str, Machine]:
    """The profiles of this package, by name."""
    data = resources.files("cluscomp_export.planning.data").joinpath("machines.json").read_bytes()
    return {name: machine_from(name, value) for name, value in parse_strict(data).items()}


def shipped_machine(name: str) -> Machine:
    """The profile of that name. Raises InvalidRequestError, which lists all names."""
    machine = shipped_machines().get(name)
    if machine is None:
        expected = f"{', '.join(shipped_machines())}, or this"
        raise InvalidRequestError(
            Problem("bad_option", "`machine` has no such profile", found=repr(name)[:200], expected=expected)
        )
    return machine
