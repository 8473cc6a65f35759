"""Clustered models: exact where they can be, near where they cannot, lazy and deterministic."""

from __future__ import annotations

import numpy as np
import pytest
from model_builders import tiny_llama

from cluscomp_export.codebook_rounding import round_centroids
from cluscomp_export.compression.fit_encode import Computing
from cluscomp_export.compression.pipeline import compress
from cluscomp_export.planning import expected_error, plan_fixed
from cluscomp_export.planning.candidates import adaptation
from cluscomp_export.planning.planned_model import planned_model
from cluscomp_formats.errors import InvalidFileError
from cluscomp_formats.ir import Array, DenseTensor, Model

NAME = "model.layers.1.mlp.up_proj.weight"


def model_of(weight: np.ndarray) -> Model:
    name = "model.layers.0.mlp.up_proj.weight"
    return Model({"model_type": "llama"}, {name: DenseTensor(name, Array.of(weight))})


def only_weight(model: Model) -> np.ndarray:
    return next(iter(model.tensors.values())).decode()


def test_as_many_clusters_as_vectors_lose_only_the_rounding_to_float16() -> None:
    source = tiny_llama()
    plan = plan_fixed(source, cluster_dim=4, num_clusters=65536, share="none", embedding_bits=16)
    clustered = compress(source, plan).model
    for name in clustered.clustered:
        wanted = source.tensors[name].decode().astype(np.float16).astype(np.float32)
        np.testing.assert_array_equal(clustered.tensors[name].decode(), wanted)


def test_vectors_run_along_the_out_axis_of_one_input_channel() -> None:
    # Three distinct vectors over four rows: clusters of the transposed layout reproduce them exactly.
    columns = np.array([[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]], np.float32)
    weight = columns[[0, 1, 2, 1, 0, 2]].T.copy()
    source = model_of(weight)
    plan = plan_fixed(source, cluster_dim=4, num_clusters=3, share="none", embedding_bits=16)
    np.testing.assert_array_equal(only_weight(compress(source, plan).model), weight)


def test_rows_that_do_not_fill_a_vector_are_padded_and_cut_off() -> None:
    weight = np.random.default_rng(0).normal(size=(7, 5)).astype(np.float16).astype(np.float32)
    source = model_of(weight)
    plan = plan_fixed(source, cluster_dim=4, num_clusters=64, share="none", embedding_bits=16)
    clustered = compress(source, plan).model
    assert next(iter(clustered.clustered.values())).stages[0].codes.shape == (5, 2)
    np.testing.assert_array_equal(only_weight(clustered), weight)


