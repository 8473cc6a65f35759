"""Loads the compiled CPU kernels, or says why it cannot.

The library is one plain shared object next to this package, called through ctypes on raw pointers: no Python, numpy or torch
ABI. Each operator declares its own functions with `function()`. Where the library is missing (no compiler when the package was
built) or `CLUSCOMP_NATIVE=0` is set, `library()` is None and operators take their slower path, which they announce through
`missing_reason()`.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

__all__ = ["function", "library", "missing_reason"]


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    if os.environ.get("CLUSCOMP_NATIVE") == "0":
        return None, "switched off by CLUSCOMP_NATIVE=0"
    folder = Path(__file__).parent.parent
    candidates = sorted(path for pattern in ("_native*.so", "_native*.pyd") for path in folder.glob(pattern))
    if not candidates:
        reason = "there was no C compiler (gcc or clang) when cluscomp-export was installed, or it failed"
        return None, f"the C kernels were not built: {reason}; reinstall it with pip install -v to see why"
    try:
        return ctypes.CDLL(str(candidates[0])), ""
    except OSError as error:
        return None, f"{candidates[0]} does not load on this machine ({error}); reinstall cluscomp-export"


def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None."""
    return _load()[0]


def missing_reason() -> str:
    """Why `library()` is None, with what to do about it; empty if it is there."""
    return _load()[1]


def function(name: str, argtypes: Sequence[Any], restype: Any = None) -> Callable[..., Any]:
    """A function of the library with its C signature declared. Raises RuntimeError if there is no library."""
    native = library()
    if native is None:
        raise RuntimeError(missing_reason())
    # A fresh pointer object per declaration: two operators cannot disturb each other's signature.
    prototype = ctypes.CFUNCTYPE(restype, *argtypes)
    return prototype((name, native))
