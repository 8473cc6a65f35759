"""The ONNX format: a folder that stock ONNX runtimes can run; specified in `docs/onnx-format.md`.

Importing this package does not require the package onnx; reading and writing do. The writer is `onnx.writer.write_onnx`. It
needs the graph as an argument, because this package does not know what a model computes.
"""

import functools

from cluscomp_formats.files.atomic_folder import check_output_folder
from cluscomp_formats.format import Format
from cluscomp_formats.onnx.reader import holds_only_onnx, looks_onnx, open_onnx

__all__ = ["FORMAT", "holds_only_onnx", "looks_onnx", "open_onnx"]

FORMAT = Format(
    "onnx",
    "an ONNX folder of a codebook model",
    looks_onnx,
    open_onnx,
    check_output=functools.partial(check_output_folder, replaceable=holds_only_onnx),
)
