"""The constants of the Hugging Face format, version 1. The specification is `docs/hf-format.md`."""

from __future__ import annotations

__all__ = ["CONFIG", "INDEX", "METHOD", "OWN_FILES", "RECORD", "SINGLE", "VERSION"]

METHOD = "cluscomp"
"""`quantization_config.quant_method`."""

VERSION = 1
CONFIG = "config.json"
RECORD = "cluscomp.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
OWN_FILES = (CONFIG, RECORD, SINGLE, INDEX)
