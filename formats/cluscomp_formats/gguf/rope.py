"""llama.cpp's conventions for rotary embeddings: the order of query and key rows, and scaled frequencies."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from cluscomp_formats.ir import AnyArray

__all__ = ["interleave_halves", "llama3_divisors"]


def interleave_halves(rows: AnyArray, num_heads: int) -> AnyArray:
    """Return rows `[num_heads * head_dim, ...]` in the order of GGUF Llama files.

    Within each head, rows that rotary embedding pairs up become neighbours: `stored[2 i + j] = original[j * head_dim / 2 + i]`.
    Source: `LlamaModel.permute` in llama.cpp's converter.
    """
    halves = rows.reshape(num_heads, 2, rows.shape[0] // num_heads // 2, *rows.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows.shape)


def llama3_divisors(
    theta: float, head_dim: int, *, factor: float, low: float, high: float, original_context: int
) -> npt.NDArray[np.float64]:
    """Return the divisors of the rotary frequencies, `[head_dim / 2]`, by the formula of Llama 3.1.

    Wavelengths below `original_context / high` are unchanged, those above `original_context / low` are multiplied by `factor`,
    and frequencies in between are interpolated. Source: `_compute_llama3_parameters` in transformers.
    """
    wavelengths = 2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    smooth = np.clip((original_context / wavelengths - low) / (high - low), 0.0, 1.0)
    return 1.0 / ((1.0 - smooth) / factor + smooth)