@pytest.mark.parametrize("share", ["none", "kind", "model"])
def test_the_error_is_what_theory_expects(share: str) -> None:
    weight = np.random.default_rng(1).normal(0, 0.02, (256, 512)).astype(np.float32)
    source = model_of(weight)
    plan = plan_fixed(source, cluster_dim=4, num_clusters=256, share=share, embedding_bits=16)  # type: ignore[arg-type]
    decoded = only_weight(compress(source, plan).model)
    error = float(np.square(decoded - weight).mean() / np.square(weight).mean())
    # Zador's formula is asymptotic: at 256 clusters of dimension 4 it is right to about a tenth.
    gaussian = expected_error(4, 256, weight.size // 4) / adaptation(256)
    assert error == pytest.approx(gaussian, rel=0.15)


def test_row_scales_absorb_rows_of_different_size() -> None:
    generator = np.random.default_rng(2)
    weight = (generator.normal(size=(64, 256)) * np.geomspace(1e-3, 1, 64)[:, None]).astype(np.float32)
    source = model_of(weight)
    plan = plan_fixed(source, cluster_dim=4, num_clusters=256, share="model", embedding_bits=16)
    decoded = only_weight(compress(source, plan).model)
    relative = np.square(decoded - weight).mean(1) / np.square(weight).mean(1)
    assert relative.max() < 3 * expected_error(4, 256, weight.size // 4)


@pytest.mark.parametrize("tails", [np.inf, 4.0])
def test_codebooks_of_int8_lose_no_more_than_their_step(tails: float) -> None:
    generator = np.random.default_rng(5)
    rows = generator.normal(size=(256, 512)) if np.isinf(tails) else generator.standard_t(tails, (256, 512))
    source = model_of((0.02 * rows).astype(np.float32))
    wanted = source.tensors["model.layers.0.mlp.up_proj.weight"].decode()
    energy = np.square(wanted).mean(1)
    errors = {}
    for bits in (8, 16):
        plan = plan_fixed(source, cluster_dim=2, num_clusters=1024, share="kind", embedding_bits=16, codebook_bits=bits)
        model = compress(source, plan).model
        errors[bits] = float(np.mean(np.square(only_weight(model) - wanted).mean(1) / energy))
        weight = next(iter(model.clustered.values()))
        assert weight.stages[0].codebook.values.dtype == {8: "int8", 16: "float16"}[bits]
        if bits == 8:
            assert weight.row_scale is not None
            step = float(np.median(weight.row_scale.to_float32() / np.sqrt(energy)))
    # Rounding adds a twelfth of the squared step; the few that are clipped add less than that again.
    assert errors[16] < errors[8] < errors[16] + 2 * step**2 / 12


def test_the_step_of_a_codebook_is_that_of_least_weighted_error() -> None:
    # 1000 vectors near 1, one at 100: clipping the one costs more than rounding the others coarsely, unless it weighs nothing.
    centroids = np.append(np.linspace(0.9, 1.1, 40), 100).astype(np.float32)[:, None]
    for size, largest in ((1, 100), (1e-9, 20)):
        numbers, step = round_centroids(centroids, np.append(np.full(40, 25.0), size))
        assert numbers.dtype == np.int8
        assert int(numbers.max()) == 127
        assert float(numbers[-1, 0] * step) <= largest
        assert np.abs(numbers[:-1] * step - centroids[:-1]).max() <= step / 2 + 1e-6
    numbers, step = round_centroids(np.zeros((3, 2), np.float32), np.ones(3))
    assert not numbers.any()
    assert step > 0


def test_a_row_of_zeros_stays_zero_and_a_tiny_row_is_refused_by_name() -> None:
    weight = np.random.default_rng(3).normal(size=(16, 64)).astype(np.float32)
    weight[3] = 0
    source = model_of(weight)
    plan = plan_fixed(source, cluster_dim=1, num_clusters=64, share="model", embedding_bits=16)
    assert np.abs(only_weight(compress(source, plan).model)[3]).max() < 0.1
    # With a step folded in, its scale would leave float16: it counts as stronger than it is, and errs by itself at most.
    weight[3] = 1e-6
    assert np.abs(only_weight(compress(source, plan).model)[3]).max() < 3e-6
    weight[3] = 1e-12
    assert np.abs(only_weight(compress(source, plan).model)[3]).max() < 3e-6
    plan = plan_fixed(source, cluster_dim=1, num_clusters=64, share="model", embedding_bits=16, codebook_bits=16)
    with pytest.raises(InvalidFileError) as caught:
        only_weight(compress(source, plan).model)
    problem = caught.value.problems[0]
    assert (problem.kind, problem.tensor) == ("out_of_range", "model.layers.0.mlp.up_proj.weight")


@pytest.mark.parametrize("share", ["none", "kind"])
def test_same_seed_same_model_whatever_the_order_of_reading(share: str) -> None:
    source = tiny_llama()
    plan = plan_fixed(source, cluster_dim=2, num_clusters=16, share=share, embedding_bits=6)  # type: ignore[arg-type]
    first, second = (compress(source, plan, computing=Computing(threads=count)).model for count in (1, 2))
    second.tensors[NAME].decode()
    assert first.digest() == second.digest()


def test_a_planned_model_has_shapes_and_no_values() -> None:
    source = tiny_llama()
    plan = plan_fixed(source, cluster_dim=4, num_clusters=16, share="kind", embedding_bits=16)
    model = planned_model(source, plan)
    assert model.clustered[NAME].stages[0].codes.shape == (24, 10)
    with pytest.raises(RuntimeError, match="compress the source first"):
        model.clustered[NAME].stages[0].codes.read()


def test_each_tensor_is_encoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from cluscomp_export.compression import fit_encode as jobs

    calls: list[int] = []
    assign = jobs.assign
    monkeypatch.setattr(jobs, "assign", lambda *a, **k: (calls.append(1), assign(*a, **k))[1])
    source = tiny_llama()
    model = compress(source, plan_fixed(source, cluster_dim=4, num_clusters=16, share="kind", embedding_bits=16)).model
    model.digest()
    assert len(calls) == 14


def test_dense_matrices_become_float16_and_vectors_keep_their_dtype() -> None:
    source = tiny_llama()
    model = compress(source, plan_fixed(source, cluster_dim=4, num_clusters=16, share="kind", embedding_bits=16)).model
    assert model.tensors["model.embed_tokens.weight"].values.dtype == "float16"  # type: ignore[union-attr]
    assert model.tensors["model.norm.weight"].values.dtype == "float32"  # type: ignore[union-attr]


def test_a_dense_value_beyond_float16_is_refused_by_name() -> None:
    source = tiny_llama()
    name = "model.embed_tokens.weight"
    values = source.tensors[name].decode().copy()
    values[0, 0] = 1e6
    source = Model(source.config, {**source.tensors, name: DenseTensor(name, Array.of(values))})
    model = compress(source, plan_fixed(source, cluster_dim=4, num_clusters=16, share="kind", embedding_bits=16)).model
    with pytest.raises(InvalidFileError) as caught:
        model.digest()
    assert caught.value.problems[0].tensor == name
