"""How many threads compute: torch's own operations, and our kernels beside them.

Both have a pool of threads. Those of torch (OpenMP) poll for a while after each operation and take the cores from ours,
unless `OMP_WAIT_POLICY=PASSIVE` was in the environment when torch was loaded; and a forked process has none of them, though
OpenMP does not know: it waits for them without end. So torch computes alone where its operations are small, and in forked
processes.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["kernel_threads", "ready_after_fork", "torch_alone", "torch_together", "warn_of_polling"]


class _Shares(threading.local):
    """How many threads our kernels have; None: as many as torch."""

    kernels: int | None = None


_shares = _Shares()
_forked = False
_warned = False
_lock = threading.Lock()
_alone = 0
_threads = 1
"""Blocks of `torch_alone` that are entered, in all threads, and the threads that torch had before the first."""

torch_polls = (
    os.environ.get("OMP_WAIT_POLICY", "").upper() != "PASSIVE"
    and os.environ.get("GOMP_SPINCOUNT") != "0"
    and os.environ.get("KMP_BLOCKTIME") != "0"
)
"""Whether torch's threads poll for work: torch was loaded before this package could tell them not to, or is told to."""


def _after_fork() -> None:
    global _forked, _lock, _alone
    # Of the threads that may have held or entered them, none is here.
    _forked, _lock, _alone = True, threading.Lock(), 0


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def ready_after_fork() -> None:
    """In a forked process, have torch compute with one thread from now on and say so, once; our kernels keep theirs."""
    global _forked  # noqa: PLW0603
    if not _forked:
        return
    _forked = False
    threads = torch.get_num_threads()
    if _shares.kernels is None and threads > 1:
        # For all threads of this process.
        _Shares.kernels = threads
        message = "this process was forked: torch computes with one thread in it, since those it had are gone; start processes "
        message += 'with multiprocessing\'s "spawn" instead'
        warnings.warn(message, RuntimeWarning, stacklevel=3)
    torch.set_num_threads(1)


def kernel_threads() -> int:
    """Threads for one of our kernels."""
    if _forked:
        ready_after_fork()
    return _shares.kernels or torch.get_num_threads()


def warn_of_polling() -> None:
    """Say, once, that torch's threads poll and what to do."""
    global _warned  # noqa: PLW0603
    if torch_polls and not _warned and torch.get_num_threads() > 1:
        _warned = True
        message = "torch's threads poll for work and take the cores from the kernels' threads: long prompts are slower; import "
        message += "cluscomp_runtime before torch, or set OMP_WAIT_POLICY=PASSIVE in the environment"
        warnings.warn(message, RuntimeWarning, stacklevel=4)


@contextmanager
def torch_alone() -> Iterator[None]:
    """Have torch compute with one thread in the block, our kernels with as many as torch had."""
    global _alone, _threads  # noqa: PLW0603
    before = _shares.kernels
    with _lock:
        threads = torch.get_num_threads()
        if _alone == 0:
            _threads = threads
        elif threads == 1 and before is None:
            # torch gives a new thread the number that was set last, by whichever thread.
            threads = _threads
        _alone += 1
        _shares.kernels = before or threads
        torch.set_num_threads(1)
    try:
        yield
    finally:
        with _lock:
            _alone -= 1
            _shares.kernels = before
            torch.set_num_threads(threads)


@contextmanager
def torch_together() -> Iterator[None]:
    """Within `torch_alone`, have torch compute with all threads again: for a large operation of its own."""
    before, threads = _shares.kernels, torch.get_num_threads()
    if before is None or threads == before or _Shares.kernels is not None:
        # Not within such a block, or in a forked process.
        yield
        return
    torch.set_num_threads(before)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
