"""The formats of this package."""

from cluscomp_formats import gguf, hf, onnx, packed

__all__ = ["FORMATS"]

FORMATS = (packed.FORMAT, hf.FORMAT, gguf.FORMAT, onnx.FORMAT)
"""In the order in which a file is held against them and people see them."""
