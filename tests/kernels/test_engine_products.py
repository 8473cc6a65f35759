"""Products of the engine: against numpy, and the same bits from every instruction set and number of threads."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from cluscomp_kernels import native

pytestmark = pytest.mark.skipif(native.library("_engine") is None, reason=native.missing_reason("_engine"))

if native.library("_engine") is not None:
    from cluscomp_kernels.engine import VARIANTS, Codebook, EngineLinear, Pool, Stage, tiled_bytes
    from cluscomp_kernels.engine.structures import functions

    AVAILABLE = [number for number in range(len(VARIANTS)) if functions().engine_supported(number)]
else:
    AVAILABLE = []


def tiled(codes: npt.NDArray[np.uint16], bits: int) -> npt.NDArray[np.uint8]:
    """Codes `[in_features, groups]` as in matrix.h, one by one."""
    in_features, groups = codes.shape
    quads = -(-in_features // 4)
    order: list[int] = []
    for tile in range(-(-groups // 16)):
        here = min(16, groups - 16 * tile)
        for quad in range(quads):
            for group in range((here + 1) // 2 * 2):
                for channel in range(4 * quad, 4 * quad + 4):
                    known = channel < in_features and group < here
                    order.append(int(codes[channel, 16 * tile + group]) if known else 0)
    stream = np.unpackbits(np.array(order, dtype="<u2").view(np.uint8).reshape(-1, 2), axis=1, bitorder="little")[:, :bits]
    return np.packbits(stream.reshape(-1), bitorder="little")


class Case:
    """A random matrix, its decoded values, and what the engine needs."""

    def __init__(self, seed: int, shape: tuple[int, int], dim: int, clusters: int, dtype: str) -> None:
        random = np.random.default_rng(seed)
        self.shape, self.dim, self.clusters = shape, dim, clusters
        out_features, in_features = shape
        groups = -(-out_features // dim)
        values = random.standard_normal((clusters, dim)) * 40
        self.values = np.clip(np.rint(values), -128, 127).astype(np.int8) if dtype == "int8" else values.astype(dtype)
        self.codes = random.integers(0, clusters, (in_features, groups)).astype(np.uint16)
        self.scale = random.uniform(0.5, 2, out_features).astype(np.float32)
        self.bias = random.standard_normal(out_features).astype(np.float32)
        self.bits = max(1, (clusters - 1).bit_length())
        self.stream = tiled(self.codes, self.bits)
        decoded = self.values[self.codes].reshape(in_features, -1)[:, :out_features].T
        self.weight = decoded.astype(np.float64) * self.scale[:, None].astype(np.float64)

    def linear(self, variant: int) -> EngineLinear:
        stage = Stage(self.stream, Codebook(self.values, variant), self.scale)
        return EngineLinear(self.shape, stages=[stage], bias=self.bias)


CASES = [
    (dim, clusters, dtype)
    for dim, clusters in [
        (1, 2), (1, 16), (1, 256), (1, 300), (2, 16), (2, 64), (2, 100), (2, 128), (2, 256), (2, 1024), (3, 8), (3, 256),
        (3, 4096), (4, 32), (4, 256), (4, 4096), (4, 65536), (5, 512), (6, 65536), (7, 3000), (8, 256), (8, 4096), (9, 700),
        (12, 6144), (16, 256), (16, 32768), (24, 300), (64, 300), (64, 256),
    ]
    for dtype in ("int8", "float16", "float32")
]  # fmt: skip


@pytest.mark.parametrize(("dim", "clusters", "dtype"), CASES)
def test_products(dim: int, clusters: int, dtype: str) -> None:
    """Within the error of activations of 16 bits (and codebooks of 16 bits), and the same bits everywhere."""
    for seed, shape in enumerate([(dim * 21 + 1, 70), (64, 192), (dim, 1), (5, 67)]):
        case = Case(seed, shape, dim, clusters, dtype)
        random = np.random.default_rng(seed)
        for tokens in (1, 2, 3, 7, 70):
            x = (random.standard_normal((tokens, shape[1])) * 10.0 ** random.integers(-3, 3)).astype(np.float32)
            results = [Pool(variant, threads).apply(case.linear(variant), x) for variant in AVAILABLE for threads in (1, 3)]
            for result in results[1:]:
                np.testing.assert_array_equal(result, results[0])
            expected = x.astype(np.float64) @ case.weight.T + case.bias
            # An activation is off by at most half a step, a 65,024th of the largest of its 64 channels, and so is an entry of
            # 16 bits; sums of float32 blocks and the bias add a few units of the last place.
            largest_x = np.abs(x).max(axis=1, keepdims=True)
            reach = np.abs(case.values.astype(np.float64)).max() * case.scale[None, :]
            wide = case.values.dtype != np.int8
            bound = largest_x / 65024 * np.abs(case.weight).sum(axis=1)[None, :]
            bound = bound + wide * np.abs(x).sum(axis=1, keepdims=True) * reach / 65024
            bound = 1.01 * bound + 2.0**-22 * (np.abs(x) @ np.abs(case.weight.T) + np.abs(case.bias))
            assert (np.abs(results[0] - expected) <= bound).all()


@pytest.mark.parametrize("dtype", ["int8", "float16"])
@pytest.mark.parametrize(("dim", "clusters"), [(2, 256), (3, 100), (4, 4096), (8, 300), (16, 1024)])
def test_rows(dim: int, clusters: int, dtype: str) -> None:
    """Rows are those of the decoded weight; float16 within the rounding of entries to 16 bits."""
    case = Case(1, (dim * 37 + 1, 50), dim, clusters, dtype)
    ids = np.array([0, 1, case.shape[0] - 1, 17, 17])
    for variant in AVAILABLE:
        rows = Pool(variant, 1).rows(case.linear(variant), ids)
        bound = 0 if dtype == "int8" else np.abs(case.values.astype(np.float64)).max() / 65000 * 2
        np.testing.assert_allclose(rows, case.weight[ids], rtol=1e-6, atol=bound)


def test_stages_add_up() -> None:
    first, second = Case(1, (50, 130), 4, 4096, "int8"), Case(2, (50, 130), 2, 16, "int8")
    x = np.random.default_rng(0).standard_normal((3, 130)).astype(np.float32)
    for variant in AVAILABLE:
        stages = [Stage(case.stream, Codebook(case.values, variant), case.scale) for case in (first, second)]
        linear = EngineLinear((50, 130), stages=stages, bias=first.bias)
        expected = x @ (first.weight + second.weight).T + first.bias
        np.testing.assert_allclose(Pool(variant, 2).apply(linear, x), expected, rtol=1e-3, atol=1e-1)


@pytest.mark.parametrize("value_type", ["float32", "float16", "bfloat16"])
def test_dense(value_type: str) -> None:
    """Dense matrices: the same bits everywhere."""
    random = np.random.default_rng(3)
    weight = random.standard_normal((37, 83)).astype(np.float32)
    stored = weight.astype(np.float16) if value_type == "float16" else weight
    if value_type == "bfloat16":
        stored = (weight.view(np.uint32) >> 16).astype(np.uint16)
        weight = (stored.astype(np.uint32) << 16).view(np.float32)
    x = random.standard_normal((70, 83)).astype(np.float32)
    results = [Pool(variant, 2).apply(EngineLinear((37, 83), values=stored, value_type=value_type), x) for variant in AVAILABLE]
    for result in results:
        np.testing.assert_array_equal(result, results[0])
    np.testing.assert_allclose(
        results[0], x @ stored.astype(np.float32).T if value_type != "bfloat16" else x @ weight.T, atol=1e-4
    )


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_gives_nan(bad: float) -> None:
    """A NaN or infinity among activations never passes for a number."""
    case = Case(1, (20, 130), 2, 256, "int8")
    x = np.ones((2, 130), dtype=np.float32)
    x[0, 100] = bad
    for variant in AVAILABLE:
        result = Pool(variant, 1).apply(case.linear(variant), x)
        assert np.isnan(result[0]).all()
        assert np.isfinite(result[1]).all()


@pytest.mark.parametrize("bits", range(1, 17))
def test_largest_code(bits: int) -> None:
    codes = np.random.default_rng(bits).integers(0, 1 << bits, (8, 20)).astype(np.uint16)
    stream = tiled(codes, bits)
    assert functions().largest_code(stream.ctypes.data, stream.nbytes * 8 // bits, bits) == codes.max()


def test_length_of_tiled_codes() -> None:
    for in_features, out_features, dim, bits in [(1, 1, 1, 1), (7, 33, 2, 3), (8, 64, 4, 12), (64, 17 * 3, 3, 16)]:
        codes = np.zeros((in_features, -(-out_features // dim)), dtype=np.uint16)
        assert len(tiled(codes, bits)) == tiled_bytes(in_features, out_features, dim, bits)
    with pytest.raises(ValueError, match="tiled codes have 3 bytes"):
        EngineLinear((8, 8), stages=[Stage(np.zeros(3, dtype=np.uint8), Codebook(np.zeros((2, 2), dtype=np.int8), 0), None)])
