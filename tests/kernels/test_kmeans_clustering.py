"""`kmeans`: hand-computed cases, quality compared with faiss, determinism, edge cases, errors, and the path without C."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from cluscomp_kernels import native
from cluscomp_kernels.kmeans import assign, kmeans
from cluscomp_kernels.kmeans.engine import run_lloyd
from cluscomp_kernels.kmeans.reference import lloyd_step, nearest
from cluscomp_kernels.kmeans.torch_engine import TorchEngine, nearest_torch

needs_native = pytest.mark.skipif(native.library() is None, reason="the C library was not built")
pytestmark = needs_native


def gaussian(count: int, dim: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, dim), dtype=np.float32)


@pytest.mark.parametrize("method", ["fast", "lloyd"])
def test_hand_computed(method: str) -> None:
    """Two pairs far apart: the means, and the error 4 * 0.5^2 (weighted: 1 * (3/4)^2 + 3 * (1/4)^2, and 2 * 0.5^2)."""
    points = np.array([[0, 0], [0, 1], [10, 0], [10, 1]], dtype=np.float32)
    # With this seed the sample has a point of each pair; plain Lloyd iterations from two points of a pair end elsewhere.
    found = kmeans(points, 2, method=method, seed=3)  # type: ignore[arg-type]
    assert sorted(map(tuple, found.centroids.tolist())) == [(0, 0.5), (10, 0.5)]
    assert found.error == 1.0
    weights = np.array([1, 3, 1, 1], dtype=np.float32)
    weighted = kmeans(points, 2, weights=weights, method=method, seed=3)  # type: ignore[arg-type]
    assert sorted(map(tuple, weighted.centroids.tolist())) == [(0, 0.75), (10, 0.5)]
    assert weighted.error == pytest.approx(9 / 16 + 3 / 16 + 1 / 2)


@pytest.mark.parametrize(("dim", "clusters"), [(1, 64), (4, 512), (8, 512), (16, 512)])
def test_beats_faiss(dim: int, clusters: int) -> None:
    faiss = pytest.importorskip("faiss")
    points = gaussian(16384, dim)
    peer = faiss.Kmeans(dim, clusters, niter=20, max_points_per_centroid=10**9, seed=1)
    peer.train(points)
    found = kmeans(points, clusters, threads=2)
    theirs = float(nearest(points, peer.centroids)[1].sum(dtype=np.float64))
    assert found.error <= theirs
    codes, distances = nearest(points, found.centroids)
    np.testing.assert_array_equal(found.codes, codes)
    assert found.error == pytest.approx(distances.sum(dtype=np.float64), rel=1e-12)


@pytest.mark.parametrize("method", ["fast", "lloyd"])
@pytest.mark.parametrize("dim", [1, 3, 8, 16])
def test_threads_do_not_change_a_bit(method: str, dim: int) -> None:
    points = gaussian(6000, dim)
    weights = np.random.default_rng(1).random(6000, dtype=np.float32)
    results = [kmeans(points, 300, weights=weights, threads=threads, method=method) for threads in (1, 2, 3)]  # type: ignore[arg-type]
    for other in results[1:]:
        assert other.centroids.tobytes() == results[0].centroids.tobytes()
        assert other.codes.tobytes() == results[0].codes.tobytes()
        assert other.error == results[0].error


def test_lloyd_is_plain_lloyd() -> None:
    """20 steps of the reference from the same sample. No cluster becomes empty, so no revival interferes."""
    points = gaussian(2000, 4)
    found = kmeans(points, 50, method="lloyd", seed=5)
    centroids = points[np.random.default_rng(5).choice(2000, 50, replace=False)]
    for _ in range(20):
        centroids = lloyd_step(points, None, centroids)
    np.testing.assert_allclose(np.sort(found.centroids, axis=0), np.sort(centroids, axis=0), rtol=1e-4, atol=1e-5)
    assert found.error == pytest.approx(nearest(points, centroids)[1].sum(dtype=np.float64), rel=1e-6)
    assert found.iterations == 20


def test_seed_matters_to_lloyd() -> None:
    points = gaussian(2000, 4)
    first, again, other = (kmeans(points, 50, method="lloyd", seed=seed, iterations=2) for seed in (1, 1, 2))
    assert first.centroids.tobytes() == again.centroids.tobytes() != other.centroids.tobytes()


def test_weight_two_is_a_point_twice() -> None:
    points = gaussian(800, 2)
    weights = np.random.default_rng(0).integers(1, 4, 800).astype(np.float32)
    once = kmeans(points, 20, weights=weights)
    repeated = kmeans(np.repeat(points, weights.astype(int), axis=0), 20)
    assert once.error == pytest.approx(repeated.error, rel=0.03)
    assert once.error == pytest.approx(float((weights * nearest(points, once.centroids)[1]).sum(dtype=np.float64)), rel=1e-6)


@pytest.mark.parametrize("dim", [1, 3])
def test_zero_weights_do_not_count(dim: int) -> None:
    points = np.concatenate((gaussian(500, dim), gaussian(500, dim, 1) + np.float32(100)))
    weights = np.repeat(np.array([1, 0], dtype=np.float32), 500)
    found = kmeans(points, 40, weights=weights)
    assert np.abs(found.centroids).max() < 10
    np.testing.assert_array_equal(found.codes, nearest(points, found.centroids)[0])


def test_all_zero_weights_are_equal_weights() -> None:
    points = gaussian(500, 3)
    found, expected = kmeans(points, 30, weights=np.zeros(500, dtype=np.float32)), kmeans(points, 30)
    np.testing.assert_array_equal(found.centroids, expected.centroids)
    assert found.error == 0.0 < expected.error


@pytest.mark.parametrize("dim", [1, 2, 16])
@pytest.mark.parametrize("method", ["fast", "lloyd"])
def test_fewer_distinct_points_than_clusters(dim: int, method: str) -> None:
    distinct = gaussian(20, dim)
    points = distinct[np.random.default_rng(0).integers(0, 20, 1000)]
    found = kmeans(points, 100, method=method)  # type: ignore[arg-type]
    assert found.centroids.shape == (100, dim)
    np.testing.assert_array_equal(found.codes, nearest(points, found.centroids)[0])
    if method == "fast":
        assert found.error == 0.0


@pytest.mark.parametrize("dim", [1, 4])
def test_constant_one_cluster_and_lossless(dim: int) -> None:
    constant = kmeans(np.full((100, dim), 3, dtype=np.float32), 7)
    assert constant.centroids.tolist() == [[3.0] * dim] * 7
    assert constant.error == 0.0
    assert not constant.codes.any()
    points = gaussian(1000, dim)
    single = kmeans(points, 1)
    np.testing.assert_allclose(single.centroids[0], points.mean(axis=0, dtype=np.float64), atol=1e-6)
    for clusters in (1000, 2000):
        lossless = kmeans(points, clusters)
        assert lossless.centroids.shape == (1000, dim)
        assert lossless.error == 0.0
        np.testing.assert_array_equal(lossless.centroids[lossless.codes], points)


def test_dead_clusters_are_revived() -> None:
    """Half of the centroids start far from all points; in the end, every centroid has points."""
    points = gaussian(1000, 3)
    engine = TorchEngine(points, None, torch.device("cpu"), nearest_torch, lambda: None)
    start = np.concatenate((points[:10], np.full((10, 3), 1e6, dtype=np.float32)))
    centroids, error, _ = run_lloyd(engine, start, 6, plain=True, after_iteration=lambda done: None)
    assert set(engine.codes.tolist()) == set(range(20))
    assert error == pytest.approx(nearest(points, centroids)[1].sum(dtype=np.float64), rel=1e-9)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e18])
def test_first_bad_point_is_named(bad: float) -> None:
    points = gaussian(100, 3)
    points[41, 2] = points[57, 0] = bad
    with pytest.raises(ValueError, match=r"points\[41, 2\]"):
        kmeans(points, 5)
    with pytest.raises(ValueError, match=r"centroids\[41, 2\]"):
        assign(gaussian(5, 3), points)


def test_refusals() -> None:
    points = gaussian(100, 3)
    with pytest.raises(ValueError, match="num_clusters must be 1 to 65536"):
        kmeans(points, 65537)
    with pytest.raises(ValueError, match="rows, got 0"):
        kmeans(points[:0], 5)
    with pytest.raises(ValueError, match=r"dim 1 to 64, got \[100, 65\]"):
        kmeans(gaussian(100, 65), 5)
    with pytest.raises(TypeError, match="float64"):
        kmeans(points.astype(np.float64), 5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"weights\[7\] is -1"):
        kmeans(points, 5, weights=np.where(np.arange(100) == 7, -1, 1).astype(np.float32))
    with pytest.raises(ValueError, match="one per point"):
        kmeans(points, 5, weights=np.ones(99, dtype=np.float32))
    with pytest.raises(ValueError, match="threads must be at least 1"):
        kmeans(points, 5, threads=0)
    with pytest.raises(ValueError, match="'fast' or 'lloyd'"):
        kmeans(points, 5, method="slow")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="must agree"):
        assign(points, gaussian(5, 4))
    with pytest.raises(ValueError, match="'cpu' or 'cuda'"):
        kmeans(points, 5, device="meta")


def test_progress_rises_to_the_total() -> None:
    calls: list[tuple[int, int]] = []
    kmeans(gaussian(5000, 4), 100, iterations=4, on_progress=lambda phase, done, total: calls.append((done, total)))
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)
    assert {total for _, total in calls} == {6}
    assert calls[-1] == (6, 6)
    assert {done for done, _ in calls} >= {0, 2, 3}


def test_input_is_left_alone() -> None:
    points = gaussian(2000, 4)
    before = points.copy()
    points.setflags(write=False)
    kmeans(points, 50)
    kmeans(points.T.copy().T, 50)
    np.testing.assert_array_equal(points, before)


WITHOUT_C = """
import warnings
import numpy as np
from cluscomp_kernels.kmeans import assign, kmeans
from cluscomp_kernels.kmeans.reference import nearest
for dim in (1, 3, 16):
    points = np.random.default_rng(0).standard_normal((3000, dim), dtype=np.float32)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for method in ("fast", "lloyd"):
            found = kmeans(points, 100, method=method)
            assert found.path == "torch", found.path
            assert np.array_equal(found.codes, nearest(points, found.centroids)[0])
            assert found.error < 0.9 * float(np.square(points - points.mean(0)).sum())
    assert len(caught) == (dim == 1), caught
    assert all("CLUSCOMP_NATIVE=0" in str(w.message) for w in caught)
    assert np.array_equal(assign(points, found.centroids), found.codes)
print("fine")
"""


def test_without_the_library_torch_takes_over_and_says_so_once() -> None:
    environment = {**os.environ, "CLUSCOMP_NATIVE": "0", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    run = subprocess.run([sys.executable, "-c", WITHOUT_C], env=environment, capture_output=True, encoding="utf-8", timeout=120)
    assert run.stdout.strip() == "fine", run.stderr
