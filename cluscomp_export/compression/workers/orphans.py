"""No worker outlives the process that started it, however that ends: `kill -9` leaves it no time to end its workers."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

__all__ = ["end_with"]

_PR_SET_PDEATHSIG = 1
_LOOK_SECONDS = 1.0


def end_with(parent: int) -> None:
    """Have this process end when the process `parent` does, which started it.

    On Linux the kernel sees to it, elsewhere a thread looks once a second. Windows does not tell that a parent has ended.
    """
    if not _kernel_ends_us():
        threading.Thread(target=_watch, args=(parent,), name="parent", daemon=True).start()
    if _is_orphan(parent):
        # It ended before it could be watched.
        os._exit(1)


def _kernel_ends_us() -> bool:
    if sys.platform != "linux":
        return False
    try:
        import ctypes

        return bool(ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) == 0)
    except (ImportError, OSError, AttributeError):
        return False


def _watch(parent: int) -> None:
    while not _is_orphan(parent):
        time.sleep(_LOOK_SECONDS)
    os._exit(1)


def _is_orphan(parent: int) -> bool:
    return os.name == "posix" and os.getppid() != parent
