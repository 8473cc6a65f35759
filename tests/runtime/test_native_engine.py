"""The native engine against the torch decoder, and what it shares with it: deltas, errors, warnings."""

from __future__ import annotations

import copy
import itertools
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runtime_models import ORACLES, clustered_model, dense_model, oracle, small_config

from cluscomp_formats.delta import Delta
from cluscomp_formats.errors import InvalidFileError, InvalidRequestError
from cluscomp_formats.ir import Array, ClusteredWeight, Codebook, DenseTensor, Model, Stage
from cluscomp_formats.packed import open_packed, write_packed
from cluscomp_formats.parameters import parameters
from cluscomp_kernels import native
from cluscomp_runtime import LanguageModel
from cluscomp_runtime.native_engine import NativeEngine

pytestmark = pytest.mark.skipif(native.library("_engine") is None, reason=native.missing_reason("_engine"))

IDS = np.random.default_rng(3).integers(0, 97, 40)


def clustered(name: str, **features: Any) -> Model:
    """The model of an oracle, with random clustered matrices; norms and biases are the oracle's."""
    dense = oracle(name)[1]
    random = clustered_model(dense.config, **features)
    kept = {key: tensor for key, tensor in dense.tensors.items() if not isinstance(random.tensors[key], ClusteredWeight)}
    return Model(dense.config, {**random.tensors, **kept})


def engine_of(loaded: LanguageModel) -> NativeEngine:
    engine = loaded._engine
    assert isinstance(engine, NativeEngine)
    return engine


def decoded(model: Model) -> Model:
    return Model(model.config, {name: DenseTensor(name, Array.of(tensor.decode())) for name, tensor in model.tensors.items()})


@pytest.mark.parametrize("stored", ["dense", "float16", "int8"])
@pytest.mark.parametrize("name", ORACLES)
def test_every_branch_is_that_of_the_torch_decoder(name: str, stored: str) -> None:
    """The residual stream after every branch, within what activations and centroids of 16 bits explain."""
    model = oracle(name)[1] if stored == "dense" else clustered(name, row_scale=True)
    if stored == "int8":
        model = with_int8(model)
    engine = engine_of(LanguageModel.from_model(model))
    decoder = LanguageModel.from_model(model, dtype="float64", kernel="dense").decoder
    ids = torch.from_numpy(IDS)[None]
    with torch.inference_mode():
        positions = decoder.positions(0, len(IDS))
        streams = [decoder.embed(ids)]
        for layer in decoder.layers:
            for branch in layer.branches:
                streams.append(branch(streams[-1], positions, None))
        head = decoder.head(decoder.norm(streams[-1]))[0].numpy()
    # Errors of single roundings grow from branch to branch, the more so in random models.
    relative = 2e-5 if stored == "dense" else 3e-3
    for number, expected in enumerate(streams):
        found = engine.program.stream(IDS, number)
        scale = expected.abs().max().item()
        assert np.abs(found - expected[0].numpy()).max() <= relative * scale, f"branch {number}"
    logits = engine.logits(IDS, engine.cache(len(IDS)))
    assert np.abs(logits - head).max() <= relative * np.abs(head).max()


def with_int8(model: Model) -> Model:
    tensors = {}
    for name, tensor in model.tensors.items():
        if isinstance(tensor, ClusteredWeight):
            (stage,) = tensor.stages
            values = stage.codebook.values.to_float32()
            unit = np.abs(values).max() / 127
            book = Codebook(stage.codebook.name, Array.of(np.rint(values / unit).astype(np.int8)))
            scale = Array.of((tensor.row_scale.to_float32() * unit).astype(np.float32)) if tensor.row_scale else None
            tensors[name] = ClusteredWeight(name, tensor.shape, (Stage(book, stage.codes),), row_scale=scale)
        else:
            tensors[name] = tensor
    return Model(model.config, tensors)


