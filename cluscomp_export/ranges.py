"""Which numbers options may have, told before any work. What lies outside is a slip, or ends in an overflow an hour later."""

from __future__ import annotations

from cluscomp_formats.errors import InvalidRequestError, Problem

__all__ = ["MOST", "MOST_RATE", "MOST_SEED", "check_range"]

MOST = 10**6
"""Of steps, epochs, windows, tokens of a window and whatever else is counted."""

MOST_RATE = 100.0
"""A learning rate relative to a parameter's size. Far less leaves nothing of it, far more no optimiser can hold."""

MOST_SEED = 2**63 - 1


def check_range(option: str, value: float, least: float, most: float, *, above: bool = False) -> None:
    """Hold a number against its range, `least` itself excluded if it must be `above`. Raises InvalidRequestError."""
    # Not a number is in no range.
    if not (least < value if above else least <= value) or not value <= most:
        found = str(value) if isinstance(value, int) else f"{value:g}"
        expected = f"{'more than ' if above else ''}{least:g} to {most:g}"
        raise InvalidRequestError(Problem("bad_option", f"`{option}` is out of range", found=found[:100], expected=expected))
