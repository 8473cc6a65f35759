"""Models larger than memory: they are rejected before they are read, and failed allocations raise our own error."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from runtime_models import clustered_model, small_config

from cluscomp_formats.errors import UnsupportedError
from cluscomp_formats.ir import Array, ClusteredWeight, Codebook, Model, Stage
from cluscomp_runtime import LanguageModel, memory, native_engine, torch_engine

HUGE = 1 << 30


def never() -> Any:
    raise AssertionError("nothing may be read")


def huge_model() -> Model:
    """A well-formed model: the head has 2^60 weights in 1024 x 2^30 one-bit codes, the embedding as many on the other axis."""
    config = small_config(vocab_size=HUGE, hidden_size=HUGE, num_attention_heads=4, head_dim=8)
    small = clustered_model(small_config())
    book = Codebook("book", Array((2, 1 << 20), "float16", never))
    shape = (HUGE, HUGE)
    tensors = {
        name: ClusteredWeight(name, shape, (Stage(book, Array((HUGE, HUGE >> 20), "uint16", never)),), axis)
        for name, axis in (("model.embed_tokens.weight", "in"), ("lm_head.weight", "out"))
    }
    return Model(config, {**small.tensors, **tensors})


@pytest.mark.parametrize(
    "held_bytes",
    [
        native_engine.held_bytes,
        partial(torch_engine.held_bytes, itemsize=4, decoded=False),
        partial(torch_engine.held_bytes, itemsize=4, decoded=True),
    ],
    ids=["native", "codes in torch", "decoded"],
)
@pytest.mark.parametrize("one_at_a_time", [False, True])
def test_matrices_larger_than_memory_are_refused_unread(held_bytes: Any, one_at_a_time: bool) -> None:
    with pytest.raises(UnsupportedError, match="more memory than this machine has"):
        memory.check_memory(huge_model(), held_bytes, one_at_a_time=one_at_a_time)


def test_the_reference_kernel_needs_room_for_one_matrix_only(monkeypatch: pytest.MonkeyPatch) -> None:
    model = clustered_model(small_config())
    largest = max(tensor.num_weights for tensor in model.tensors.values()) * 4
    monkeypatch.setattr(memory, "physical_bytes", lambda: largest)
    LanguageModel.from_model(model, kernel="reference")
    with pytest.raises(UnsupportedError, match="more memory"):
        LanguageModel.from_model(model, kernel="dense")


@pytest.mark.parametrize(
    "take",
    [lambda: torch.empty(1 << 50), lambda: np.empty(1 << 50), lambda: bytearray(1 << 60)],
    ids=["torch", "numpy", "python"],
)
def test_memory_the_system_refuses_is_an_error_of_ours(take: Any) -> None:
    with pytest.raises(UnsupportedError, match="not enough memory"), memory.memory_faults():
        take()


def test_other_errors_pass() -> None:
    with pytest.raises(RuntimeError, match="shapes"), memory.memory_faults():
        raise RuntimeError("shapes do not fit")


class AcceleratorError(RuntimeError):
    """Simulates torch's error for faults on a GPU."""


@pytest.mark.parametrize(
    "fault",
    [
        AcceleratorError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("Triton Error [CUDA]: misaligned shared memory"),
        RuntimeError("the text DefaultCPUAllocator: can't allocate memory inside of another"),
    ],
)
def test_a_fault_of_a_kernel_is_not_taken_for_a_lack_of_memory(fault: RuntimeError) -> None:
    assert not memory.is_memory_fault(fault)
    with pytest.raises(type(fault)) as caught, memory.memory_faults():
        raise fault
    assert caught.value is fault


def test_memory_that_a_gpu_refuses_is_told_by_its_type() -> None:
    with pytest.raises(UnsupportedError, match="not enough memory"), memory.memory_faults():
        raise torch.OutOfMemoryError("CUDA: any text at all")
