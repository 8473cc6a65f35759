"""A model of which only the configuration exists here: names and shapes of its tensors, for planning."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from cluscomp_export.sources.checkpoint import read_config
from cluscomp_export.sources.side_files import read_side_files
from cluscomp_formats.architectures import describe
from cluscomp_formats.errors import InvalidFileError, Problem
from cluscomp_formats.ir import FLOAT_DTYPES, Array, DenseTensor, Model

__all__ = ["FORMAT", "open_config"]

FORMAT = "config"
"""`provenance["format"]` of such a model."""

DEFAULT_DTYPE = "bfloat16"
"""For configurations without a dtype: nearly all models are published in this one."""


def open_config(folder: Path) -> Model:
    """The model that the folder's `config.json` describes, as a dense model without payloads; for families of the runtime.

    Names and shapes follow from the architecture, the dtype from `torch_dtype` (or `dtype`, as transformers 5 writes it).
    Reading a payload raises InvalidFileError. Raises InvalidFileError for a configuration that is missing, invalid or has an
    unknown dtype, UnsupportedError for one that the runtime does not know or that is quantised.
    """
    config = read_config(folder)
    dtype = _dtype(config, folder)
    specs = describe(config).tensors

    def no_payload() -> NoReturn:
        remedy = "download the weights"
        raise InvalidFileError(Problem("missing", "only the configuration is here, no weights", str(folder), remedy=remedy))

    tensors = {name: DenseTensor(name, Array(spec.shape, dtype, no_payload)) for name, spec in specs.items()}
    return Model(config, tensors, read_side_files(folder, config), {"format": FORMAT, "stored_bits": {}})


def _dtype(config: Mapping[str, Any], folder: Path) -> str:
    found = config.get("dtype") or config.get("torch_dtype") or DEFAULT_DTYPE
    name = str(found).removeprefix("torch.")
    if name not in FLOAT_DTYPES:
        expected = ", ".join(FLOAT_DTYPES)
        raise InvalidFileError(Problem("invalid_config", "torch_dtype is not a float type", str(folder), None, name, expected))
    return name
