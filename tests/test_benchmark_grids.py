"""The arithmetic of benchmarks/grids.py, by which peers are counted and checked; without the library they come from."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch


@pytest.fixture(scope="module")
def grids() -> Any:
    path = Path(__file__).parent.parent / "benchmarks" / "grids.py"
    spec = importlib.util.spec_from_file_location("benchmark_grids", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Where dataclasses look for the module of their class.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("method", "bits", "group_size", "shape", "expected"),
    [
        # A row of 576 has 9 groups with a scale of 16 bits and a zero point of 3: 576 * 3 + 9 * 19.
        ("rtn", 3, 64, (10, 576), 10 * (576 * 3 + 9 * 19)),
        # GPTQ also says for each of 576 channels which of 9 groups it is in: 4 bits.
        ("gptq", 3, 64, (10, 576), 10 * (576 * 3 + 9 * 19) + 576 * 4),
        # A group that is longer than the row, and a last group that is shorter than the others.
        ("gptq", 4, 192, (5, 64), 5 * (64 * 4 + 20)),
        ("rtn", 2, 32, (4, 40), 4 * (40 * 2 + 2 * 18)),
    ],
)
def test_bits_of_a_grid_count_scales_zero_points_and_the_order_of_channels(
    grids: Any, method: str, bits: int, group_size: int, shape: tuple[int, int], expected: int
) -> None:
    assert grids.grid_bits(grids.Grid(method, bits, group_size), shape) == expected


def rounded(weight: np.ndarray[Any, Any], bits: int, group_size: int) -> np.ndarray[Any, Any]:
    out = np.empty_like(weight)
    for start in range(0, weight.shape[1], group_size):
        group = weight[:, start : start + group_size]
        low, high = np.minimum(group.min(1, keepdims=True), 0), np.maximum(group.max(1, keepdims=True), 0)
        scale = ((high - low) / (2**bits - 1)).astype(np.float16).astype(np.float32)
        zero = np.round(-low / scale)
        out[:, start : start + group_size] = (np.clip(np.round(group / scale) + zero, 0, 2**bits - 1) - zero) * scale
    return out


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_rounding_to_the_nearest_passes_its_check(grids: Any, bits: int) -> None:
    weight = np.random.default_rng(bits).standard_normal((16, 96), dtype=np.float32)
    grids.check_rtn(weight, rounded(weight, bits, 32), grids.Grid("rtn", bits, 32))


def test_weights_off_their_grid_are_found(grids: Any) -> None:
    weight = np.random.default_rng(0).standard_normal((16, 96), dtype=np.float32)
    grid = grids.Grid("rtn", 4, 32)
    with pytest.raises(AssertionError, match="off its grid"):
        grids.check_rtn(weight, rounded(weight, 2, 32), grid)
    with pytest.raises(AssertionError, match="changed nothing"):
        grids.check_rtn(weight, weight, grid)


def test_gptq_that_errs_more_than_rounding_is_found(grids: Any) -> None:
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((8, 16), dtype=np.float32)
    inputs = torch.from_numpy(rng.standard_normal((32, 16), dtype=np.float32))
    near, far = weight + np.float32(0.01), weight + np.float32(0.1)
    grids.check_gptq(weight, near, far, inputs)
    with pytest.raises(AssertionError, match="own objective"):
        grids.check_gptq(weight, far, near, inputs)
