"""Numbers of threads of torch and of the kernels.

torch (OpenMP) and the kernels have a thread pool each. This module works around two properties of OpenMP:

- Its threads poll for a while after each operation and compete with the kernels' threads for the cores, unless
  `OMP_WAIT_POLICY=PASSIVE` was in the environment when torch was loaded. So torch uses one thread while its operations are
  small.
- A forked process inherits no threads, but OpenMP does not notice and waits for them forever. So torch uses one thread in
  forked processes.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["kernel_threads", "multi_threaded_torch", "ready_after_fork", "single_threaded_torch", "warn_of_polling"]


class _Shares(threading.local):
    """Number of threads of the kernels, per calling thread; None means as many as torch."""

    kernels: int | None = None


_shares = _Shares()
_forked = False
_warned = False
_lock = threading.Lock()
_active_blocks = 0
"""Number of active `single_threaded_torch` blocks, in all threads."""
_threads_before = 1
"""Number of threads that torch had before the first of these blocks."""

torch_polls = (
    os.environ.get("OMP_WAIT_POLICY", "").upper() != "PASSIVE"
    and os.environ.get("GOMP_SPINCOUNT") != "0"
    and os.environ.get("KMP_BLOCKTIME") != "0"
)
"""Whether torch's threads poll for work: torch was imported before this package, or the environment requests polling."""


def _after_fork() -> None:
    global _forked, _lock, _active_blocks
    # The threads that may have held the lock or entered blocks do not exist in the child.
    _forked, _lock, _active_blocks = True, threading.Lock(), 0


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def ready_after_fork() -> None:
    """In a forked process, set torch to one thread and warn, once. The kernels keep their number of threads."""
    global _forked  # noqa: PLW0603
    if not _forked:
        return
    _forked = False
    threads = torch.get_num_threads()
    if _shares.kernels is None and threads > 1:
        # The class attribute is the default of all threads of this process.
        _Shares.kernels = threads
        message = "this process was forked, so torch's threads are gone and it computes with one thread; start processes "
        message += 'with multiprocessing\'s "spawn" instead'
        warnings.warn(message, RuntimeWarning, stacklevel=3)
    torch.set_num_threads(1)


def kernel_threads() -> int:
    """Return the number of threads a kernel called by this thread should use."""
    if _forked:
        ready_after_fork()
    return _shares.kernels or torch.get_num_threads()


def warn_of_polling() -> None:
    """Warn, once, if torch's threads poll, and name the remedy."""
    global _warned  # noqa: PLW0603
    if torch_polls and not _warned and torch.get_num_threads() > 1:
        _warned = True
        message = "torch's threads poll for work and compete with the kernels' threads, which slows down long prompts; import "
        message += "cluscomp_runtime before torch, or set OMP_WAIT_POLICY=PASSIVE in the environment"
        warnings.warn(message, RuntimeWarning, stacklevel=4)


@contextmanager
def single_threaded_torch() -> Iterator[None]:
    """Within the block, torch uses one thread and the kernels use as many as torch had."""
    global _active_blocks, _threads_before  # noqa: PLW0603
    before = _shares.kernels
    with _lock:
        threads = torch.get_num_threads()
        if _active_blocks == 0:
            _threads_before = threads
        elif threads == 1 and before is None:
            # A new thread starts with the number that any thread set last, which is 1 here.
            threads = _threads_before
        _active_blocks += 1
        _shares.kernels = before or threads
        torch.set_num_threads(1)
    try:
        yield
    finally:
        with _lock:
            _active_blocks -= 1
            _shares.kernels = before
            torch.set_num_threads(threads)


@contextmanager
def multi_threaded_torch() -> Iterator[None]:
    """Within a `single_threaded_torch` block, let torch use all threads again, for a large operation."""
    before, threads = _shares.kernels, torch.get_num_threads()
    if before is None or threads == before or _Shares.kernels is not None:
        # There is no enclosing block, or the process was forked.
        yield
        return
    torch.set_num_threads(before)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
