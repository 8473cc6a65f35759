"""Devices and dtypes of torch: which can be used here, and the memory of GPUs."""

from __future__ import annotations

import re

import torch

from cluscomp_formats.errors import InvalidRequestError, Problem

__all__ = ["check_device", "compute_dtype", "device_bytes"]

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def check_device(device: str | torch.device) -> torch.device:
    """The device, if torch can use it here. Raises InvalidRequestError."""
    try:
        target = torch.device(device)
        # A meta tensor has no values.
        torch.zeros(1, device=target).item()
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        problem = Problem("no_device", f"this device cannot be used: {reason}", found=str(device), remedy='use device="cpu"')
        raise InvalidRequestError(problem) from error
    return target


def compute_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """What to compute in, None for the device's default. Raises InvalidRequestError for a dtype that none computes in."""
    if dtype is None:
        if device.type == "cpu":
            return torch.float32
        return torch.float16 if device.type == "cuda" and not torch.cuda.is_bf16_supported() else torch.bfloat16
    chosen = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if chosen is None or chosen not in DTYPES.values():
        raise InvalidRequestError(Problem("unknown_dtype", "not a compute dtype", found=str(dtype), expected=", ".join(DTYPES)))
    return chosen


def device_bytes(device: str) -> int | None:
    """Return the bytes of memory of a GPU; None if `device` is not a GPU of this machine."""
    name = re.fullmatch(r"cuda(?::(\d+))?", device)
    index = int(name[1] or 0) if name else 0
    if name is None or index >= torch.cuda.device_count():
        return None
    return int(torch.cuda.get_device_properties(index).total_memory)
