"""Importing this module registers the formats of this package."""

import cluscomp_formats.gguf
import cluscomp_formats.hf
import cluscomp_formats.onnx
import cluscomp_formats.packed  # noqa: F401
