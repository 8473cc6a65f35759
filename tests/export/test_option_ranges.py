"""Numbers that no work can be done with are refused before any: never an overflow, a crash or a hang."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cluscomp_export.compression.workers.base import parse_workers
from cluscomp_export.conversion.convert import ConversionOptions, prepare
from cluscomp_export.conversion.effort import phases_of
from cluscomp_export.ranges import MOST, MOST_RATE, MOST_SEED, check_range
from cluscomp_export.threads import MOST_THREADS, check_threads, torch_threads
from cluscomp_export.training.finetuning import TuneOptions, plan_tuning
from cluscomp_formats.errors import InvalidRequestError
from cluscomp_runtime.devices import check_device
from cluscomp_runtime.sampling import probabilities

HUGE = 10**30


@pytest.mark.parametrize("value", [-1, 11, HUGE, math.nan, math.inf, -math.inf])
def test_what_lies_outside(value: float) -> None:
    for inside in (0, 10, 0.5):
        check_range("x", inside, 0, 10)
    with pytest.raises(InvalidRequestError, match="`x` is out of range"):
        check_range("x", value, 0, 10)
    with pytest.raises(InvalidRequestError, match="more than 0 to 10"):
        check_range("x", 0, 0, 10, above=True)


@pytest.mark.parametrize(
    "options",
    [
        {"seed": -1},
        {"seed": MOST_SEED + 1},
        {"threads": 0},
        {"threads": 10**6},
        {"threads": HUGE},
        {"threads": 10**6, "workers": "2"},
        {"workers": "9999"},
        {"workers": "threads:9999"},
        {"bits": math.nan},
        {"match_loss": math.inf},
        {"calibration_windows": 0},
        {"calibration_windows": HUGE},
        {"calibration_context": HUGE},
        {"calibration_context": -1},
        {"device": "meta"},
        {"device": "hpu"},
        {"device": ""},
        *({"blockwise_lr": rate} for rate in (0, -1, math.nan, math.inf, 1e308)),
        *({"blockwise_held_out": share} for share in (0, 1, -1, math.nan, math.inf)),
        *({"blockwise_same_input": weight} for weight in (-1, math.nan, math.inf)),
        *({f"{phase}_batch": number} for phase in ("blockwise", "recovery") for number in (0, -1, HUGE)),
        *({f"{phase}_patience": number} for phase in ("blockwise", "recovery") for number in (0, HUGE)),
        {"blockwise_epochs": HUGE},
        {"recovery_steps": HUGE},
        {"recovery_warmup": -1},
        {"recovery_context": HUGE},
        {"recovery_lr": math.inf},
    ],
    ids=str,
)
def test_conversions(options: dict[str, Any], stories_folder: Path) -> None:
    with pytest.raises(InvalidRequestError):
        prepare(stories_folder, ConversionOptions(**options), measure=False)


@pytest.mark.parametrize(
    "options",
    [
        {"epochs": math.inf},
        {"epochs": math.nan},
        {"epochs": 1e308},
        {"kl": math.nan, "reference": Path("original")},
        {"context": HUGE},
        *({name: HUGE} for name in ("steps", "batch", "warmup", "checks", "patience", "seed")),
        *({"lr": rate} for rate in (0, -1, math.nan, math.inf, 1e308, 2 * MOST_RATE)),
    ],
    ids=str,
)
def test_tuning(options: dict[str, Any], tmp_path: Path, stories_text: Path) -> None:
    with pytest.raises(InvalidRequestError):
        plan_tuning(tmp_path / "not looked at", TuneOptions(text=stories_text, **options))


def test_what_is_usual_is_in_range() -> None:
    usual = ConversionOptions(effort="best", calibration_windows=MOST, blockwise_epochs=5, blockwise_lr=1e-2, seed=MOST_SEED)
    phases_of(replace(usual, recovery_steps=96, recovery_warmup=0))


def test_threads_by_the_million() -> None:
    before = torch.get_num_threads()
    check_threads(None)
    check_threads(MOST_THREADS)
    with pytest.raises(InvalidRequestError, match="`threads` is out of range"), torch_threads(MOST_THREADS + 1):
        pytest.fail("so many threads were made")
    assert torch.get_num_threads() == before
    with pytest.raises(InvalidRequestError, match="`workers` is out of range"):
        parse_workers("9999")


@pytest.mark.parametrize("device", ["meta", "hpu", "privateuseone", "vulkan", "cuda:99", "nothing", ""])
def test_devices_that_compute_nothing(device: str) -> None:
    with pytest.raises(InvalidRequestError, match="cannot be used"):
        check_device(device)


@pytest.mark.parametrize("temperature", [5e-324, 1e-320, 1e-45, 1e-30])
def test_the_smallest_temperatures_are_greedy(temperature: float) -> None:
    chances = probabilities(np.array([1.0, 3.0, 2.0]), temperature=temperature)
    assert chances.tolist() == [0.0, 1.0, 0.0]
