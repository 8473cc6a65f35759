"""Copying from format to format holds about one payload in memory, however many there are."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluscomp_formats.gguf import open_gguf, write_gguf
from cluscomp_formats.hf import open_hf, write_hf
from cluscomp_formats.ir import Array, ClusteredWeight, Codebook, DenseTensor, Model, Stage, Tensor
from cluscomp_formats.packed import open_packed, write_packed

WRITE: dict[str, Callable[..., Any]] = {"packed": write_packed, "hf": write_hf, "gguf": write_gguf}
OPEN: dict[str, Callable[..., Model]] = {"packed": open_packed, "hf": open_hf, "gguf": open_gguf}
COUNT = 24
PAYLOAD = 1 << 20


def large_model() -> Model:
    """Codes of 12 bits (which are unpacked) and dense matrices, a mebibyte each as the IR holds them."""
    tensors: dict[str, Tensor] = {}
    for number in range(COUNT):
        name = f"weight.{number}"
        codebook = Codebook(name, Array((4096, 4), "float16", lambda: np.zeros((4096, 4), np.float16)))
        codes = Array((1024, PAYLOAD // 2048), "uint16", lambda: np.full((1024, PAYLOAD // 2048), 4095, np.uint16))
        tensors[name] = ClusteredWeight(name, (codes.shape[1] * 4, 1024), (Stage(codebook, codes),))
        dense = Array((1024, PAYLOAD // 2048), "float16", lambda: np.ones((1024, PAYLOAD // 2048), np.float16))
        tensors[f"dense.{number}"] = DenseTensor(f"dense.{number}", dense)
    return Model({"model_type": "synthetic"}, tensors)


@pytest.mark.parametrize("to", WRITE)
@pytest.mark.parametrize("source", WRITE)
def test_copying_holds_about_one_payload(source: str, to: str, tmp_path: Path) -> None:
    WRITE[source](large_model(), tmp_path / "source")
    # Imports and caches of the first use are not the copy's.
    WRITE[to](large_model(), tmp_path / "warm-up")
    tracemalloc.start()
    try:
        model = OPEN[source](tmp_path / "source")
        WRITE[to](model, tmp_path / "copy")
        model.digest()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # The unpacked codes, and twice 0.75 of that: what packing a piece of 2^19 codes, here all of them, takes beside it.
    assert peak < 3 * PAYLOAD, f"{peak / PAYLOAD:.1f} payloads"
    assert OPEN[to](tmp_path / "copy").digest() == model.digest()
