"""Frequencies of rotary position embedding.

Formulas: Su et al., arXiv 2104.09864 (default); position interpolation, Chen et al., arXiv 2306.15595 (linear); the Llama 3.1
model card's reference code (llama3). Computed in float64, so that they do not depend on the device.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from cluscomp_formats.architectures import Rope

__all__ = ["inverse_frequencies"]


def inverse_frequencies(rope: Rope, head_dim: int) -> npt.NDArray[np.float64]:
    """Angle per position of each of the `head_dim / 2` pairs, float64 `[head_dim / 2]`, in radians."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float64) / head_dim
    frequencies: npt.NDArray[np.float64] = rope.theta**-exponents
    if rope.type == "linear":
        return frequencies / rope.factor
    if rope.type == "llama3":
        turns = rope.original_context * frequencies / (2 * math.pi)
        # Share of the original frequency: 0 below low_freq_factor turns over the original context, 1 above high_freq_factor.
        share = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        share = share.clip(0.0, 1.0)
        return frequencies * (share + (1.0 - share) / rope.factor)
    return frequencies
