"""`save_pretrained` for models of ours: the folder that was loaded, with the parameters that changed since."""

from __future__ import annotations

import re
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cluscomp_formats.errors import InvalidRequestError, Problem
from cluscomp_formats.hf import SHARD_BYTES, looks_hf, write_hf
from cluscomp_formats.ir import Array, DenseTensor, Model, Tensor
from cluscomp_runtime.hf.replacement import candidates
from cluscomp_runtime.linear import tensor_of

__all__ = ["save_pretrained"]

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


def save_pretrained(
    model: Any,
    stored: Model,
    save_directory: str | PathLike[str],
    *,
    is_main_process: bool = True,
    max_shard_size: int | str = SHARD_BYTES,
    **others: Any,
) -> None:
    """Write `model`, which was loaded from `stored`, as a folder of the Hugging Face format.

    Configuration, codebooks, codes and side files are those loaded. A dense tensor that differs from the one loaded is
    written as it is now, and the self-test record is left out then. A folder that exists is replaced if it is one of ours and
    holds nothing else. Raises what `write_hf` does; InvalidRequestError for other options of transformers' `save_pretrained`.
    """
    wanted = sorted(name for name, value in others.items() if value not in (None, False) and name != "safe_serialization")
    if wanted:
        remedy = "save to a folder and upload that"
        raise InvalidRequestError(
            Problem("bad_option", "not supported for codebook models", found=", ".join(wanted), remedy=remedy)
        )
    if not is_main_process:
        return
    folder = Path(save_directory)
    write_hf(_current(model, stored), folder, force=looks_hf(folder), shard_bytes=_bytes(max_shard_size))


def _current(model: Any, stored: Model) -> Model:
    parameters = model.state_dict()
    prefix = str(getattr(model, "base_model_prefix", ""))
    changed: dict[str, Tensor] = {}
    for name, tensor in stored.tensors.items():
        key = next((key for key in candidates(name, prefix) if key in parameters), None)
        if not isinstance(tensor, DenseTensor) or key is None:
            continue
        now = parameters[key].detach().cpu()
        loaded = tensor_of(tensor.values).to(now.dtype)
        if now.shape == loaded.shape and not torch.equal(now, loaded):
            changed[name] = DenseTensor(name, _array(now))
    if not changed:
        return stored
    return replace(stored, tensors={**stored.tensors, **changed}, self_test=None)


def _array(values: torch.Tensor) -> Array:
    if values.dtype == torch.bfloat16:
        return Array.of(values.contiguous().view(torch.int16).numpy().view(np.uint16), "bfloat16")
    return Array.of(values.contiguous().numpy())


def _bytes(size: int | str) -> int:
    if isinstance(size, int):
        return size
    match = re.fullmatch(r"(\d+)\s*([KMG]B)", size.strip().upper(), re.ASCII)
    if match is None:
        raise InvalidRequestError(
            Problem("bad_option", "max_shard_size is malformed", found=repr(size), expected="such as 5GB")
        )
    return int(match[1]) * _UNITS[match[2]]
