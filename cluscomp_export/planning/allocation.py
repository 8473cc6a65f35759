"""The choice with the least expected loss at a size, or the smallest size at a loss: a Lagrangian relaxation.

At a given price per bit, all choices are independent (Shoham & Gersho 1988): every codebook takes the candidate with the least
`loss + price * bits`, and matrices are grouped so that the sum over their codebooks is least. The price rises until the total
fits. To decide which matrices share a codebook, the matrices are ordered by sensitivity per weight and divided into runs
(`Chain`). Matrices of a kind differ in nothing else that matters for sharing, so the best division is one into runs.

Time counts as well if halving it is worth some bits per weight, `halving`: a plan is then charged `halving * log2(ns)` bits for
every weight. The best such plan is also the best one at some fixed price of a nanosecond, the slope of that logarithm at the
plan's own time. So plans at the slopes of a few times, from the fastest to the slowest, are compared.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from cluscomp_export.planning.candidates import PLAIN, SIZES, Group, Member, Size, Table, Terms

__all__ = ["Allocation", "Chain", "Either", "Pick", "Scope", "Separate", "allocate", "allocate_at"]

MAX_ATOMS = 32
"""Matrices of a chain are first grouped into at most so many runs; the search is quadratic in them."""

PRICES = (1e-30, 1e12)
PRICE_STEPS = 40
"""Halvings of that range on a logarithmic scale: prices are then exact to 10 digits."""

AROUND = 1e3
"""How far a price may be from one at which time did not count; half the steps find it as exactly."""

TIMES = 10
"""Times whose slopes are tried. Some are beyond both ends, because the best choice among few is not always at its own slope."""


@dataclass(frozen=True)
class Pick:
    """A candidate chosen for a group: `row` and `column` of a table."""

    table: Table
    row: int
    column: int

    @property
    def group(self) -> Group:
        return self.table.groups[self.row]

    @property
    def size(self) -> Size:
        """The chosen size, or `DENSE`."""
        return SIZES[self.column]

    @property
    def bits(self) -> float:
        return float(self.table.bits[self.row, self.column])

    @property
    def loss(self) -> float:
        return float(self.table.loss[self.row, self.column])

    @property
    def ns(self) -> float:
        """Nanoseconds for a token."""
        return float(self.table.ns[self.row, self.column])


class Scope(Protocol):
    """Some matrices, and the ways to store them among which to choose."""

    def best(self, price: float, rate: float) -> list[Pick]:
        """The picks with the least `loss + price * (bits + rate * ns)`; with infinitely many bits if there is no way."""
        ...


class Separate:
    """Fixed groups. With several lists of equal length, each group is stored in the best of these ways."""

    def __init__(self, *ways: Sequence[Group], terms: Terms = PLAIN) -> None:
        self.tables = [Table(groups, terms) for groups in ways]

    def best(self, price: float, rate: float) -> list[Pick]:
        costs = [table.costs(price, rate) for table in self.tables]
        columns = [np.argmin(cost, axis=1) for cost in costs]
        ways = np.argmin([cost.min(axis=1) for cost in costs], axis=0)
        return [Pick(self.tables[way], row, int(columns[way][row])) for row, way in enumerate(ways)]


class Chain:
    """Row-scaled matrices divided into groups in the best way, among runs of similar sensitivity."""

    def __init__(self, name: str, members: Sequence[Member], codebook_bits: int | None = None, terms: Terms = PLAIN) -> None:
        ordered = sorted(members, key=lambda member: (-member.loss / member.num_weights, member.name))
        atoms = _atoms(ordered)
        self.count = len(atoms)
        self.spans = [(start, end) for end in range(1, self.count + 1) for start in range(end)]
        groups = []
        for start, end in self.spans:
            inside = tuple(member for atom in atoms[start:end] for member in atom)
            whole = len(inside) == len(ordered)
            single = inside[0].name.removesuffix(".weight")
            label = name if whole else single if len(inside) == 1 else f"{name}.{start}"
            groups.append(Group(label, inside, row_scale=True, codebook_bits=codebook_bits))
        self.table = Table(groups, terms)

    def best(self, price: float, rate: float) -> list[Pick]:
        costs = self.table.costs(price, rate)
        columns = np.argmin(costs, axis=1)
        least = costs[np.arange(len(columns)), columns]
        # Dynamic programming: the best way to store the first `end` atoms, by its last run.
        totals, last = [0.0], [0]
        for end in range(1, self.count + 1):
            first = end * (end - 1) // 2
            options = [totals[start] + least[first + start] for start in range(end)]
            start = int(np.argmin(options))
            totals.append(options[start])
            last.append(first + start)
        picks, end = [], self.count
        while end:
            picks.append(Pick(self.table, last[end], int(columns[last[end]])))
            end = self.spans[last[end]][0]
        return picks[::-1]


def _atoms(ordered: Sequence[Member]) -> list[list[Member]]:
    """Consecutive runs with about equal numbers of weights, at most `MAX_ATOMS` of them."""
    if len(ordered) <= MAX_ATOMS:
        return [[member] for member in ordered]
    total = sum(member.num_weights for member in ordered)
    runs: dict[int, list[Member]] = {}
    done = 0
    for member in ordered:
        runs.setdefault(MAX_ATOMS * done // total, []).append(member)
        done += member.num_weights
    return list(runs.values())


class Either:
    """Different divisions of the same matrices, each a list of scopes; the cheapest is chosen."""

    def __init__(self, alternatives: Sequence[Sequence[Scope]]) -> None:
        self.alternatives = alternatives

    def best(self, price: float, rate: float) -> list[Pick]:
        offers = [[pick for scope in scopes for pick in scope.best(price, rate)] for scopes in self.alternatives]
        return min(offers, key=lambda picks: sum(pick.loss + price * (pick.bits + rate * pick.ns) for pick in picks))


@dataclass(frozen=True)
class Allocation:
    """Picks that meet a target, None if there are none.

    `extreme` are the smallest picks for a budget, the most exact for a loss. They were made at a `price` per bit, where a
    nanosecond costs as much as `rate` bits.
    """

    picks: list[Pick] | None
    extreme: list[Pick]
    price: float = 0.0
    rate: float = 0.0


def allocate(
    scopes: Sequence[Scope], *, budget: float | None = None, loss: float | None = None, halving: float = 0.0
) -> Allocation:
    """The picks with the least loss within `budget` bits, or the fewest bits within `loss`.

    Half the time for a token counts as much as `halving` bits less per weight; 0 ignores time.
    """
    plain = allocate_at(scopes, 0.0, budget=budget, loss=loss)
    if halving <= 0 or plain.picks is None:
        return plain
    slowest = _time(plain.picks)
    fastest = _time([pick for scope in scopes for pick in scope.best(1.0, 1 / PRICES[0])])
    if not 0 < fastest < slowest:
        return plain
    weights = sum(member.num_weights for pick in plain.picks for member in pick.group.members)
    best = plain
    for ns in np.geomspace(fastest / 2, 4 * slowest, TIMES).tolist():
        rate = halving * weights / (math.log(2) * ns)
        found = allocate_at(scopes, rate, budget=budget, loss=loss, around=plain.price)
        if found.picks is not None and _merit(found.picks, halving, budget) < _merit(best.picks or [], halving, budget):
            best = found
    return best


def allocate_at(
    scopes: Sequence[Scope],
    rate: float,
    *,
    budget: float | None = None,
    loss: float | None = None,
    around: float | None = None,
) -> Allocation:
    """`allocate` with a nanosecond at the price of `rate` bits; the price of a bit is looked for `around` one, if given."""

    def choose(price: float) -> list[Pick]:
        return [pick for scope in scopes for pick in scope.best(price, rate)]

    def fits(picks: list[Pick]) -> bool:
        within = budget is None or sum(pick.bits for pick in picks) <= budget
        return within and (loss is None or sum(pick.loss for pick in picks) <= loss)

    # A high price per bit meets the budget, a low price meets the loss.
    low, high = PRICES if around is None else (around / AROUND, around * AROUND)
    good, bad = (high, low) if budget is not None else (low, high)
    outermost = picks = choose(good)
    if not fits(picks):
        return Allocation(None, outermost, good, rate)
    for _ in range(PRICE_STEPS if around is None else PRICE_STEPS // 2):
        middle = math.sqrt(good) * math.sqrt(bad)
        chosen = choose(middle)
        if fits(chosen):
            good, picks = middle, chosen
        else:
            bad = middle
    return Allocation(picks if budget is None else _filled(picks, budget, good * rate), outermost, good, rate)


def _time(picks: Sequence[Pick]) -> float:
    """Nanoseconds for a token."""
    return sum(pick.ns for pick in picks)


def _merit(picks: Sequence[Pick], halving: float, budget: float | None) -> float:
    """What is minimised, in bits per weight: by theory, a bit per weight quarters the loss."""
    weights = sum(member.num_weights for pick in picks for member in pick.group.members)
    if budget is None:
        spent = sum(pick.bits for pick in picks) / weights
    else:
        spent = 0.5 * math.log2(max(sum(pick.loss for pick in picks), PRICES[0]))
    return spent + halving * math.log2(max(_time(picks), PRICES[0]))


def _filled(picks: list[Pick], budget: float, price: float) -> list[Pick]:
    """Spend the rest of the budget on the candidates that gain most per bit; a nanosecond costs `price`.

    The relaxation finds candidates on the convex hull only, and at one price similar matrices all take the same.
    """
    bits = np.array([pick.table.bits[pick.row] for pick in picks])
    losses = np.array([pick.table.loss[pick.row] + price * pick.table.ns[pick.row] for pick in picks])
    columns = np.array([pick.column for pick in picks])
    rows = np.arange(len(picks))
    while True:
        spent, lost = bits[rows, columns], losses[rows, columns]
        left = budget - float(spent.sum())
        costs, gains = bits - spent[:, None], lost[:, None] - losses
        # Smaller gains are rounding.
        better = (costs <= left) & (gains > 1e-9 * lost[:, None])
        if not better.any():
            return [Pick(pick.table, pick.row, int(column)) for pick, column in zip(picks, columns, strict=True)]
        rates = np.where(better, gains / np.maximum(costs, 1.0), -np.inf)
        row, column = np.unravel_index(int(np.argmax(rates)), rates.shape)
        columns[row] = column
