"""What noise in a matrix costs, for the tests of what predicts it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from cluscomp_formats.ir import Array, DenseTensor, Model
from cluscomp_runtime import LanguageModel


def log_probabilities(model: Model, windows: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return torch.log_softmax(LanguageModel.from_model(model, dtype=torch.float64).forward(windows), dim=-1)


def divergence(source: Model, name: str, noise: np.ndarray, windows: torch.Tensor) -> float:
    """Mean over tokens of the divergence of the source from itself with `noise` added to a tensor."""
    weight = (source.tensors[name].decode() + noise).astype(np.float32)
    noisy = replace(source, tensors={**source.tensors, name: DenseTensor(name, Array.of(weight))})
    expected = log_probabilities(source, windows)
    return float((expected.exp() * (expected - log_probabilities(noisy, windows))).sum(-1).mean())
