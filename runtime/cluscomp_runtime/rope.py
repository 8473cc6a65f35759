"""Rotary position embedding: frequencies and tables.

Formulas: Su et al., arXiv 2104.09864 (default); position interpolation, Chen et al., arXiv 2306.15595 (linear); the Llama 3.1
model card's reference code (llama3). Pairs are `(i, i + head_dim / 2)`, the layout of Hugging Face checkpoints. Everything is
computed in float64 and rounded once, so that tables do not depend on the device.
"""

from __future__ import annotations

import math

import torch

from cluscomp_formats.architectures import Rope

__all__ = ["apply_rope", "inverse_frequencies", "rope_tables"]


def inverse_frequencies(rope: Rope, head_dim: int) -> torch.Tensor:
    """Angle per position of each of the `head_dim / 2` pairs, float64 `[head_dim / 2]`, in radians."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    frequencies = rope.theta**-exponents
    if rope.type == "linear":
        return frequencies / rope.factor
    if rope.type == "llama3":
        turns = rope.original_context * frequencies / (2 * math.pi)
        # Share of the original frequency: 0 below low_freq_factor turns over the original context, 1 above high_freq_factor.
        share = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        share = share.clamp(0.0, 1.0)
        return frequencies * (share + (1.0 - share) / rope.factor)
    return frequencies


def rope_tables(
    rope: Rope, head_dim: int, positions: int, *, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and signed sines `[positions, 1, head_dim]` for `apply_rope`.

    The first half of the sines is negated, which turns `rotate_half` into a plain roll. float16 and bfloat16 would lose
    position information, so half-precision models get float32 tables.
    """
    angles = torch.arange(positions, dtype=torch.float64)[:, None] * inverse_frequencies(rope, head_dim)
    cosines = angles.cos()
    sines = angles.sin()
    stored = torch.float32 if dtype.itemsize < 4 else dtype
    return (
        torch.cat((cosines, cosines), dim=-1).unsqueeze(1).to(device, stored),
        torch.cat((-sines, sines), dim=-1).unsqueeze(1).to(device, stored),
    )


def apply_rope(heads: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
    """Rotate `[batch, tokens, heads, head_dim]` by tables `[tokens, 1, head_dim]`; keeps the dtype of `heads`."""
    rolled = heads.roll(heads.shape[-1] // 2, dims=-1)
    return torch.addcmul(heads * cosines, rolled, sines).to(heads.dtype)
