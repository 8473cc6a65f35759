"""Error feedback from end to end, on a small trained model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from cluscomp_export.calibration import calibration_windows, read_text
from cluscomp_export.convert import ConversionOptions, convert
from cluscomp_export.error_feedback import ErrorFeedback, InputMoments
from cluscomp_export.evaluate import evaluate_files
from cluscomp_export.sources import open_source
from cluscomp_export.work_folder import work_path
from cluscomp_formats.errors import InvalidRequestError
from cluscomp_formats.packed import open_packed
from cluscomp_kernels.kmeans import feedback_factor
from cluscomp_kernels.kmeans.reference import feedback_codes
from cluscomp_runtime.blocks import BlockRunner
from cluscomp_runtime.language_model import LanguageModel


def test_blocks_one_by_one_are_the_model(stories_folder: Path) -> None:
    source = open_source(stories_folder)
    runner = BlockRunner(source)
    ids = torch.arange(1, 31).reshape(5, 6)
    hidden = runner.embed(ids)
    seen: list[str] = []
    for index in range(runner.num_blocks):
        hidden = runner.run(index, source.tensors, hidden, lambda name, inputs: seen.append(name))
    model = LanguageModel.from_model(source, kernel="dense")
    logits = model.decoder.head(model.decoder.norm(hidden))
    torch.testing.assert_close(logits, model.forward(ids), rtol=1e-5, atol=1e-5)
    assert len(set(seen)) == 7 * runner.num_blocks


def test_moments_count_every_token_alike_and_inputs_once(stories_folder: Path) -> None:
    source = open_source(stories_folder)
    runner = BlockRunner(source)
    from cluscomp_export.error_feedback import _Observer

    observer, inputs = _Observer(), {}
    hidden = runner.embed(torch.arange(1, 61).reshape(6, 10))  # two batches

    def observe(name: str, values: torch.Tensor) -> None:
        observer(name, values)
        inputs.setdefault(name.split(".")[-2], []).append(values.flatten(0, -2).double())

    runner.run(0, source.tensors, hidden, observe)
    moments = {name.split(".")[-2]: value for name, value in observer.results().items()}
    assert moments["q_proj"] is moments["k_proj"] is moments["v_proj"]
    assert moments["gate_proj"] is moments["up_proj"]
    assert len({id(value) for value in moments.values()}) == 4
    for name, value in moments.items():
        flat = torch.cat(inputs[name])
        flat = flat / flat.square().mean(1, keepdim=True).sqrt()
        expected = flat.t() @ flat / len(flat)
        expected += 0.1 * expected.diagonal().mean() * torch.eye(len(expected), dtype=torch.float64)
        torch.testing.assert_close(value.damped, expected, rtol=1e-5, atol=1e-5)


def test_moments_of_inputs_that_are_zero_still_encode() -> None:
    moments = InputMoments(torch.zeros(4, 4, dtype=torch.float64))
    weights = np.arange(16, dtype=np.float32).reshape(4, 4)
    codes, factors = moments.encode(weights, weights.reshape(-1, 2).copy(), 3, threads=1, device="cpu")
    assert codes.reshape(-1).tolist() == list(range(8))
    np.testing.assert_allclose(factors, 1, rtol=1e-6)


def test_factors_are_least_squares_under_the_moments() -> None:
    generator = np.random.default_rng(0)
    inputs = generator.standard_normal((60, 12)).cumsum(axis=1)
    moments = InputMoments(torch.from_numpy(inputs.T @ inputs / 60))
    weights = generator.standard_normal((12, 10), dtype=np.float32)
    centroids = generator.standard_normal((30, 2), dtype=np.float32)
    codes, factors = moments.encode(weights, centroids, 9, threads=1, device="cpu")
    given, damped = centroids[codes].reshape(12, 10).astype(np.float64), moments.damped.numpy()

    def error(scales: np.ndarray) -> float:
        wrong = weights[:, :9] - given[:, :9] * scales
        return float((wrong * (damped @ wrong)).sum())

    assert all(error(factors) <= error(factors * (1 + step)) for step in (-1e-3, 1e-3))


@pytest.fixture(scope="module")
def halves(stories_text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A text to calibrate on and another to evaluate with."""
    folder, text = tmp_path_factory.mktemp("texts"), read_text(stories_text)
    halves = folder / "first.txt", folder / "second.txt"
    for half, words in zip(halves, (text[: len(text) // 2], text[len(text) // 2 :]), strict=True):
        half.write_text(words, encoding="utf-8")
    return halves


@pytest.fixture(scope="module")
def made(stories_folder: Path, halves: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("effort")
    outputs = {"fast": folder / "fast.clus", "balanced": folder / "balanced.clus"}
    for effort, output in outputs.items():
        convert(stories_folder, output, ConversionOptions(bits=4, calibration=str(halves[0]), effort=effort))  # type: ignore[arg-type]
    return outputs


def test_feedback_brings_the_model_closer_to_its_source(
    made: dict[str, Path], stories_folder: Path, halves: tuple[Path, Path]
) -> None:
    kl = {
        effort: evaluate_files(output, text=halves[1], reference=stories_folder, context=128).kl
        for effort, output in made.items()
    }
    assert kl["balanced"] is not None
    assert kl["fast"] is not None
    assert kl["balanced"] < 0.9 * kl["fast"]


def test_the_provenance_names_the_effort(made: dict[str, Path]) -> None:
    for effort, output in made.items():
        assert open_packed(output).provenance["options"]["effort"] == effort


def test_threads_change_no_byte(made: dict[str, Path], stories_folder: Path, halves: tuple[Path, Path], tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    other = 1 if threads > 1 else 2
    torch.set_num_threads(other)
    try:
        options = ConversionOptions(bits=4, calibration=str(halves[0]), threads=other)
        convert(stories_folder, tmp_path / "again.clus", options)
    finally:
        torch.set_num_threads(threads)
    assert open_packed(tmp_path / "again.clus").digest() == open_packed(made["balanced"]).digest()


def test_an_interrupted_conversion_ends_with_the_same_bytes(
    made: dict[str, Path], stories_folder: Path, halves: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out.clus"
    options = ConversionOptions(bits=4, calibration=str(halves[0]), effort="balanced")
    run, blocks = BlockRunner.run, []

    def interrupted(self: BlockRunner, index: int, *rest: object) -> torch.Tensor:
        blocks.append(index)
        if index == 3:
            raise KeyboardInterrupt
        return run(self, index, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(BlockRunner, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert(stories_folder, output, options)
    assert blocks == [0, 0, 1, 1, 2, 2, 3]
    kept = len(list(work_path(output).glob("*.safetensors")))
    assert kept > 3 * 7
    monkeypatch.setattr(BlockRunner, "run", run)
    report = convert(stories_folder, output, options)
    # The codebooks, the energies, and three blocks of seven matrices.
    # What the second attempt made itself and read again does not count.
    assert report.reused == kept
    assert output.read_bytes() == made["balanced"].read_bytes()


def test_feedback_without_a_text_is_refused(stories_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match="needs a calibration text"):
        convert(stories_folder, tmp_path / "out.clus", ConversionOptions(bits=3, calibration="none", effort="balanced"))


def test_windows_are_bounded(stories_folder: Path, stories_text: Path) -> None:
    source = open_source(stories_folder)
    text = read_text(stories_text)
    assert calibration_windows(source, text * 40, 3).shape == (3, 512)
    assert calibration_windows(source, text[:50], 3).shape[0] == 1
    assert ErrorFeedback(source, calibration_windows(source, text[:50], 1)).covers("model.layers.4.mlp.up_proj.weight")


def test_channels_are_coded_in_descending_order_of_energy() -> None:
    generator = np.random.default_rng(0)
    inputs = generator.standard_normal((60, 12)).cumsum(axis=1)  # energies ascend
    moments = torch.from_numpy(inputs.T @ inputs / 60)
    weights = generator.standard_normal((12, 10), dtype=np.float32)
    centroids = generator.standard_normal((30, 2), dtype=np.float32)
    order = np.argsort(-moments.diagonal().numpy(), kind="stable")
    damped = InputMoments(moments.clone()).damped[order][:, order]
    factor = np.ascontiguousarray(feedback_factor(damped).numpy().astype(np.float32))
    expected = np.empty((12, 5), np.uint16)
    expected[order] = feedback_codes(weights[order], centroids, factor, 10)
    found, _ = InputMoments(moments.clone()).encode(weights, centroids, 10, threads=1, device="cpu")
    np.testing.assert_array_equal(found, expected)
    # The order in which the channels come says nothing.
    moved = generator.permutation(12)
    again, _ = InputMoments(moments[moved][:, moved]).encode(weights[moved], centroids, 10, threads=1, device="cpu")
    np.testing.assert_array_equal(again, expected[moved])
