"""Codes with error feedback: against a hand-computed case, the algorithm of the GPTQ paper in float64, and the reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cluscomp_kernels import native
from cluscomp_kernels.kmeans import assign, assign_with_feedback, feedback_factor, library
from cluscomp_kernels.kmeans.reference import feedback_codes, nearest

needs_library = pytest.mark.skipif(native.library() is None, reason="the C library was not built")


def moments_of(channels: int, seed: int = 0) -> torch.Tensor:
    """Return damped second moments of correlated inputs."""
    inputs = np.random.default_rng(seed).standard_normal((3 * channels, channels)).cumsum(axis=1)
    moments = torch.from_numpy(inputs.T @ inputs / len(inputs))
    return moments + 0.01 * moments.diagonal().mean() * torch.eye(channels, dtype=torch.float64)


def case(
    channels: int, groups: int, dim: int, clusters: int, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray, torch.Tensor]:
    generator = np.random.default_rng(seed)
    weights = generator.standard_normal((channels, groups * dim), dtype=np.float32)
    centroids = generator.standard_normal((clusters, dim), dtype=np.float32)
    moments = moments_of(channels, seed)
    return weights, centroids, feedback_factor(moments).numpy().astype(np.float32), moments


def test_by_hand() -> None:
    # Almost all inputs are (1, 1): the second channel compensates the error of the first. R = [[1, h01/h11], [0, 1]].
    moments = torch.tensor([[2.0, 1.0], [1.0, 2.0]], dtype=torch.float64)
    factor = feedback_factor(moments).numpy().astype(np.float32)
    np.testing.assert_array_equal(factor, [[1, 0.5], [0, 1]])
    weights = np.array([[0.4, -0.4], [0.4, 0.4]], dtype=np.float32)
    centroids = np.array([[0.0], [1.0]], dtype=np.float32)
    # First channel: 0 and 0, errors .4 and -.4. Second channel: targets .4 + .5 * .4 = .6 and .4 - .5 * .4 = .2, so 1 and 0.
    assert assign_with_feedback(weights, centroids, factor, threads=1).tolist() == [[0, 0], [1, 0]]
    assert assign(weights.reshape(-1, 1), centroids).tolist() == [0, 0, 0, 0]


def test_the_factor_factors_the_moments() -> None:
    moments = moments_of(50)
    factor = feedback_factor(moments)
    diagonal = torch.linalg.solve_triangular(factor, moments, upper=True).diagonal()
    torch.testing.assert_close(factor @ torch.diag(diagonal) @ factor.T, moments, rtol=1e-12, atol=1e-12)
    assert torch.equal(factor.diagonal(), torch.ones(50, dtype=torch.float64))
    assert torch.equal(factor.tril(-1), torch.zeros(50, 50, dtype=torch.float64))


def gptq(weights: np.ndarray, centroids: np.ndarray, moments: torch.Tensor) -> np.ndarray:
    """Algorithm 1 of arXiv 2210.17323, without its blocks: Cholesky factor of the inverse, remaining weights updated."""
    dim = centroids.shape[1]
    remaining = weights.astype(np.float64)
    inverse = torch.linalg.cholesky(torch.linalg.inv(moments), upper=True).numpy()
    codes = np.empty((len(weights), weights.shape[1] // dim), dtype=np.uint16)
    for channel in range(len(weights)):
        codes[channel] = nearest(remaining[channel].astype(np.float32).reshape(-1, dim), centroids)[0]
        error = (remaining[channel] - centroids[codes[channel]].reshape(-1)) / inverse[channel, channel]
        remaining[channel + 1 :] -= inverse[channel, channel + 1 :, None] * error
    return codes


@pytest.mark.parametrize(("channels", "groups", "dim", "clusters"), [(40, 7, 3, 50), (130, 5, 4, 300), (65, 33, 8, 17)])
def test_equals_gptq(channels: int, groups: int, dim: int, clusters: int) -> None:
    weights, centroids, factor, moments = case(channels, groups, dim, clusters)
    np.testing.assert_array_equal(
        assign_with_feedback(weights, centroids, factor, threads=2), gptq(weights, centroids, moments)
    )


@pytest.mark.parametrize("dim", [1, 2, 3, 4, 5, 6, 8, 9, 16, 33])
def test_equals_the_reference(dim: int) -> None:
    """More centroids than one level of boxes has room for, and an incomplete last group."""
    weights, centroids, factor, _ = case(70, 21, dim, 701, seed=dim)
    for out_features in (21 * dim, 21 * dim - dim + 1):
        found = assign_with_feedback(weights, centroids, factor, out_features=out_features, threads=2)
        np.testing.assert_array_equal(found, feedback_codes(weights, centroids, factor, out_features))


@pytest.mark.parametrize("dim", [1, 3, 4, 9])
def test_equals_the_reference_where_rows_matter_differently(dim: int) -> None:
    weights, centroids, factor, _ = case(70, 21, dim, 701, seed=dim)
    importance = np.random.default_rng(dim).exponential(size=21 * dim).astype(np.float32) ** 3
    found = assign_with_feedback(weights, centroids, factor, importance=importance, threads=2)
    np.testing.assert_array_equal(found, feedback_codes(weights, centroids, factor, 21 * dim, importance))
    assert dim == 1 or (found != assign_with_feedback(weights, centroids, factor)).mean() > 0.3


def test_errors_go_where_they_matter_least() -> None:
    # (.4, .6) is nearest to (0, 1), but if the second row has almost no weight, (.5, 0) is nearer.
    weights = np.array([[0.4, 0.6]], dtype=np.float32)
    centroids = np.array([[0, 1], [0.5, 0]], dtype=np.float32)
    factor = np.eye(1, dtype=np.float32)
    assert assign_with_feedback(weights, centroids, factor).tolist() == [[0]]
    assert assign_with_feedback(weights, centroids, factor, importance=np.array([1, 0.1], np.float32)).tolist() == [[1]]


@needs_library
@pytest.mark.parametrize("clusters", [1, 15, 16, 17, 255, 257, 4097, 65536])
def test_without_correlations_it_is_plain_assignment(clusters: int) -> None:
    generator = np.random.default_rng(clusters)
    weights = generator.integers(-9, 10, (9, 200)).astype(np.float32)  # full of ties
    centroids = generator.integers(-9, 10, (clusters, 4)).astype(np.float32)
    found = assign_with_feedback(weights, centroids, np.eye(9, dtype=np.float32))
    np.testing.assert_array_equal(found.reshape(-1), assign(weights.reshape(-1, 4), centroids))


def test_the_output_errs_less_than_with_the_nearest_centroids() -> None:
    weights, centroids, factor, moments = case(100, 30, 4, 256)

    def error(codes: np.ndarray) -> float:
        wrong = weights - centroids[codes].reshape(weights.shape)
        return float((wrong * (moments.numpy() @ wrong)).sum())

    plain = assign(weights.reshape(-1, 4), centroids).reshape(100, 30)
    assert error(assign_with_feedback(weights, centroids, factor)) < 0.5 * error(plain)


@needs_library
@pytest.mark.parametrize("level", [0, 1, 2])
def test_threads_and_instruction_sets_change_nothing(level: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weights, centroids, factor, _ = case(150, 100, 4, 1000)
    expected = assign_with_feedback(weights, centroids, factor, threads=1)
    monkeypatch.setattr(library, "INSTRUCTION_LEVEL", level)
    for threads in (1, 2, 5):
        np.testing.assert_array_equal(assign_with_feedback(weights, centroids, factor, threads=threads), expected)


def test_groups_of_columns_do_not_touch_each_other() -> None:
    weights, centroids, factor, _ = case(80, 40, 4, 500)
    order = np.random.default_rng(1).permutation(40)
    moved = np.ascontiguousarray(weights.reshape(80, 40, 4)[:, order].reshape(80, -1))
    expected = assign_with_feedback(weights, centroids, factor)[:, order]
    np.testing.assert_array_equal(assign_with_feedback(moved, centroids, factor), expected)


def test_the_path_without_the_library_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    weights, centroids, factor, _ = case(70, 12, 5, 200)
    expected = assign_with_feedback(weights, centroids, factor, out_features=58)
    monkeypatch.setattr("cluscomp_kernels.kmeans.feedback.compute_path", lambda device: "torch")
    np.testing.assert_array_equal(assign_with_feedback(weights, centroids, factor, out_features=58), expected)


def test_that_path_weights_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    weights, centroids, factor, _ = case(70, 12, 5, 200)
    importance = np.random.default_rng(0).exponential(size=60).astype(np.float32)
    expected = assign_with_feedback(weights, centroids, factor, importance=importance)
    monkeypatch.setattr("cluscomp_kernels.kmeans.feedback.compute_path", lambda device: "torch")
    np.testing.assert_array_equal(assign_with_feedback(weights, centroids, factor, importance=importance), expected)


def test_what_cannot_be_is_refused() -> None:
    weights, centroids, factor, _ = case(10, 3, 4, 20)
    with pytest.raises(ValueError, match="groups"):
        assign_with_feedback(weights[:, :-1].copy(), centroids, factor)
    with pytest.raises(ValueError, match="factor"):
        assign_with_feedback(weights, centroids, factor[:-1])
    with pytest.raises(ValueError, match="factor"):
        assign_with_feedback(weights, centroids, np.full_like(factor, np.nan))
    with pytest.raises(ValueError, match="out_features"):
        assign_with_feedback(weights, centroids, factor, out_features=8)
    with pytest.raises(ValueError, match="importance must be float32"):
        assign_with_feedback(weights, centroids, factor, importance=np.ones(11, dtype=np.float32))
    with pytest.raises(ValueError, match="importance must be finite and positive"):
        assign_with_feedback(weights, centroids, factor, importance=np.zeros(12, dtype=np.float32))
    with pytest.raises(torch.linalg.LinAlgError):
        feedback_factor(torch.zeros(3, 3, dtype=torch.float64))
