"""Clustered matrices in the runtime against the IR's own decode()."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from runtime_models import clustered_model, random_clustered, small_config

from cluscomp_formats.errors import InvalidFileError, InvalidRequestError
from cluscomp_formats.ir import Array, ClusteredWeight, Codebook, DenseTensor, Model, Outliers, Stage
from cluscomp_kernels import clus_linear
from cluscomp_runtime import LanguageModel
from cluscomp_runtime.linear import MatrixBuilder

CPU = torch.device("cpu")
FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "padded": {"cluster_dim": 7},
    "two stages": {"stages": 2},
    "row scale": {"row_scale": True},
    "column scale": {"column_scale": True},
    "outliers": {"outliers": 37},
    "one cluster": {"num_clusters": 1},
    "wide codes": {"num_clusters": 300},
    "everything": {"stages": 3, "cluster_dim": 5, "row_scale": True, "column_scale": True, "outliers": 50},
}


def builder(kernel: str = "auto", dtype: torch.dtype = torch.float32) -> MatrixBuilder:
    return MatrixBuilder(kernel, dtype, CPU)


def close(found: torch.Tensor, expected: torch.Tensor, magnitude: torch.Tensor, terms: int) -> None:
    """|error| <= (terms + 4) eps * sum of |products|: the standard bound of a dot product for any order of summation."""
    bound = (terms + 4) * torch.finfo(torch.float32).eps * magnitude
    assert ((found.double() - expected).abs() <= bound).all()


@pytest.mark.parametrize("group_axis", ["out", "in"])
@pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES)
@pytest.mark.parametrize("kernel", ["auto", "dense", "reference"])
@pytest.mark.parametrize("tokens", [(1,), (2, 3), (40,)], ids=str)
def test_products_and_rows(kernel: str, features: dict[str, Any], group_axis: str, tokens: tuple[int, ...]) -> None:
    random = np.random.default_rng(11)
    weight = random_clustered("w", (45, 30), random, group_axis=group_axis, **features)
    bias = DenseTensor("b", Array.of(random.standard_normal(45).astype(np.float32)))
    matrix = builder(kernel).build(weight, bias)
    x = torch.from_numpy(random.standard_normal((*tokens, 30)).astype(np.float32))
    dense, offset = torch.from_numpy(weight.decode()).double(), torch.from_numpy(bias.decode()).double()
    parts = 1 + len(weight.stages) + (weight.outliers is not None)
    # Stages may cancel each other, so the bound uses their absolute sum.
    magnitude = x.abs().double() @ absolute(weight).T + offset.abs()
    close(matrix(x), x.double() @ dense.T + offset, magnitude, 30 * parts)
    ids = torch.from_numpy(random.integers(0, 45, tokens))
    close(matrix.embedding(ids), dense[ids], absolute(weight)[ids], parts)


def absolute(weight: ClusteredWeight) -> torch.Tensor:
    """Return the weight with the absolute values of every stage, scale and outlier."""
    stages = tuple(
        Stage(Codebook(stage.codebook.name, Array.of(np.abs(stage.codebook.values.read()))), stage.codes)
        for stage in weight.stages
    )
    outliers = weight.outliers and Outliers(weight.outliers.positions, Array.of(np.abs(weight.outliers.values.read())))
    positive = ClusteredWeight(
        weight.name, weight.shape, stages, weight.group_axis, weight.row_scale, weight.column_scale, outliers
    )
    return torch.from_numpy(positive.decode()).double()


def test_a_product_by_hand() -> None:
    codebook = Codebook("c", Array.of(np.array([[1, 2], [3, 4]], np.float16)))
    codes = np.array([[0, 1], [1, 0]], np.uint16)
    weight = ClusteredWeight(
        "w",
        (3, 2),
        (Stage(codebook, Array.of(codes)),),
        row_scale=Array.of(np.array([1, 2, 3], np.float32)),
        column_scale=Array.of(np.array([1, 10], np.float32)),
        outliers=Outliers(Array.of(np.array([1, 4], np.uint32)), Array.of(np.array([100, -9], np.float32))),
    )
    # The codes give columns (1, 2, 3) and (3, 4, 1). With scales and outliers:
    expected = [[1.0, 130.0], [4.0, 80.0], [0.0, 30.0]]
    matrix = builder().build(weight)
    assert matrix.embedding(torch.arange(3)).tolist() == expected
    assert matrix(torch.tensor([[1.0, 2.0]])).tolist() == [[261.0, 164.0, 60.0]]


@pytest.mark.parametrize("path", [status.name for status in clus_linear.paths(CPU) if status.available])
def test_every_kernel_gives_the_same_model(path: str) -> None:
    model = clustered_model(small_config(tie_word_embeddings=True), row_scale=True)
    ids = torch.arange(60).reshape(2, 30) % 97
    exact = LanguageModel.from_model(model, kernel="reference", dtype="float64").forward(ids)
    single = LanguageModel.from_model(model, kernel="reference").forward(ids)
    language_model = LanguageModel.from_model(model, kernel=path)
    tolerance = 8 * max((single - exact).abs().max().item(), exact.abs().max().item() * torch.finfo(torch.float32).eps)
    assert (language_model.forward(ids) - exact).abs().max().item() <= tolerance
    result = language_model.generate(ids[0], max_new_tokens=8)
    expected = LanguageModel.from_model(model, kernel="dense").generate(ids[0], max_new_tokens=8)
    assert result.token_ids == expected.token_ids


@pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES)
def test_a_clustered_model_is_its_decoded_self(features: dict[str, Any]) -> None:
    model = clustered_model(small_config("qwen3", head_dim=10), **features)
    decoded = {name: DenseTensor(name, Array.of(tensor.decode())) for name, tensor in model.tensors.items()}
    ids = torch.arange(20)[None]
    exact = LanguageModel.from_model(Model(model.config, decoded), dtype="float64").forward(ids)
    single = LanguageModel.from_model(Model(model.config, decoded)).forward(ids)
    tolerance = 8 * max((single - exact).abs().max().item(), exact.abs().max().item() * torch.finfo(torch.float32).eps)
    found = LanguageModel.from_model(model, kernel=clus_linear.choose_path(CPU)).forward(ids)
    assert (found - exact).abs().max().item() <= tolerance


def test_shared_codebooks_are_placed_once() -> None:
    random = np.random.default_rng(2)
    shared = Codebook("shared", Array.of(random.standard_normal((50, 4)).astype(np.float16)))
    model = clustered_model(small_config(), codebook=shared)
    reads = []
    values = shared.values

    def load() -> np.ndarray:
        reads.append(1)
        return values.read()

    lazy = Codebook("shared", Array(values.shape, values.dtype, load))
    tensors = {
        name: ClusteredWeight(name, tensor.shape, (Stage(lazy, tensor.stages[0].codes),))
        if isinstance(tensor, ClusteredWeight)
        else tensor
        for name, tensor in model.tensors.items()
    }
    LanguageModel.from_model(Model(model.config, tensors))
    assert len(reads) == 1


def test_the_in_axis_is_announced_and_reported() -> None:
    model = clustered_model(small_config(), group_axis="in")
    with pytest.warns(RuntimeWarning, match="in torch, .* in axis, .* decoded to float32.* and 22 more"):
        language_model = LanguageModel.from_model(model)
    assert language_model.kernel_summary == "dense (decoded: groups along the in axis) (23 matrices)"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quiet = LanguageModel.from_model(model, kernel="dense")
    assert quiet.kernel_summary == "dense (decoded) (23 matrices)"


def test_kernels_are_listed_by_tensor() -> None:
    model = clustered_model(small_config())
    name = "lm_head.weight"
    mixed = Model(model.config, {**model.tensors, name: DenseTensor(name, Array.of(model.tensors[name].decode()))})
    language_model = LanguageModel.from_model(mixed)
    best = clus_linear.choose_path(CPU)
    assert language_model.kernels[name] == "dense"
    assert language_model.kernels["model.embed_tokens.weight"] == best
    assert language_model.kernel_summary == f"{best} (22 matrices), dense (1 matrix)"


def test_an_unknown_kernel_is_refused_with_those_there_are() -> None:
    with pytest.raises(InvalidRequestError, match="no such kernel") as error:
        LanguageModel.from_model(clustered_model(small_config()), kernel="fast")
    assert all(name in (error.value.problems[0].expected or "") for name in ("auto", "dense", "reference"))


@pytest.mark.parametrize("kernel", ["auto", "dense"])
def test_a_code_past_the_codebook_names_the_tensor(kernel: str) -> None:
    model = clustered_model(small_config())
    name = "model.layers.2.mlp.down_proj.weight"
    good = model.tensors[name]
    assert isinstance(good, ClusteredWeight)
    codes = good.stages[0].codes.read().copy()
    codes[3, 2] = 40
    bad = ClusteredWeight(name, good.shape, (Stage(good.stages[0].codebook, Array.of(codes)),))
    with pytest.raises(InvalidFileError) as error:
        LanguageModel.from_model(Model(model.config, {**model.tensors, name: bad}), kernel=kernel)
    assert error.value.problems[0].tensor == name


def test_an_outlier_past_the_weight_names_the_tensor() -> None:
    random = np.random.default_rng(0)
    good = random_clustered("w", (8, 6), random, outliers=2)
    beyond = Outliers(Array.of(np.array([3, 48], np.uint32)), Array.of(np.ones(2, np.float16)))
    bad = ClusteredWeight("w", good.shape, good.stages, outliers=beyond)
    with pytest.raises(InvalidFileError, match="outlier") as error:
        builder().build(bad)
    assert error.value.problems[0].tensor == "w"


def test_a_kernel_that_is_known_but_not_here_says_why() -> None:
    with pytest.raises(InvalidRequestError, match="CUDA devices only"):
        LanguageModel.from_model(clustered_model(small_config()), kernel="triton")


def test_a_codebook_too_wide_for_the_kernel_asked_for() -> None:
    if not {status.name: status.available for status in clus_linear.paths(CPU)}["native"]:
        pytest.skip("the C kernels were not built")
    weight = random_clustered("w", (130, 8), np.random.default_rng(0), cluster_dim=65)
    with pytest.raises(InvalidRequestError, match="cluster_dim"):
        builder("native").build(weight)
