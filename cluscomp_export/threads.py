"""Numbers of threads: the range they are checked against, and torch's."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from cluscomp_formats.errors import InvalidRequestError, Problem

__all__ = ["MOST_THREADS", "check_threads", "torch_threads"]

MOST_THREADS = max(256, 4 * (os.cpu_count() or 1))
"""The most threads or worker processes. More only wait for each other, and millions end the process."""


def check_threads(number: int | None, option: str = "threads") -> None:
    """Raise InvalidRequestError for a number of threads or processes that this machine cannot use."""
    if number is not None and not 1 <= number <= MOST_THREADS:
        expected = f"1 to {MOST_THREADS}; this machine has {os.cpu_count()} cores"
        raise InvalidRequestError(Problem("bad_option", f"`{option}` is out of range", found=str(number), expected=expected))


@contextmanager
def torch_threads(number: int | None) -> Iterator[None]:
    """In this context torch computes with `number` threads, or with as many as before if None.

    The number is always set explicitly. Otherwise the libraries behind torch may use fewer threads, and the last bits of a
    training depend on that.
    Raises InvalidRequestError for what `check_threads` refuses.
    """
    import torch

    check_threads(number)
    before = torch.get_num_threads()
    torch.set_num_threads(before if number is None else number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
