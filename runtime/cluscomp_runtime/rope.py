"""Rotary position embedding: tables of cosines and sines, and their use.

Pairs are `(i, i + head_dim / 2)`, the layout of Hugging Face checkpoints. Tables are computed in float64 and rounded once, so
that they do not depend on the device.
"""

from __future__ import annotations

import torch

from cluscomp_formats.architectures import Rope
from cluscomp_runtime.frequencies import inverse_frequencies

__all__ = ["apply_rope", "rope_tables"]


def rope_tables(
    rope: Rope, head_dim: int, positions: int, *, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and signed sines `[positions, 1, head_dim]` for `apply_rope`.

    The first half of the sines is negated, which turns `rotate_half` into a plain roll. float16 and bfloat16 would lose
    position information, so half-precision models get float32 tables.
    """
    frequencies = torch.from_numpy(inverse_frequencies(rope, head_dim))
    angles = torch.arange(positions, dtype=torch.float64)[:, None] * frequencies
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
