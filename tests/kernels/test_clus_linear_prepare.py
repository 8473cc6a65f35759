"""Preparation, dispatch, and the paths that use torch alone."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from cluscomp_kernels import native
from cluscomp_kernels.clus_linear import PreparedWeight, choose_path, dispatch, paths, prepare, prepare_codebook

CPU_PATHS = tuple(path.name for path in paths("cpu") if path.available)

# A weight by hand: dim 2, three outputs (the last vector is cut off), two inputs.
CODEBOOK = torch.tensor([[1.0, 2.0], [3.0, 4.0], [-5.0, 0.5]])
CODES = torch.tensor([[0, 1], [2, 0]]).to(torch.uint16)
WEIGHT = torch.tensor([[1.0, -5.0], [2.0, 0.5], [3.0, 1.0]])  # [out_features, in_features]

every_path = pytest.mark.parametrize("path", CPU_PATHS)


def by_hand(path: str, **options: Any) -> PreparedWeight:
    return prepare(CODEBOOK, CODES, 3, path=path, **options)


@every_path
def test_hand_computed_weight(path: str) -> None:
    scale, bias = torch.tensor([1.0, 2.0, 0.5]), torch.tensor([10.0, 0.0, -1.0])
    prepared = by_hand(path, row_scale=scale, bias=bias)
    scaled = torch.tensor([[1.0, -5.0], [4.0, 1.0], [1.5, 0.5]])
    assert (prepared.path, prepared.out_features, prepared.in_features) == (path, 3, 2)
    assert torch.equal(prepared.decode(), scaled)
    assert torch.equal(prepared.embedding(torch.tensor([2, 0])), scaled[[2, 0]])
    # x = (2, 3): Q x = (2 - 15, 4 + 1.5, 6 + 3), scaled (-13, 11, 4.5), plus bias
    assert torch.equal(prepared(torch.tensor([2.0, 3.0])), torch.tensor([-3.0, 11.0, 3.5]))


@every_path
@pytest.mark.parametrize("shape", [(2,), (0, 2), (1, 2), (3, 2), (2, 5, 2), (2, 0, 2)])
def test_shapes_of_the_input_are_kept(path: str, shape: tuple[int, ...]) -> None:
    x = torch.arange(float(torch.Size(shape).numel())).reshape(shape)
    assert torch.equal(by_hand(path)(x), x @ WEIGHT.t())


@every_path
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(path: str, dtype: torch.dtype) -> None:
    x = torch.tensor([[2.0, 4.0]], dtype=dtype)  # every intermediate result is exact in each dtype
    prepared = by_hand(path, dtype=dtype)
    assert prepared(x).dtype == dtype
    assert torch.equal(prepared(x).float(), torch.tensor([[-18.0, 6.0, 10.0]]))
    assert prepared.decode().dtype == dtype
    assert prepared.embedding(torch.tensor([0])).dtype == dtype


@every_path
def test_codebooks_of_int8(path: str) -> None:
    codebook = torch.tensor([[1, 2], [3, 127], [-128, 0]], dtype=torch.int8)
    weight = torch.tensor([[1.0, -128.0], [2.0, 0.0], [3.0, 1.0]])
    scale = torch.tensor([1.0, 2.0, 2.0**-10])
    shared = prepare_codebook(codebook, path=path)
    for row_scale, wanted in ((None, weight), (scale, weight * scale[:, None])):
        prepared = prepare(shared, CODES, 3, row_scale=row_scale)
        assert torch.equal(prepared.decode(), wanted)
        assert torch.equal(prepared.embedding(torch.tensor([2, 0])), wanted[[2, 0]])
        assert torch.equal(prepared(torch.tensor([2.0, 3.0])), wanted @ torch.tensor([2.0, 3.0]))


@every_path
def test_products_of_int8_stay_in_the_range_of_float16(path: str) -> None:
    # 2000 * 127 exceeds the range of float16, but the scaled result does not.
    codebook = torch.tensor([[127]], dtype=torch.int8)
    prepared = prepare(codebook, torch.zeros(1, 1, dtype=torch.uint16), 1, row_scale=torch.tensor([2.0**-7]), path=path)
    y = prepared(torch.full((40, 1), 2000.0, dtype=torch.float16))
    assert torch.equal(y, torch.full((40, 1), 127 / 128 * 2000, dtype=torch.float16))


@every_path
def test_codes_past_the_codebook_are_refused(path: str) -> None:
    codes = torch.tensor([[0, 1], [2, 3]]).to(torch.uint16)
    with pytest.raises(ValueError, match="codes go up to 3, but the codebook has only 3 clusters"):
        prepare(CODEBOOK, codes, 3, path=path)


@every_path
@pytest.mark.parametrize("identifier", [-1, 3])
def test_ids_outside_the_weight_are_refused(path: str, identifier: int) -> None:
    with pytest.raises(IndexError, match="expected 0 to 2"):
        by_hand(path).embedding(torch.tensor([identifier]))


@every_path
def test_an_input_that_needs_a_gradient_is_refused(path: str) -> None:
    x = torch.zeros(1, 2, requires_grad=True)
    with pytest.raises(RuntimeError, match="no backward pass"):
        by_hand(path)(x)
    with torch.no_grad():
        assert by_hand(path)(x).shape == (1, 3)


@every_path
def test_wrong_operands_are_refused(path: str) -> None:
    with pytest.raises(TypeError, match=r"codes are torch.int64, expected torch.uint16"):
        prepare(CODEBOOK, CODES.to(torch.int64), 3, path=path)
    with pytest.raises(ValueError, match=r"expected \[in_features, 3\] for 5 out_features in vectors of 2"):
        prepare(CODEBOOK, CODES, 5, path=path)
    with pytest.raises(ValueError, match=r"row_scale has shape \(2,\), expected \(3,\)"):
        by_hand(path, row_scale=torch.ones(2))
    with pytest.raises(TypeError, match=r"bias is torch.int64"):
        by_hand(path, bias=torch.ones(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="1 to 65536 clusters"):
        prepare_codebook(torch.zeros(65537, 2), path=path)
    with pytest.raises(TypeError, match=r"codebook is torch.int32"):
        prepare_codebook(torch.zeros(2, 2, dtype=torch.int32), path=path)
    with pytest.raises(ValueError, match=r"x has shape \(1, 3\)"):
        by_hand(path)(torch.zeros(1, 3))
    with pytest.raises(TypeError, match=r"x is torch.int64"):
        by_hand(path)(torch.zeros(1, 2, dtype=torch.int64))


def test_unavailable_and_unknown_paths_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'triton' is not available on cpu: runs on CUDA devices only.*available: auto"):
        by_hand("triton")
    with pytest.raises(ValueError, match="there is no path 'fast'; on cpu there are: auto"):
        by_hand("fast")
    with pytest.raises(ValueError, match="prepared for the path 'dense', not 'reference'"):
        prepare(prepare_codebook(CODEBOOK, path="dense"), CODES, 3, path="reference")


def test_a_missing_library_is_announced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "missing_reason", lambda: "no compiler")
    dispatch._warn_once.cache_clear()
    assert {path.name: path for path in paths("cpu")}["native"] == ("native", False, "no compiler")
    with pytest.warns(RuntimeWarning, match=r"no compiler.*'embedding_bag' is used"):
        assert choose_path("cpu") == "embedding_bag"
    assert choose_path("cpu") == "embedding_bag"  # a second warning would be an error
    dispatch._warn_once.cache_clear()


@pytest.mark.skipif(native.library() is None, reason=native.missing_reason())
def test_long_vectors_fall_back_with_a_warning() -> None:
    dispatch._warn_once.cache_clear()
    codes = torch.zeros(2, 1, dtype=torch.uint16)
    with pytest.warns(RuntimeWarning, match="no cluster_dim above 64"):
        assert prepare(torch.ones(1, 65), codes, 65).path == "embedding_bag"
    with pytest.raises(ValueError, match="cluster_dim of 1 to 64, got 65"):
        prepare(torch.ones(1, 65), codes, 65, path="native")
    dispatch._warn_once.cache_clear()


def test_without_the_library_everything_still_works() -> None:
    script = """
import warnings, torch
from cluscomp_kernels.clus_linear import prepare
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        weight = prepare(torch.tensor([[1.0, 2.0]]), torch.zeros(3, 1, dtype=torch.uint16), 2)
assert weight.path == "embedding_bag", weight.path
assert [str(w.message).count("CLUSCOMP_NATIVE=0") for w in caught] == [1], caught
assert torch.equal(weight(torch.ones(1, 3)), torch.tensor([[3.0, 6.0]]))
"""
    environment = {**os.environ, "CLUSCOMP_NATIVE": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", script], check=True, env=environment)


def test_torch_compile_takes_a_prepared_weight() -> None:
    prepared = [by_hand(path) for path in CPU_PATHS if path in {"native", "dense"}]

    class Sum(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return sum((weight(x) for weight in prepared), torch.zeros(()))

    x = torch.randn(4, 2, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        compiled = torch.compile(Sum(), fullgraph=True, backend="aot_eager")(x)
    assert torch.allclose(compiled, len(prepared) * (x @ WEIGHT.t()))
