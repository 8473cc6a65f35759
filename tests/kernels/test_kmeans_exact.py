"""Codes against the numpy reference: every dimension, instruction set and path must give exactly the same codes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cluscomp_kernels import native
from cluscomp_kernels.kmeans import assign, kmeans, library, tiles
from cluscomp_kernels.kmeans.groups import group, scan, update_means
from cluscomp_kernels.kmeans.reference import lloyd_step, nearest, squared_distances
from cluscomp_kernels.kmeans.torch_engine import nearest_torch

pytestmark = pytest.mark.skipif(native.library() is None, reason="the C library was not built")


LARGE = float(np.nextafter(np.float32(1e17), np.float32(0)))


def vectors(seed: int, count: int, dim: int, kind: str = "gaussian") -> np.ndarray:
    rng = np.random.default_rng(seed)
    if kind == "grid":
        return rng.integers(-2, 3, size=(count, dim)).astype(np.float32)
    values = rng.standard_normal((count, dim), dtype=np.float32)
    return values + np.float32(1000) if kind == "offset" else values


@pytest.mark.parametrize("dim", [1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 33, 64])
@pytest.mark.parametrize("kind", ["gaussian", "grid", "offset"])
def test_assign_equals_reference(dim: int, kind: str) -> None:
    """The grid causes ties and duplicates, the offset rounding."""
    points, centroids = vectors(1, 2003, dim, kind), vectors(2, 701, dim, kind)
    np.testing.assert_array_equal(assign(points, centroids, threads=2), nearest(points, centroids)[0])


def test_what_is_kept_of_a_search_serves_the_same_centroids_only() -> None:
    points, first, second = vectors(1, 2003, 4), vectors(2, 701, 4), vectors(3, 701, 4)
    for centroids in (first, first, second, first):
        np.testing.assert_array_equal(assign(points, centroids), nearest(points, centroids)[0])
    first[:] = second[::-1]
    np.testing.assert_array_equal(assign(points, first), nearest(points, first)[0])


@pytest.mark.parametrize("level", [0, 1, 2])
@pytest.mark.parametrize("dim", [4, 7, 16])
def test_instruction_sets_agree(level: int, dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    points = vectors(3, 3000, dim)
    expected = kmeans(points, 200, threads=1)
    monkeypatch.setattr(library, "INSTRUCTION_LEVEL", level)
    found = kmeans(points, 200, threads=1)
    assert found.centroids.tobytes() == expected.centroids.tobytes()
    assert found.codes.tobytes() == expected.codes.tobytes()
    assert found.error == expected.error


@pytest.mark.parametrize("count", [1, 15, 16, 17, 257])
def test_few_centroids(count: int) -> None:
    points, centroids = vectors(4, 500, 5), vectors(5, count, 5)
    np.testing.assert_array_equal(assign(points, centroids), nearest(points, centroids)[0])


def test_equal_distances_take_the_lowest_index() -> None:
    centroids = np.array([[5, 5], [1, 0], [-1, 0], [1, 0], [0, 1]], dtype=np.float32)
    points = np.array([[0, 0], [1, 0], [0.5, 0.5], [9, 9]], dtype=np.float32)
    assert assign(points, centroids).tolist() == [1, 1, 1, 0]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_assign_property(data: st.DataObject) -> None:
    """Tiny, huge and mixed magnitudes, whose squares underflow or are lost in sums."""
    dim = data.draw(st.integers(1, 5))
    value = st.one_of(st.floats(-LARGE, LARGE, width=32), st.sampled_from([0.0, -0.0, 1e-30, 1e-20, 3e-20, 1.0, 1e10]))
    rows = st.lists(st.lists(value, min_size=dim, max_size=dim), min_size=1, max_size=40)
    points, centroids = (np.array(data.draw(rows), dtype=np.float32) for _ in range(2))
    np.testing.assert_array_equal(assign(points, centroids), nearest(points, centroids)[0])


def recall(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.mean([len(set(a) & set(b)) / len(b) for a, b in zip(found.tolist(), expected.tolist(), strict=True)]))


@pytest.mark.parametrize("dim", [2, 6, 16])
def test_neighbour_lists_are_exact(dim: int) -> None:
    centroids = vectors(6, 500, dim)
    distances = squared_distances(centroids, centroids)
    np.fill_diagonal(distances, np.inf)
    expected = np.argsort(distances, axis=1, kind="stable")[:, :20]
    fresh = tiles.neighbour_lists(tiles.pack_tiles(centroids), centroids, 20, threads=2, previous=None, tick=lambda: None)
    np.testing.assert_array_equal(fresh, expected)
    # A third of the spacing, about the move of a centroid in an iteration.
    spacing = np.sqrt(np.median(distances.min(axis=1)) / dim)
    moved = centroids + vectors(7, 500, dim) * np.float32(spacing / 3)
    old = tiles.neighbour_lists(tiles.pack_tiles(moved), moved, 20, threads=2, previous=None, tick=lambda: None)
    before = old.copy()
    refreshed = tiles.refresh_lists(centroids, old, threads=2, tick=lambda: None)
    assert all(len(set(row)) == 20 and own not in row for own, row in enumerate(refreshed.tolist()))
    reused = tiles.neighbour_lists(tiles.pack_tiles(centroids), centroids, 20, threads=2, previous=old, tick=lambda: None)
    np.testing.assert_array_equal(reused, expected)
    # A refresh finds most of the neighbours missing from the old lists.
    assert 1 - recall(refreshed, expected) < (1 - recall(before, expected)) / 3


@pytest.mark.parametrize("stale", [False, True])
@pytest.mark.parametrize("length", [1, 7, 199])
def test_exact_scan_closes_short_lists_from_any_start(length: int, stale: bool) -> None:
    points, centroids = vectors(8, 4000, 6), vectors(9, 200, 6)
    packed = tiles.pack_tiles(centroids)
    lists = tiles.neighbour_lists(packed, centroids, length, threads=1, previous=None, tick=lambda: None)
    start = np.random.default_rng(0).integers(0, 200, len(points)).astype(np.uint16)
    found = scan(packed, lists, points, group(start, 200), centroids, exact=True, stale=stale, threads=2, tick=lambda: None)
    codes, distances = nearest(points, centroids)
    np.testing.assert_array_equal(found.codes, codes)
    np.testing.assert_array_equal(found.distances, distances)
    assert found.open_points == (0 if length == 199 else len(points) if stale else found.open_points)


def test_update_equals_reference() -> None:
    points, centroids = vectors(10, 3000, 5), vectors(11, 100, 5)
    weights = np.random.default_rng(0).random(3000, dtype=np.float32)
    codes, distances = nearest(points, centroids)
    means = update_means(points, weights, distances, group(codes, 100), centroids, threads=2)
    np.testing.assert_allclose(means.centroids, lloyd_step(points, weights, centroids), rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(means.error, np.bincount(codes, weights.astype(float) * distances, 100), rtol=1e-12)
    shares = weights.astype(float) * distances
    for cluster in np.unique(codes):
        assert shares[means.farthest[cluster]] == shares[codes == cluster].max()


@pytest.mark.parametrize("kind", ["gaussian", "grid", "offset"])
def test_torch_search_equals_reference(kind: str) -> None:
    points, centroids = vectors(12, 1500, 7, kind), vectors(13, 333, 7, kind)
    codes, distances = nearest_torch(torch.from_numpy(points), torch.from_numpy(centroids))
    expected_codes, expected = nearest(points, centroids)
    np.testing.assert_array_equal(codes.numpy(), expected_codes)
    np.testing.assert_array_equal(distances.numpy(), expected)
    importance = np.random.default_rng(14).exponential(size=points.shape).astype(np.float32) ** 3
    codes, distances = nearest_torch(*map(torch.from_numpy, (points, centroids, importance)))
    expected_codes, expected = nearest(points, centroids, importance)
    np.testing.assert_array_equal(codes.numpy(), expected_codes)
    np.testing.assert_array_equal(distances.numpy(), expected)
