"""The operators compute what the IR defines, for every kind of weight, in the package onnx's evaluator and in onnxruntime."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from clustered_models import clustered as clustered_weight
from clustered_models import codebook
from hypothesis import given, settings
from hypothesis import strategies as st
from model_strategies import clustered, finite
from onnx_graphs import COMPACT, Arrays, check_strictly, feeds_of, graph_of, matrices, run_onnxruntime, run_reference

from cluscomp_formats.ir import CODEBOOK_DTYPES, Array, ClusteredWeight, Codebook, DenseTensor, Model, Outliers, Tensor
from cluscomp_formats.onnx.writer import write_onnx

RUNNERS: dict[str, Callable[[Path, Arrays], Arrays]] = {
    "onnx.reference": run_reference,
    "onnxruntime": run_onnxruntime,
    "onnxruntime, compact": lambda folder, feeds: run_onnxruntime(folder, feeds, COMPACT),
}


def assert_agrees(model: Model, found: Arrays, feeds: Arrays, *, transposed: bool = False) -> None:
    """Compare outputs with the decoded weights, in float64.

    Each of the `n` products, and each of the few scalings, sums over stages and conversions after it, rounds once in float32.
    The error is at most `(n + 16) * eps` times the sum of their magnitudes, for any order of summation (Higham, Accuracy and
    Stability of Numerical Algorithms, 3.1). The magnitudes include every stage and outlier, since these may cancel each other.
    """
    eps = np.finfo(np.float32).eps
    for number, name in enumerate(matrices(model)):
        tensor = model.tensors[name]
        weight, size = tensor.decode().astype(np.float64), magnitude(tensor)
        ids = feeds[f"ids{number}"]
        assert np.all(np.abs(found[f"rows{number}"] - weight[ids]) <= 16 * eps * size[ids]), name
        x = feeds[f"x{number}"].astype(np.float64)
        matrix, size = (weight, size) if transposed else (weight.T, size.T)
        bound = (len(matrix) + 16) * eps * (np.abs(x) @ size)
        assert np.all(np.abs(found[f"y{number}"] - x @ matrix) <= bound + np.finfo(np.float32).tiny), name


def magnitude(tensor: Tensor) -> np.ndarray:
    """Return the weight with the absolute values of all its parts, so that nothing cancels."""

    def absolute(array: Array | None) -> Array | None:
        return None if array is None else Array.of(np.abs(array.to_float32()))

    if isinstance(tensor, DenseTensor):
        return np.abs(tensor.decode()).astype(np.float64)
    stages = []
    for stage in tensor.stages:
        values = Array.of(np.abs(stage.codebook.values.to_float32()))
        stages.append(type(stage)(Codebook(stage.codebook.name, values), stage.codes))
    outliers = tensor.outliers and Outliers(tensor.outliers.positions, Array.of(np.abs(tensor.outliers.values.to_float32())))
    row, column = absolute(tensor.row_scale), absolute(tensor.column_scale)
    return (
        ClusteredWeight(tensor.name, tensor.shape, tuple(stages), tensor.group_axis, row, column, outliers)
        .decode()
        .astype(float)
    )


@st.composite
def weights(draw: st.DrawFn) -> Model:
    """A few clustered weights of any kind with shared codebooks, and a dense one."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    sizes = st.one_of(st.integers(1, 40), st.sampled_from([255, 256, 257, 4096]))
    codebooks = [
        Codebook(f"c{number}", finite(rng, draw(st.sampled_from(CODEBOOK_DTYPES)), (draw(sizes), draw(st.integers(1, 9)))))
        for number in range(draw(st.integers(1, 2)))
    ]
    tensors: dict[str, Tensor] = {}
    for number in range(draw(st.integers(1, 3))):
        name = f"layer{number}.weight"
        tensors[name] = draw(clustered(name, codebooks, rng))
    dtype = draw(st.sampled_from(["float16", "float32", "bfloat16"]))
    tensors["dense"] = DenseTensor("dense", finite(rng, dtype, (draw(st.integers(1, 9)), draw(st.integers(1, 9)))))
    return Model({}, tensors)


@pytest.mark.parametrize("runner", RUNNERS)
@settings(max_examples=15)
@given(weights(), st.booleans())
def test_any_weight(runner: str, model: Model, transposed: bool) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        write_onnx(model, folder, graph_of(model, transposed=transposed))
        check_strictly(folder, Path(scratch) / "inferred.onnx")
        feeds = feeds_of(model, transposed=transposed)
        assert_agrees(model, RUNNERS[runner](folder, feeds), feeds, transposed=transposed)


def test_by_hand(tmp_path: Path) -> None:
    """A 3 x 2 weight with vectors of two outputs (the second vector is cut off), row scales and an outlier."""
    centroids = np.array([[1, 2], [3, 4], [-1, 0.5]], np.float16)
    codes = np.array([[0, 1], [2, 0]], np.uint16)
    book = Codebook("book", Array.of(centroids))
    weight = ClusteredWeight(
        "w.weight",
        (3, 2),
        (type(clustered_weight("w.weight", (3, 2), [book], 0).stages[0])(book, Array.of(codes)),),
        row_scale=Array.of(np.array([1, 10, 100], np.float32)),
        outliers=Outliers(Array.of(np.array([5], np.uint32)), Array.of(np.array([1000], np.float32))),
    )
    # Columns: inputs. First input: (1, 2, 3), second: (-1, 0.5, 1).
    expected = np.array([[1, -1], [20, 5], [300, 1100]], np.float32)
    model = Model({}, {"w.weight": weight})
    write_onnx(model, tmp_path / "model", graph_of(model))
    feeds = {"x0": np.array([[[1, 0], [0, 1]]], np.float32), "ids0": np.array([[2, 0]])}
    for run in RUNNERS.values():
        found = run(tmp_path / "model", feeds)
        assert (found["y0"] == expected.T[None]).all()
        assert (found["rows0"] == expected[[2, 0]][None]).all()


@pytest.mark.parametrize("num_clusters", [1, 256, 257, 65536])
def test_the_full_range_of_codes(tmp_path: Path, num_clusters: int) -> None:
    book = codebook("book", num_clusters, 2, 1)
    weight = clustered_weight("w.weight", (8, 5), [book], 2)
    codes = weight.stages[0].codes.read().copy()
    codes.flat[0], codes.flat[-1] = num_clusters - 1, 0
    stage = type(weight.stages[0])(book, Array.of(codes))
    model = Model({}, {"w.weight": ClusteredWeight("w.weight", (8, 5), (stage,))})
    write_onnx(model, tmp_path / "model", graph_of(model))
    feeds = feeds_of(model)
    for run in RUNNERS.values():
        assert_agrees(model, run(tmp_path / "model", feeds), feeds)
