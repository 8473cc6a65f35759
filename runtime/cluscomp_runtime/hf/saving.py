"""`save_pretrained` for ClusComp models: writes the loaded folder with the changes made since."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from cluscomp_formats.errors import InvalidRequestError, Problem
from cluscomp_formats.hf import SHARD_BYTES, looks_hf, write_hf
from cluscomp_formats.ir import Array, Model
from cluscomp_runtime.hf.changes import changed_config, changed_tensors
from cluscomp_runtime.hf.replacement import Replacement

__all__ = ["Loaded", "save_pretrained"]

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}

_GENERATION = "generation_config.json"


@dataclass(frozen=True)
class Loaded:
    """The state of a model just after loading: the stored model, its replaced modules, and both configurations as transformers
    read them."""

    stored: Model
    replacement: Replacement
    config: dict[str, Any]
    generation: dict[str, Any] | None

    @classmethod
    def snapshot(cls, model: Any, stored: Model, replacement: Replacement) -> Loaded:
        return cls(stored, replacement, model.config.to_dict(), _generation(model))


def save_pretrained(
    model: Any,
    loaded: Loaded,
    save_directory: str | PathLike[str],
    *,
    is_main_process: bool = True,
    max_shard_size: int | str = SHARD_BYTES,
    **others: Any,
) -> None:
    """Write `model` as a folder of the Hugging Face format: the loaded folder with the changes made since.

    Codebooks, codes and side files are the loaded ones. Tensors that were changed, by training or resizing, are written dense
    with their current values, and changed settings of the configuration and of text generation with theirs. In that case the
    self-test record is omitted. An existing folder is replaced if it is a ClusComp folder without other files. If the model has
    adapters, only those are saved, as transformers does.

    Raises InvalidRequestError if a change cannot be saved, or for other options of transformers' `save_pretrained`; and the
    errors of `write_hf`.
    """
    if getattr(model, "_hf_peft_config_loaded", False):
        options = {"is_main_process": is_main_process, "max_shard_size": max_shard_size, **others}
        type(model).save_pretrained(model, save_directory, **options)
        return
    ignored = ("safe_serialization", "save_peft_format", "save_original_format")
    wanted = sorted(name for name, value in others.items() if value not in (None, False) and name not in ignored)
    if wanted:
        remedy = "save to a folder and upload that"
        raise InvalidRequestError(
            Problem("bad_option", "not supported for codebook models", found=", ".join(wanted), remedy=remedy)
        )
    if not is_main_process:
        return
    folder = Path(save_directory)
    with _as_stored(model):
        current = _current(model, loaded)
    write_hf(current, folder, force=looks_hf(folder), shard_bytes=_bytes(max_shard_size))


def _current(model: Any, loaded: Loaded) -> Model:
    stored = loaded.stored
    tensors = changed_tensors(model, stored, loaded.replacement)
    config = changed_config(model, stored.config, loaded.config)
    files: dict[str, Array] = {}
    if _generation(model) != loaded.generation:
        text = model.generation_config.to_json_string(use_diff=True).encode()
        files[_GENERATION] = Array.of(np.frombuffer(text, np.uint8))
    if not tensors and config == stored.config:
        return replace(stored, files={**stored.files, **files}) if files else stored
    return replace(
        stored,
        config=config,
        tensors={**stored.tensors, **tensors},
        files={**stored.files, **files},
        # These belong to the loaded weights.
        self_test=None,
        claimed_digest=None,
    )


@contextmanager
def _as_stored(model: Any) -> Iterator[None]:
    """Within the block, restore the stored values of RWKV's weights, some of which it halves for inference."""
    base = model.base_model
    if not getattr(base, "layers_are_rescaled", False):
        yield
        return
    base.train()
    base._rescale_layers()
    try:
        yield
    finally:
        base.eval()
        base._rescale_layers()


def _generation(model: Any) -> dict[str, Any] | None:
    config = getattr(model, "generation_config", None)
    return None if config is None else dict(config.to_dict())


def _bytes(size: int | str) -> int:
    if isinstance(size, int):
        return size
    match = re.fullmatch(r"(\d+)\s*([KMG]B)", size.strip().upper(), re.ASCII)
    if match is None:
        raise InvalidRequestError(
            Problem("bad_option", "max_shard_size is malformed", found=repr(size), expected="such as 5GB")
        )
    return int(match[1]) * _UNITS[match[2]]
