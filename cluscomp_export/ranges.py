"""Ranges of numeric options, checked before the job. A value outside is a mistake, or overflows an hour later."""

from __future__ import annotations

from cluscomp_formats.errors import InvalidRequestError, Problem

__all__ = ["MOST", "MOST_RATE", "MOST_SEED", "check_range"]

MOST = 10**6
"""The most steps, epochs, windows, tokens of a window, and other counts."""

MOST_RATE = 100.0
"""The largest learning rate, relative to the magnitude of a parameter. Training diverges far below it."""

MOST_SEED = 2**63 - 1


def check_range(option: str, value: float, least: float, most: float, *, above: bool = False) -> None:
    """Check that an option is in its range, without `least` itself if `above`. Raises InvalidRequestError."""
    # NaN is in no range.
    if not (least < value if above else least <= value) or not value <= most:
        found = str(value) if isinstance(value, int) else f"{value:g}"
        expected = f"{'more than ' if above else ''}{least:g} to {most:g}"
        raise InvalidRequestError(Problem("bad_option", f"`{option}` is out of range", found=found[:100], expected=expected))
