"""The importance of rows: it tells what errors of a row cost, and conversions choose codes by it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from model_builders import tiny_llama
from noise_costs import divergence

from cluscomp_export.calibration.activations import calibration_tokens, calibration_windows, read_text
from cluscomp_export.calibration.fisher import block_matrices
from cluscomp_export.calibration.row_importance import row_importance
from cluscomp_export.compression.fit_encode import LEAST_IMPORTANCE, Computing, Encoding
from cluscomp_export.compression.moments import InputMoments, Target
from cluscomp_export.conversion import compress_source as compress_module
from cluscomp_export.conversion.convert import ConversionOptions, convert
from cluscomp_export.sources import open_source
from cluscomp_export.threads import torch_threads
from cluscomp_formats.errors import UnsupportedError
from cluscomp_formats.ir import Model
from cluscomp_kernels.kmeans import feedback_factor
from cluscomp_kernels.kmeans.reference import feedback_codes


@pytest.fixture(scope="module")
def stories(stories_folder: Path) -> Model:
    return open_source(stories_folder)


@pytest.fixture(scope="module")
def windows(stories: Model, stories_text: Path) -> torch.Tensor:
    return calibration_windows(calibration_tokens(stories, read_text(stories_text)), 4)[:, :128]


@pytest.mark.parametrize("name", ["1.mlp.up_proj", "4.mlp.gate_proj", "3.self_attn.q_proj"])
def test_it_tells_what_errors_of_rows_cost(name: str, stories: Model, windows: torch.Tensor) -> None:
    name = f"model.layers.{name}.weight"
    importance = row_importance(stories, windows)[name]
    assert importance.mean() == pytest.approx(1, rel=1e-5)
    order = np.argsort(importance)
    few = len(order) // 8
    costs = []
    for rows in (order[:few], order[-few:]):
        noise = np.zeros(stories.tensors[name].shape)
        noise[rows] = 0.01 * np.random.default_rng(0).choice([-1.0, 1.0], noise[rows].shape)
        costs.append(divergence(stories, name, noise, windows))
    # Every token counts alike in the importance, but not in the divergence; and there is one draw of the noise. (Values are not
    # among these: attention averages them, and errors of one row add up over tokens.)
    ratio = importance[order[-few:]].mean() / importance[order[:few]].mean()
    assert ratio > 2
    assert 0.5 * ratio < costs[1] / costs[0] < 2 * ratio


def test_it_does_not_hang_on_the_number_of_threads(stories: Model, stories_text: Path) -> None:
    """Up to rounding: a gradient that is nothing but rounding, as that of a window's first query, does not count."""
    windows = calibration_windows(calibration_tokens(stories, read_text(stories_text)), 4)
    measured = []
    for threads in (1, 2):
        with torch_threads(threads):
            measured.append(row_importance(stories, windows))
    assert {name: len(values) for name, values in measured[0].items()} == {
        name: stories.tensors[name].shape[0] for name in block_matrices(stories)
    }
    assert len(measured[0]) == 5 * 7
    for name, values in measured[0].items():
        # Observed: 4e-7. With the first query 7e-3.
        np.testing.assert_allclose(values, measured[1][name], rtol=1e-5)


def test_an_unknown_architecture_is_refused(windows: torch.Tensor) -> None:
    source = tiny_llama()
    with pytest.raises(UnsupportedError):
        row_importance(replace(source, config={**source.config, "model_type": "other"}), windows)


def test_errors_of_rows_that_were_scaled_down_count_more() -> None:
    rng = np.random.default_rng(0)
    weights, centroids = rng.standard_normal((24, 12), dtype=np.float32), rng.standard_normal((50, 3), dtype=np.float32)
    inputs = torch.from_numpy(rng.standard_normal((100, 24)).cumsum(axis=1))
    importance, scale = rng.exponential(size=(2, 10)).astype(np.float32)
    moments = InputMoments(inputs.t() @ inputs / 100)
    counts = np.ones(12, dtype=np.float32)
    counts[:10] = importance * scale**2 / np.mean(importance * scale**2, dtype=np.float64) + LEAST_IMPORTANCE
    order = np.argsort(-moments.damped.diagonal().numpy(), kind="stable")
    factor = np.ascontiguousarray(feedback_factor(moments.damped[order][:, order]).numpy().astype(np.float32))
    expected = np.empty((24, 4), np.uint16)
    expected[order] = feedback_codes(weights[order], centroids, factor, 10, counts)
    fitted = {"centroids": centroids, "step": np.ones(1, dtype=np.float32)}
    goal = Target(moments, importance=importance)
    job = Encoding(weights.reshape(-1, 3), scale, fitted, np.ones(24, dtype=np.float32), 10, goal, Computing(threads=1))
    np.testing.assert_array_equal(job.run()["codes"], expected)
    alike = replace(job, target=Target(moments)).run()["codes"]
    assert (alike != expected).mean() > 0.1
    nothing = replace(job, target=Target(moments, importance=np.zeros(10, dtype=np.float32))).run()["codes"]
    np.testing.assert_array_equal(nothing, alike)


def test_a_conversion_that_goes_on_does_not_measure_again(
    stories_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    output = tmp_path / "out.clus"
    options = ConversionOptions(bits=3, effort="balanced", blockwise_epochs=0)
    with monkeypatch.context() as patch:
        patch.setattr("cluscomp_export.compression.moments.assign_with_feedback", stop)
        with pytest.raises(KeyboardInterrupt):
            convert(stories_folder, output, options)
    monkeypatch.setattr(compress_module, "row_importance", stop)
    convert(stories_folder, output, options)
    with pytest.raises(KeyboardInterrupt):
        convert(stories_folder, tmp_path / "other.clus", options)
    convert(stories_folder, tmp_path / "fast.clus", replace(options, effort="fast", blockwise_epochs=None))
