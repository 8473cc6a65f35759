"""Error feedback from end to end, on a small trained model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from feedback_targets import compressed, inputs_of, ridge

from cluscomp_export.calibration.activations import calibration_tokens, calibration_windows, read_text
from cluscomp_export.compression.moments import InputMoments
from cluscomp_export.compression.pipeline import BlockByBlock, compress
from cluscomp_export.conversion import prepare as prepare_module
from cluscomp_export.conversion.convert import ConversionOptions, convert
from cluscomp_export.conversion.effort import phases_of
from cluscomp_export.conversion.options import Effort
from cluscomp_export.evaluation.evaluate import evaluate_files
from cluscomp_export.planning import plan_fixed
from cluscomp_export.sources import open_source
from cluscomp_export.sources.linears import block_index
from cluscomp_export.work_folder import work_path
from cluscomp_formats.errors import InvalidRequestError
from cluscomp_formats.packed import open_packed
from cluscomp_kernels.kmeans import feedback_factor
from cluscomp_kernels.kmeans.reference import feedback_codes
from cluscomp_runtime.blocks import BlockBranch, BlockRunner
from cluscomp_runtime.language_model import LanguageModel

Floats = npt.NDArray[np.float32]


def test_blocks_one_by_one_are_the_model(stories_folder: Path) -> None:
    source = open_source(stories_folder)
    runner = BlockRunner(source)
    ids = torch.arange(1, 31).reshape(5, 6)
    hidden = runner.embed(ids)
    names = set()
    for index in range(runner.num_blocks):
        for branch in runner.branches(index, source.tensors):
            names.update((*(name for group in branch.inputs for name in group), *branch.outputs))
            hidden = branch(hidden)
    model = LanguageModel.from_model(source, kernel="dense")
    logits = model.decoder.head(model.decoder.norm(hidden))
    torch.testing.assert_close(logits, model.forward(ids), rtol=1e-5, atol=1e-5)
    assert names == {name for name in source.tensors if block_index(name) is not None and "norm" not in name}


def test_input_projections_aim_at_what_the_original_gives_for_the_originals_input(
    stories_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, ids = open_source(stories_folder), torch.arange(1, 241).reshape(6, 40)  # two batches
    name = "model.layers.1.mlp.up_proj.weight"
    targets, tensors = compressed(source, ids, monkeypatch)
    wanted = inputs_of(source, {}, ids, name)
    # Up to this matrix, the compressed model.
    given = inputs_of(source, {**tensors, name: source.tensors[name]}, ids, name)
    scale = given.square().mean(1, keepdim=True).sqrt()
    x, error = given / scale, (wanted - given) / scale
    weight = torch.from_numpy(source.tensors[name].decode().astype(np.float64))
    damped, correction = ridge(x, error @ weight.t())
    target = targets[name]
    assert target is not None
    assert target.moments is getattr(targets[name.replace("up", "gate")], "moments", None)
    # Activations are float32: their rounding, against corrections of this size.
    torch.testing.assert_close(target.moments.damped, damped, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.from_numpy(target.correction).double(), correction, rtol=1e-3, atol=1e-4)
    assert correction.abs().max() > 0.01


def test_an_output_projection_aims_at_the_originals_residual_stream(
    stories_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, ids = open_source(stories_folder), torch.arange(1, 241).reshape(6, 40)
    name = "model.layers.0.self_attn.o_proj.weight"
    targets, tensors = compressed(source, ids, monkeypatch)
    embedded = BlockRunner(source).embed(ids).flatten(0, -2).double()
    weight = torch.from_numpy(source.tensors[name].decode().astype(np.float64))
    stream = embedded + inputs_of(source, {}, ids, name) @ weight.t()
    given = inputs_of(source, {**tensors, name: source.tensors[name]}, ids, name)
    scale = stream.square().mean(1, keepdim=True).sqrt()
    x, error = given / scale, (stream - embedded - given @ weight.t()) / scale
    damped, correction = ridge(x, error)
    target = targets[name]
    assert target is not None
    torch.testing.assert_close(target.moments.damped, damped, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.from_numpy(target.correction).double(), correction, rtol=1e-3, atol=1e-4)


def test_the_head_comes_last_and_aims_at_itself(stories_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, ids = open_source(stories_folder), torch.arange(1, 241).reshape(6, 40)
    name = "model.embed_tokens.weight"
    assert "lm_head.weight" not in source.tensors
    targets, tensors = compressed(source, ids, monkeypatch, embedding_bits=6)
    assert list(targets)[-1] == name
    assert len(targets) == 1 + 7 * source.config["num_hidden_layers"]
    target = targets[name]
    assert target is not None
    assert target.correction is None
    # For blocks the embedding is the original's.
    given = inputs_of(source, {**tensors, name: source.tensors[name]}, ids, name)
    x = given / given.square().mean(1, keepdim=True).sqrt()
    damped = x.t() @ x / len(x)
    damped += 0.1 * damped.diagonal().mean() * torch.eye(len(damped), dtype=torch.float64)
    torch.testing.assert_close(target.moments.damped, damped, rtol=1e-4, atol=1e-5)


def test_rows_are_encoded_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    weights = rng.standard_normal((24, 30), dtype=np.float32)
    centroids = rng.standard_normal((50, 3), dtype=np.float32)
    inputs = torch.from_numpy(rng.standard_normal((100, 24)))
    moments = InputMoments(inputs.t() @ inputs)
    whole = moments.encode(weights, centroids, np.ones(29, np.float32), threads=1, device="cpu")
    monkeypatch.setattr("cluscomp_export.compression.moments.PIECE_BYTES", 4 * 24 * 3 * 4)
    pieces = moments.encode(weights, centroids, np.ones(29, np.float32), threads=1, device="cpu")
    np.testing.assert_array_equal(pieces[0], whole[0])
    np.testing.assert_allclose(pieces[1], whole[1], rtol=1e-6)


def test_without_feedback_there_are_no_targets(stories_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(stories_folder)
    targets, _ = compressed(source, torch.arange(1, 41).reshape(2, 20), monkeypatch, feedback=False)
    assert len(targets) == 35
    assert set(targets.values()) == {None}


def test_moments_of_inputs_that_are_zero_still_encode() -> None:
    moments = InputMoments(torch.zeros(4, 4, dtype=torch.float64))
    weights = np.arange(16, dtype=np.float32).reshape(4, 4)
    codes, factors = moments.encode(weights, weights.reshape(-1, 2).copy(), np.ones(3, np.float32), threads=1, device="cpu")
    assert codes.reshape(-1).tolist() == list(range(8))
    np.testing.assert_allclose(factors, 1, rtol=1e-6)


def test_factors_are_least_squares_under_the_moments() -> None:
    generator = np.random.default_rng(0)
    inputs = generator.standard_normal((60, 12)).cumsum(axis=1)
    moments = InputMoments(torch.from_numpy(inputs.T @ inputs / 60))
    weights = generator.standard_normal((12, 10), dtype=np.float32)
    centroids = generator.standard_normal((30, 2), dtype=np.float32)
    codes, factors = moments.encode(weights, centroids, np.ones(9, np.float32), threads=1, device="cpu")
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
        convert(stories_folder, output, ConversionOptions(bits=4, share="none", calibration=str(halves[0]), effort=effort))  # type: ignore[arg-type]
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


def test_the_provenance_names_the_phases(made: dict[str, Path]) -> None:
    fast, balanced = (open_packed(made[effort]).provenance["options"] for effort in ("fast", "balanced"))
    assert fast["feedback"] is False
    assert "blockwise" not in fast
    assert balanced["feedback"] is True
    assert balanced["blockwise"]["epochs"] == 2
    assert balanced["calibration_windows"] == phases_of(ConversionOptions(effort="balanced")).windows


def test_an_interrupted_conversion_ends_with_the_same_bytes(
    made: dict[str, Path], stories_folder: Path, halves: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out.clus"
    options = ConversionOptions(bits=4, share="none", calibration=str(halves[0]), effort="balanced")
    make, blocks = BlockRunner.branch, []

    def interrupted(self: BlockRunner, index: int, *rest: object) -> BlockBranch:
        blocks.append(index)
        if index == 3:
            raise KeyboardInterrupt
        return make(self, index, *rest)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(BlockRunner, "branch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            convert(stories_folder, output, options)
    assert set(blocks) == {0, 1, 2, 3}
    kept = len(list(work_path(output).glob("*.safetensors")))
    # Second moments, codebooks, and three blocks of seven matrices, each block with what its tuning gave.
    assert kept > 3 * 8
    report = convert(stories_folder, output, options)
    # What the second attempt made itself does not count.
    assert report.reused == kept
    assert output.read_bytes() == made["balanced"].read_bytes()


def test_a_conversion_that_is_all_but_written_runs_no_block_again(
    made: dict[str, Path], stories_folder: Path, halves: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out.clus"
    options = ConversionOptions(bits=4, share="none", calibration=str(halves[0]), effort="balanced")

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("cluscomp_export.conversion.self_test.make_self_test", interrupt)
        with pytest.raises(KeyboardInterrupt):
            convert(stories_folder, output, options)
    monkeypatch.setattr(BlockRunner, "branch", interrupt)
    convert(stories_folder, output, options)
    assert output.read_bytes() == made["balanced"].read_bytes()


def test_feedback_without_a_text_is_refused(stories_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match="needs a calibration text"):
        convert(stories_folder, tmp_path / "out.clus", ConversionOptions(bits=3, calibration="none", effort="balanced"))


def test_feedback_takes_a_text_shorter_than_a_window(stories_folder: Path, stories_text: Path) -> None:
    source = open_source(stories_folder)
    windows = calibration_windows(calibration_tokens(source, read_text(stories_text)[:50]), 1)
    plan = plan_fixed(source, cluster_dim=2, num_clusters=64, share="kind", embedding_bits=16)
    model = compress(source, plan, blocks=BlockByBlock(windows)).model
    assert np.isfinite(model.tensors["model.layers.4.mlp.up_proj.weight"].decode()).all()


def test_windows_are_bounded_and_spread_over_the_text() -> None:
    token_ids = list(range(40 * 512 + 7))
    found = calibration_windows(token_ids, 3)
    assert found.tolist() == [token_ids[start : start + 512] for start in (6 * 512, 20 * 512, 33 * 512)]
    assert calibration_windows(token_ids, 100).shape == (40, 512)
    assert calibration_windows(token_ids[:50], 3).tolist() == [token_ids[:50]]


@pytest.mark.parametrize(("effort", "held_out"), [("balanced", 0), ("best", 4 * 512)])
def test_recovery_is_judged_by_text_that_feedback_has_not_seen(
    effort: Effort, held_out: int, stories_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def seen(windows: torch.Tensor, *_: object) -> None:
        token_ids = calibration_tokens(open_source(stories_folder), prepare_module.shipped_text())
        assert torch.equal(windows, calibration_windows(token_ids[: len(token_ids) - held_out], 10**6))
        raise KeyboardInterrupt

    monkeypatch.setattr("cluscomp_export.conversion.compress_source.BlockByBlock", seen)
    options = ConversionOptions(bits=4, effort=effort, calibration_windows=10**6)
    with pytest.raises(KeyboardInterrupt):
        convert(stories_folder, tmp_path / "out.clus", options)


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
    found, _ = InputMoments(moments.clone()).encode(weights, centroids, np.ones(10, np.float32), threads=1, device="cpu")
    np.testing.assert_array_equal(found, expected)
    # The order in which the channels come says nothing.
    moved = generator.permutation(12)
    again, _ = InputMoments(moments[moved][:, moved]).encode(
        weights[moved], centroids, np.ones(10, np.float32), threads=1, device="cpu"
    )
    np.testing.assert_array_equal(again, expected[moved])
