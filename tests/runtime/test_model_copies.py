"""Pickling and copying a loaded model: the copy computes the same, in this process and in another."""

from __future__ import annotations

import copy
import io
import multiprocessing
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runtime_models import byte_tokenizer_files, clustered_model, small_config

from cluscomp_formats.delta import Delta
from cluscomp_formats.ir import Array
from cluscomp_formats.packed import write_packed
from cluscomp_formats.parameters import parameters
from cluscomp_runtime import LanguageModel, load

IDS = [[5, 17, 3]]


def saved(model: LanguageModel) -> LanguageModel:
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    loaded: LanguageModel = torch.load(stream, weights_only=False)
    return loaded


COPIES: list[Callable[[Any], Any]] = [lambda model: pickle.loads(pickle.dumps(model)), copy.deepcopy, copy.copy, saved]  # noqa: S301


@pytest.fixture
def model(tmp_path: Path) -> LanguageModel:
    path = tmp_path / "model.clus"
    write_packed(clustered_model(small_config(vocab_size=258), byte_tokenizer_files()), path)
    loaded = load(path, context=40)
    # The copies need no file.
    path.rename(tmp_path / "moved")
    return loaded


def delta_of(model: LanguageModel) -> Delta:
    base = model._base
    name, array = next((name, array) for name, array in parameters(base).items() if array.dtype == "float16")
    changed = Array.of((array.read() * 2).astype(np.float16))
    unfinished = Delta(base.digest(), "", {name: changed}, {})
    return Delta(unfinished.base, unfinished.apply(base).digest(), unfinished.arrays, {})


@pytest.mark.parametrize("copied", COPIES)
def test_a_copy_computes_the_same(model: LanguageModel, copied: Callable[[Any], Any]) -> None:
    twin = copied(model)
    np.testing.assert_array_equal(twin(IDS), model(IDS))
    assert twin.context == 40
    assert twin.kernels == model.kernels
    assert twin.generate("ab", max_new_tokens=4).text == model.generate("ab", max_new_tokens=4).text


@pytest.mark.parametrize("copied", COPIES)
def test_a_copy_has_the_delta_and_may_have_another(model: LanguageModel, copied: Callable[[Any], Any]) -> None:
    plain = model(IDS)
    model.apply_delta(delta_of(model))
    changed = model(IDS)
    assert not np.array_equal(changed, plain)
    twin = copied(model)
    np.testing.assert_array_equal(twin(IDS), changed)
    twin.apply_delta(None)
    np.testing.assert_array_equal(twin(IDS), plain)
    np.testing.assert_array_equal(model(IDS), changed)


def test_a_model_without_a_file_and_one_in_float64() -> None:
    model = LanguageModel.from_model(clustered_model(small_config()), dtype="float64", kernel="dense")
    twin = pickle.loads(pickle.dumps(model))  # noqa: S301
    np.testing.assert_array_equal(twin(IDS), model(IDS))
    assert (twin.dtype, model(IDS).dtype) == (torch.float64, np.float64)


def _logits(model: LanguageModel) -> Any:
    return model(IDS)


def test_a_model_goes_to_a_process_that_is_spawned() -> None:
    model = LanguageModel.from_model(clustered_model(small_config(num_hidden_layers=1)))
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert np.array_equal(pool.apply(_logits, (model,)), _logits(model))
