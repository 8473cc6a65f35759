"""Progress reports of long jobs: one type for all packages."""

from collections.abc import Callable
from typing import TypeAlias

__all__ = ["Progress", "silent"]

Progress: TypeAlias = Callable[[str, int, int], None]
"""Called as `(phase, units done, total units)`, often enough to show that the job is alive."""


def silent(phase: str, done: int, total: int) -> None:
    """Report nothing: the default of every job."""
