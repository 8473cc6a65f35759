"""Load the compiled CPU kernels.

The libraries (`_native`: clustering and matrices for torch; `_engine`: running models) are plain shared objects next to this
package, called through ctypes with raw pointers, so they depend on no Python, numpy or torch ABI. Each operator declares its
functions with `function()`. If a library is missing (no compiler when the package was built) or `CLUSCOMP_NATIVE=0` is set,
`library()` returns None, and operators use a slower path and warn with `missing_reason()`.
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
def _load(name: str) -> tuple[ctypes.CDLL | None, str]:
    if os.environ.get("CLUSCOMP_NATIVE") == "0":
        return None, "disabled by CLUSCOMP_NATIVE=0"
    folder = Path(__file__).parent.parent
    candidates = sorted(path for pattern in (f"{name}*.so", f"{name}*.pyd") for path in folder.glob(pattern))
    if not candidates:
        reason = "there was no C compiler (gcc or clang) when cluscomp-export was installed, or it failed"
        return None, f"the C kernels were not built: {reason}; reinstall it with pip install -v to see why"
    try:
        return ctypes.CDLL(str(candidates[0])), ""
    except OSError as error:
        return None, f"{candidates[0]} does not load on this machine ({error}); reinstall cluscomp-export"


def library(name: str = "_native") -> ctypes.CDLL | None:
    """Return the compiled kernels, or None if they are missing or disabled."""
    return _load(name)[0]


def missing_reason(name: str = "_native") -> str:
    """Return why `library(name)` is None and the remedy; empty if the library is loaded."""
    return _load(name)[1]


def function(name: str, argtypes: Sequence[Any], restype: Any = None, *, library: str = "_native") -> Callable[..., Any]:
    """Return a function of a library with its C signature declared. Raises RuntimeError if there is no such library."""
    native, missing = _load(library)
    if native is None:
        raise RuntimeError(missing)
    # Each declaration gets its own pointer object, so that two operators cannot overwrite each other's signature.
    prototype = ctypes.CFUNCTYPE(restype, *argtypes)
    return prototype((name, native))
