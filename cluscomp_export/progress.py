"""How long jobs report progress."""

from collections.abc import Callable

__all__ = ["Progress", "silent"]

Progress = Callable[[str, int, int], None]
"""Called as `(what is being done, units done, units in all)`, often enough to show that the job lives."""


def silent(stage: str, done: int, total: int) -> None:
    """Report nothing."""
