"""What would end this process, asked by a worker: it imports nothing that takes long."""

from __future__ import annotations

import ctypes

_PR_GET_PDEATHSIG = 2


def death_signal() -> int:
    """The signal this process gets when the one that started it ends (Linux)."""
    found = ctypes.c_int()
    ctypes.CDLL(None).prctl(_PR_GET_PDEATHSIG, ctypes.byref(found))
    return found.value
