"""The C kernels, with every instruction set of this machine, against the reference in float64."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor

from cluscomp_kernels import native
from cluscomp_kernels.clus_linear import native_kernel, prepare, prepare_codebook, reference

pytestmark = pytest.mark.skipif(native.library() is None, reason=native.missing_reason())

EPS = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
DIMS = (1, 2, 3, 4, 6, 7, 8, 9, 16, 24, 40, 64)


def problem(seed: int, in_features: int, out_features: int, dim: int, clusters: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Return codebook, codes, row scale and bias."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(clusters, dim, generator=generator)
    return (
        (values * 40).clamp(-128, 127).to(dtype) if dtype == torch.int8 else values.to(dtype),
        torch.randint(0, clusters, (in_features, -(-out_features // dim)), generator=generator).to(torch.uint16),
        torch.rand(out_features, generator=generator) + 0.5,
        torch.randn(out_features, generator=generator),
    )


def inputs(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(shape[0]))


def bound(x: Tensor, weight: Tensor, row_scale: Tensor, y: Tensor) -> Tensor:
    """Bound the error of a float32 dot product of in_features terms in any order, of the epilogue and of the last rounding."""
    terms = x.shape[-1] + 3
    accumulated = (x.double().abs() @ weight.abs()) * row_scale.double().abs() * (terms * EPS[torch.float32])
    return accumulated + y.abs() * (EPS[x.dtype] + EPS[torch.float32]) + 1e-7


@pytest.fixture(params=native_kernel.VARIANTS)
def variant(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("CLUSCOMP_CPU", request.param)
    try:
        return native_kernel.cpu_variant()
    except ValueError as error:
        pytest.skip(str(error))


@pytest.fixture
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch.empty

    def poisoned(*args: Any, **kwargs: Any) -> Tensor:
        tensor = real(*args, **kwargs)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor.fill_(255)

    monkeypatch.setattr(torch, "empty", poisoned)


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.int8])
@pytest.mark.parametrize("dim", DIMS)
def test_agrees_with_the_reference(variant: str, dim: int, dtype: torch.dtype) -> None:
    for clusters, in_features, out_features in ((1, 1, 1), (256, 77, 131), (257, 40, 64 * dim), (3000, 33, 200)):
        codebook, codes, scale, bias = problem(dim, in_features, out_features, dim, clusters, dtype)
        weight = reference.decode(codebook.double(), codes, out_features)
        prepared = prepare(codebook, codes, out_features, row_scale=scale, bias=bias, path="native")
        plain = prepare(codebook, codes, out_features, path="native")
        assert torch.equal(plain.decode().t().double(), weight)
        for tokens in (0, 1, 2, 3, 4, 5, 17, 32, 33):
            x = inputs(tokens, in_features)
            expected = reference.linear(x.double(), codebook.double(), codes, out_features, scale.double(), bias.double())
            y = prepared(x)
            assert y.shape == (tokens, out_features)
            assert ((y - expected).abs() <= bound(x, weight, scale, expected)).all(), (variant, clusters, tokens)


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 6, 40])
def test_rounds_once_to_the_dtype_of_x(dtype: torch.dtype, tokens: int) -> None:
    codebook, codes, scale, _ = problem(5, 96, 130, 6, 500, torch.float16)
    x = inputs(tokens, 96).to(dtype)
    weight = reference.decode(codebook.double(), codes, 130)
    expected = x.double() @ weight * scale.double()
    y = prepare(codebook, codes, 130, row_scale=scale, path="native")(x)
    assert y.dtype == dtype
    assert ((y - expected).abs() <= bound(x, weight, scale, expected)).all()


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_16_bit_value_is_widened_exactly(dtype: torch.dtype) -> None:
    """All bit patterns, including subnormals, infinities and NaN."""
    values = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(dtype)
    for dim in (1, 2, 4, 8, 16):
        codebook = values.reshape(-1, dim)
        codes = torch.arange(codebook.shape[0], dtype=torch.int32).to(torch.uint16).reshape(1, -1)
        decoded = prepare(codebook, codes, 65536, path="native").decode().reshape(-1)
        assert torch.equal(decoded.isnan(), values.isnan())
        assert torch.equal(torch.nan_to_num(decoded, nan=7.0), torch.nan_to_num(values.float(), nan=7.0))


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("clusters", [1, 2, 64, 65, 128, 129, 255, 256])
def test_small_codebooks_of_single_values_are_exact(clusters: int) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        codebook, codes, _, _ = problem(clusters, 70, 150, 1, clusters, dtype)
        expected = reference.decode(codebook.float(), codes, 150)
        assert torch.equal(prepare(codebook, codes, 150, path="native").decode().t(), expected)


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize(("dim", "clusters"), [(8, 4096), (4, 300), (1, 256)])
def test_result_depends_on_neither_threads_nor_other_tokens(dim: int, clusters: int) -> None:
    codebook, codes, _, bias = problem(dim, 200, 1500, dim, clusters, torch.float16)
    prepared = prepare(codebook, codes, 1500, bias=bias, path="native")
    x = inputs(native_kernel.FUSED_TOKENS, 200)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = torch.cat([prepared(row) for row in x.split(1)])
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for _ in range(60):
                assert torch.equal(prepared(x[:1]), alone[:1])
                assert torch.equal(prepared(x[:3]), alone[:3])
            for _ in range(10):
                assert torch.equal(prepared(x), alone)
    finally:
        torch.set_num_threads(before)


def test_calls_from_several_python_threads() -> None:
    codebook, codes, _, _ = problem(9, 128, 900, 8, 5000, torch.float16)
    prepared = prepare(codebook, codes, 900, path="native")
    x = inputs(4, 1, 128)
    expected = [prepared(row) for row in x]
    wrong: list[int] = []

    def call(worker: int) -> None:
        wrong.extend(worker for _ in range(200) if not torch.equal(prepared(x[worker]), expected[worker]))

    threads = [threading.Thread(target=call, args=(worker,)) for worker in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("dim", [1, 6, 8, 24])
def test_embedding_rows(dim: int) -> None:
    codebook, codes, scale, _ = problem(dim, 70, 131, dim, 256, torch.float16)
    prepared = prepare(codebook, codes, 131, row_scale=scale, path="native")
    weight = reference.decode(codebook.float(), codes, 131).t() * scale.unsqueeze(1)
    ids = torch.tensor([[0, 130, 65], [64, 1, 130]])
    assert torch.equal(prepared.embedding(ids), weight[ids])
    assert prepared.embedding(ids[:, :0]).shape == (2, 0, 70)


def test_weights_share_a_codebook_and_keep_short_codes_in_a_byte() -> None:
    codebook, codes, _, _ = problem(1, 16, 40, 8, 256, torch.float16)
    shared = prepare_codebook(codebook, path="native")
    first, second = (prepare(shared, codes, 40) for _ in range(2))
    assert first.codebook is second.codebook is shared
    assert first.nbytes == 16 * 8  # one tile of 8 groups per channel
    assert prepare(torch.zeros(257, 8), codes, 40, path="native").nbytes == 16 * 8 * 2


def test_non_contiguous_operands() -> None:
    codebook, codes, _, _ = problem(2, 48, 50, 4, 300, torch.float16)
    strided, x = codes.t().contiguous().t(), inputs(48, 5).t()
    expected = prepare(codebook, codes, 50, path="native")(x.contiguous())
    assert not strided.is_contiguous()
    assert torch.equal(prepare(codebook, strided, 50, path="native")(x), expected)


def test_an_unknown_variant_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLUSCOMP_CPU", "mmx")
    with pytest.raises(ValueError, match="CLUSCOMP_CPU=mmx is not available on this machine; available: plain"):
        native_kernel.cpu_variant()


def test_the_operator_refuses_operands_that_do_not_fit() -> None:
    codebook, codes, _, _ = problem(2, 48, 50, 4, 300, torch.float16)
    tiled, padded, x = native_kernel.tile_codes(codes, 300, 4), native_kernel.pad_codebook(codebook), inputs(1, 48)
    operator = torch.ops.cluscomp.linear_tiled
    for out_features, dim in ((5000, 4), (50, 8), (0, 4)):
        with pytest.raises(ValueError, match=f"do not make {out_features} out_features in vectors of {dim}"):
            operator(x, tiled, padded, None, None, out_features, dim)
    with pytest.raises(ValueError, match="row_scale must be contiguous float32"):
        operator(x, tiled, padded, torch.ones(49), None, 50, 4)
    with pytest.raises(ValueError, match=r"expected \[..., 48\]"):
        operator(x[:, :47], tiled, padded, None, None, 50, 4)


def test_opcheck() -> None:
    codebook, codes, scale, bias = problem(2, 48, 50, 4, 300, torch.float16)
    tiled, padded = native_kernel.tile_codes(codes, 300, 4), native_kernel.pad_codebook(codebook)
    for x in (inputs(3, 48), inputs(2, 2, 48).bfloat16(), inputs(48)):
        torch.library.opcheck(torch.ops.cluscomp.linear_tiled.default, (x, tiled, padded, scale, bias, 50, 4))
