"""The ONNX format: a folder that stock ONNX runtimes run; specified in `docs/onnx-format.md`.

Importing this package does not need the package onnx; reading and writing do.
"""

from cluscomp_formats.onnx.reader import holds_only_onnx, looks_onnx, open_onnx
from cluscomp_formats.registry import Format, register

__all__ = ["holds_only_onnx", "looks_onnx", "open_onnx"]

register(Format("onnx", "an ONNX folder of a codebook model", looks_onnx, open_onnx))
