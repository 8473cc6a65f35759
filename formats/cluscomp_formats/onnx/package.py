"""The optional package onnx, which is needed only to read and write ONNX files."""

from __future__ import annotations

from importlib.util import find_spec

from cluscomp_formats.errors import Problem, UnsupportedError

__all__ = ["require_onnx"]


def require_onnx() -> None:
    """Raise UnsupportedError if the package onnx is not installed."""
    if find_spec("onnx") is None:
        remedy = "pip install cluscomp-export[onnx]"
        raise UnsupportedError(Problem("no_onnx", "ONNX files need the package onnx", remedy=remedy))
