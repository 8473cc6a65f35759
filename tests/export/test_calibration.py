"""Calibration: what the energies are, and that they help."""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from model_builders import tiny_llama

from cluscomp_export.calibration import activations as calibration
from cluscomp_export.calibration.activations import (
    MOMENT_WINDOWS,
    calibration_context,
    calibration_tokens,
    calibration_windows,
    channel_second_moments,
    read_text,
    shipped_text,
)
from cluscomp_export.conversion.convert import ConversionOptions, convert, prepare
from cluscomp_export.evaluation.evaluate import evaluate_files
from cluscomp_export.sources import open_source
from cluscomp_export.threads import torch_threads
from cluscomp_formats.errors import InvalidFileError, InvalidRequestError
from cluscomp_formats.ir import Array, DenseTensor, Model
from cluscomp_formats.packed import open_packed


def energies_of(inputs: torch.Tensor, source: Model, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    name = "model.layers.0.mlp.up_proj.weight"
    matrix = DenseTensor(name, Array.of(np.zeros((3, inputs.shape[-1]), np.float32)))
    model = Model(source.config, {name: matrix}, source.files)
    monkeypatch.setattr(calibration, "observe_inputs", lambda model, ids, observe: observe(name, inputs))
    return channel_second_moments(model, torch.zeros(1, 4, dtype=torch.int64))[name]


def test_every_token_counts_alike(stories_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Shares of the energy: (1, 0), then (1/10, 9/10) of a token a thousand times as large. Their mean, scaled to mean 1.
    inputs = torch.tensor([[[2.0, 0.0], [1000.0, 3000.0]]], dtype=torch.float64)
    energies = energies_of(inputs, open_source(stories_folder), monkeypatch)
    np.testing.assert_allclose(energies, [1.1, 0.9], rtol=1e-6)


def test_channels_that_see_nothing_count_alike(stories_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    energies = energies_of(torch.zeros(1, 3, 4, dtype=torch.float64), open_source(stories_folder), monkeypatch)
    np.testing.assert_array_equal(energies, np.ones(4, np.float32))


def test_energies_of_a_real_model_cover_every_matrix_for_any_number_of_threads(
    stories_folder: Path, stories_text: Path
) -> None:
    source = open_source(stories_folder)
    windows = calibration_windows(calibration_tokens(source, read_text(stories_text)), MOMENT_WINDOWS)
    energies = channel_second_moments(source, windows)
    for name, tensor in source.tensors.items():
        if name.startswith("model.layers") and "proj" in name:
            assert energies[name].shape == (tensor.shape[1],)
            assert energies[name].mean() == pytest.approx(1, rel=1e-5)
            assert energies[name].min() >= 0
    with torch_threads(1):
        again = channel_second_moments(source, windows)
    assert all(np.array_equal(energies[name], again[name]) for name in energies)


@pytest.mark.parametrize(
    ("trained", "asked", "found"), [(8192, None, 512), (256, None, 256), (8192, 2048, 2048), (None, 64, 64), (None, None, 512)]
)
def test_windows_are_as_long_as_asked_and_no_longer_than_the_model_allows(
    trained: int | None, asked: int | None, found: int
) -> None:
    model = Model({"max_position_embeddings": trained}, {})
    assert calibration_context(model, asked) == found


@pytest.fixture
def short_context(stories_folder: Path, tmp_path: Path) -> Path:
    """The model as if trained for 256 tokens."""
    folder = tmp_path / "source"
    shutil.copytree(stories_folder, folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 256}))
    return folder


@pytest.mark.parametrize("asked", [0, 1, 257])
def test_windows_that_cannot_be_are_refused(asked: int, short_context: Path) -> None:
    with pytest.raises(InvalidRequestError, match=r"`calibration_context`(?s:.*)at most the model's 256"):
        prepare(short_context, ConversionOptions(calibration_context=asked))


def test_a_model_of_few_positions_goes_through_all_levels(short_context: Path, tmp_path: Path) -> None:
    options = ConversionOptions(bits=3, share="none", effort="best", blockwise_epochs=1, recovery_steps=1)
    report = convert(short_context, tmp_path / "out.clus", options)
    assert {"recovery", "block 0"} < set(report.curves)


def test_all_that_is_measured_sees_windows_of_that_length(
    stories_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes: dict[str, tuple[int, ...]] = {}

    def see(module: str, name: str) -> None:
        original = getattr(importlib.import_module(module), name)

        def seeing(*arguments: Any, **options: object) -> object:
            (windows,) = (argument for argument in arguments[:2] if isinstance(argument, torch.Tensor))
            shapes[name] = tuple(windows.shape)
            return original(*arguments, **options)

        monkeypatch.setattr(f"{module}.{name}", seeing)

    for name in ("channel_second_moments", "row_importance", "BlockByBlock"):
        see("cluscomp_export.conversion.compress_source", name)
    see("cluscomp_export.conversion.prepare", "measure_sensitivities")
    options = ConversionOptions(bits=3, calibration_context=64, calibration_windows=5, sensitivity="measured")
    output = tmp_path / "out.clus"
    convert(stories_folder, output, options)
    assert shapes == {
        "channel_second_moments": (6, 64),
        "row_importance": (2, 64),
        "BlockByBlock": (5, 64),
        "measure_sensitivities": (4, 64),
    }
    assert open_packed(output).provenance["options"]["calibration_context"] == 64


def test_calibration_brings_the_model_closer_to_its_source(stories_folder: Path, stories_text: Path, tmp_path: Path) -> None:
    divergence = {}
    for choice in ("none", str(stories_text)):
        output = tmp_path / f"{len(divergence)}.clus"
        convert(stories_folder, output, ConversionOptions(bits=2.5, calibration=choice))
        divergence[choice] = evaluate_files(output, text=stories_text, reference=stories_folder, context=128, windows=8).kl
        recorded = open_packed(output).provenance["options"].get("calibration", "none")
        assert recorded == choice if choice == "none" else recorded.startswith("sha256:")
    assert divergence[str(stories_text)] < divergence["none"]  # type: ignore[operator]


def test_the_paper_setting_is_not_calibrated(stories_folder: Path, tmp_path: Path) -> None:
    convert(stories_folder, tmp_path / "out.clus", ConversionOptions(dim=4, clusters=64))
    assert "calibration" not in open_packed(tmp_path / "out.clus").provenance["options"]


def test_the_shipped_text_is_long_enough_for_a_dozen_windows(stories_folder: Path) -> None:
    assert len(shipped_text()) > 20_000


def test_without_a_tokenizer_the_default_goes_on_and_a_wish_is_refused(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    source = tiny_llama()
    folder = tmp_path / "source"
    folder.mkdir()
    import json

    (folder / "config.json").write_text(json.dumps(dict(source.config)))
    save_file({name: tensor.decode() for name, tensor in source.tensors.items()}, folder / "model.safetensors")
    report = convert(folder, tmp_path / "out.clus", ConversionOptions(bits=5))
    assert any("without a calibration text" in warning for warning in report.warnings)
    (tmp_path / "text.txt").write_text("words")
    with pytest.raises(InvalidRequestError, match="no tokenizer"):
        convert(folder, tmp_path / "other.clus", ConversionOptions(bits=5, calibration=str(tmp_path / "text.txt")))


def test_a_calibration_text_that_is_not_there_is_refused(stories_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidFileError, match="no such file"):
        convert(stories_folder, tmp_path / "out.clus", ConversionOptions(bits=4, calibration=str(tmp_path / "none.txt")))
    assert list(tmp_path.iterdir()) == []