@pytest.mark.parametrize("name", ["llama-gqa", "gemma3", "qwen3-moe-some-dense", "mistral-window"])
def test_the_cache_changes_no_bit(name: str) -> None:
    """At once, in pieces, one by one; with one thread or three."""
    model = clustered(name)
    alone = engine_of(LanguageModel.from_model(model, threads=1))
    expected = alone.logits(IDS, alone.cache(40))
    engine = engine_of(LanguageModel.from_model(model, threads=3))
    for cuts in ([0, 40], [0, 1, 2, 9, 10, 40], range(41)):
        cache = engine.cache(40)
        parts = [engine.logits(IDS[begin:end], cache) for begin, end in itertools.pairwise(cuts)]
        np.testing.assert_array_equal(np.concatenate(parts), expected)
    cache = engine.cache(40)
    np.testing.assert_array_equal(engine.logits(IDS, cache, last_only=True), expected[-1:])
    np.testing.assert_array_equal(engine.forward(IDS[None].repeat(2, axis=0)), np.stack([expected, expected]))


@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
def test_dense_matrices_of_every_dtype(dtype: str) -> None:
    """Stored values are exact: the same as the float32 values they stand for."""
    wide = oracle("llama-gqa")[1]
    if dtype == "bfloat16":
        arrays = {
            name: Array.of((tensor.decode().view(np.uint32) >> 16).astype(np.uint16), dtype)
            for name, tensor in wide.tensors.items()
        }
    else:
        arrays = {name: Array.of(tensor.decode().astype(dtype)) for name, tensor in wide.tensors.items()}
    model = Model(wide.config, {name: DenseTensor(name, array) for name, array in arrays.items()})
    widened = dense_model(wide.config, {name: array.to_float32() for name, array in arrays.items()})
    found, expected = (LanguageModel.from_model(each).forward(IDS[None]) for each in (model, widened))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_a_delta_gives_what_the_changed_model_gives() -> None:
    model = with_int8(clustered("gemma3", row_scale=True))
    random = np.random.default_rng(0)
    changed = {}
    for name, array in parameters(model).items():
        values = array.read()
        if array.dtype == "int8":
            changed[name] = Array.of(random.integers(-128, 128, values.shape).astype(np.int8))
        else:
            changed[name] = Array.of((values * random.uniform(0.9, 1.1, values.shape)).astype(values.dtype), array.dtype)
    assert {name.partition(".")[0] for name in changed} == {"codebook", "row_scale", "norm"}
    unfinished = Delta(model.digest(), "", changed, {})
    delta = Delta(unfinished.base, unfinished.apply(model).digest(), changed, {})
    loaded = LanguageModel.from_model(model)
    before = loaded.forward(IDS[None])
    loaded.apply_delta(delta)
    after = loaded.forward(IDS[None])
    np.testing.assert_array_equal(after, LanguageModel.from_model(delta.apply(model)).forward(IDS[None]))
    assert not np.array_equal(after, before)
    loaded.apply_delta(None)
    np.testing.assert_array_equal(loaded.forward(IDS[None]), before)


def test_codes_are_used_where_the_file_has_them(tmp_path: Path) -> None:
    path = tmp_path / "model.clus"
    write_packed(clustered_model(small_config()), path)
    model = open_packed(path)
    engine = engine_of(LanguageModel.from_model(model))
    for name, tensor in model.clustered.items():
        tiled = tensor.stages[0].codes.tiled
        assert tiled is not None
        assert np.shares_memory(tiled(), engine.builder.linears[name].stages[0].codes)


def test_a_code_past_the_codebook_names_the_tensor(tmp_path: Path) -> None:
    model = clustered_model(small_config())
    name = "model.layers.2.mlp.down_proj.weight"
    weight = model.tensors[name]
    assert isinstance(weight, ClusteredWeight)
    codes = weight.stages[0].codes.read().copy()
    codes[3, 2] = 40
    bad = ClusteredWeight(name, weight.shape, (Stage(weight.stages[0].codebook, Array.of(codes)),))
    with pytest.raises(InvalidFileError, match="codes are out of range") as error:
        LanguageModel.from_model(Model(model.config, {**model.tensors, name: bad}))
    assert (error.value.problems[0].tensor, error.value.problems[0].found) == (name, "40")


