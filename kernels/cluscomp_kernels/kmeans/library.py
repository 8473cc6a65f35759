"""The C functions of the k-means kernel, declared once and called with numpy arrays.

Arrays are passed as addresses: the caller keeps them alive and is responsible for their shapes and dtypes.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from cluscomp_kernels import native

__all__ = ["INSTRUCTION_LEVEL", "call"]

INSTRUCTION_LEVEL = 2
"""Highest instruction set to use if the CPU has it: 0 plain C, 1 AVX2, 2 AVX-512. Results do not depend on it."""

_TYPES = {"p": ctypes.c_void_p, "i": ctypes.c_int32, "l": ctypes.c_int64, "f": ctypes.c_float}

_SIGNATURES = {
    "cc_kmeans_tree_root": "pppi ppppppp i",
    "cc_kmeans_tree_split": "pppi ppppppp pl ii",
    "cc_kmeans_tree_descend": "pli ppppp i",
    "cc_kmeans_neighbours": "pppppfl pi pii plpl ll ii",
    "cc_kmeans_refresh": "pii pp iii pl p ll ii",
    "cc_kmeans_scan": "pppppfl ppp pii piii ppp ll ii",
    "cc_kmeans_group": "pli pp",
    "cc_kmeans_update": "ppppp ii pppp ii",
    "cc_kmeans_sorted": "pl ppi p i",
    "cc_kmeans_feedback": "pppppfl ppp i ppppp p lll ii",
}
"""Argument types by function: p pointer, i int32, l int64, f float32."""


@functools.cache
def _function(name: str) -> Callable[..., None]:
    return native.function(name, [_TYPES[letter] for letter in _SIGNATURES[name].replace(" ", "")])


def _argument(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        if not value.flags.c_contiguous:
            raise ValueError("arrays handed to C must be C-contiguous")
        return value.ctypes.data
    return value


def call(name: str, *arguments: Any) -> None:
    """Call a C function: arrays become pointers, None becomes NULL. Raises RuntimeError if the library is missing."""
    _function(name)(*map(_argument, arguments))