# What torch then uses may be announced as well.
@pytest.mark.filterwarnings("ignore:the native path supports no cluster_dim")
@pytest.mark.parametrize(
    ("features", "reason"),
    [
        ({"column_scale": True}, "has a column scale"),
        ({"outliers": 3}, "has outliers"),
        ({"group_axis": "in"}, "groups along the in axis"),
        ({"cluster_dim": 65}, "codes for more than 64 weights"),
        ({"stages": 65, "num_clusters": 2}, "more than 64 stages"),
    ],
)
def test_what_it_refuses_runs_in_torch_with_a_warning(features: dict[str, Any], reason: str) -> None:
    model = clustered_model(small_config(num_hidden_layers=1), **features)
    expected = LanguageModel.from_model(decoded(model), kernel="dense").generate([1, 2, 3], max_new_tokens=6)
    with pytest.warns(RuntimeWarning, match=f"in torch, which is slower .* {reason}.* and 8 more"):
        loaded = LanguageModel.from_model(model)
    assert loaded.engine == "torch"
    assert loaded.generate([1, 2, 3], max_new_tokens=6).token_ids == expected.token_ids


@pytest.mark.filterwarnings("ignore:the native path is not available")
def test_without_the_library_torch_runs_with_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "missing_reason", lambda name="_native": f"{name} was not built; reinstall")
    with pytest.warns(RuntimeWarning, match="in torch, which is slower .* _engine was not built; reinstall"):
        assert LanguageModel.from_model(clustered_model(small_config())).engine == "torch"


@pytest.mark.parametrize(
    "options", [{"kernel": "dense"}, {"dtype": "float64"}, {"dtype": torch.bfloat16}, {"kernel": "reference"}]
)
def test_what_torch_is_asked_for_it_runs_without_a_warning(options: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert LanguageModel.from_model(clustered_model(small_config()), **options).engine == "torch"


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu")])
@pytest.mark.parametrize("dtype", [None, "float32", torch.float32])
def test_the_default_in_other_words_is_native(device: Any, dtype: Any) -> None:
    loaded = LanguageModel.from_model(clustered_model(small_config()), device=device, dtype=dtype)
    assert loaded.engine == "native"
    assert (loaded.device, loaded.dtype) == (torch.device("cpu"), torch.float32)
    with pytest.raises(InvalidRequestError, match="no torch decoder"):
        loaded.decoder  # noqa: B018


def test_threads_out_of_range() -> None:
    with pytest.raises(InvalidRequestError, match="threads is out of range"):
        LanguageModel.from_model(clustered_model(small_config()), threads=0)


def test_instructions_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLUSCOMP_CPU", "mmx")
    with pytest.raises(InvalidRequestError, match="CLUSCOMP_CPU=mmx is not available"):
        LanguageModel.from_model(clustered_model(small_config()))


@pytest.mark.parametrize(("cache_dtype", "relative"), [("float16", 5e-3), ("int8", 5e-2)])
def test_narrower_keys_and_values(cache_dtype: str, relative: float) -> None:
    model = oracle("llama-gqa")[1]
    expected = LanguageModel.from_model(model).forward(IDS[None])
    narrow = LanguageModel.from_model(model, cache_dtype=cache_dtype)
    found = narrow.forward(IDS[None])
    assert 0 < np.abs(found - expected).max() <= relative * np.abs(expected).max()
    np.testing.assert_array_equal(copy.copy(narrow).forward(IDS[None]), found)


def test_caches_that_are_not_there() -> None:
    model = clustered_model(small_config())
    with pytest.raises(InvalidRequestError, match="not a dtype of the cache"):
        LanguageModel.from_model(model, cache_dtype="bfloat16")
    with pytest.raises(InvalidRequestError, match="torch stores keys and values"):
        LanguageModel.from_model(model, cache_dtype="int8", kernel="dense")
