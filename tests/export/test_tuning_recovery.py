"""Recovery training on a small trained model."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cluscomp_export.calibration.activations import read_text
from cluscomp_export.compression.pipeline import compress
from cluscomp_export.conversion.convert import ConversionOptions, convert, prepare
from cluscomp_export.conversion.effort import phases_of
from cluscomp_export.evaluation.evaluate import evaluate
from cluscomp_export.planning import plan_bits
from cluscomp_export.sources import open_source
from cluscomp_export.training import RecoveryOptions, recover
from cluscomp_export.training.loop import RATE_OF_ROOT, Precision, Training, fast_precision
from cluscomp_export.training.parameters import TrainableModel
from cluscomp_formats.errors import InvalidRequestError
from cluscomp_formats.ir import Array, ClusteredWeight, DenseTensor, Model
from cluscomp_formats.packed import open_packed
from cluscomp_runtime.language_model import LanguageModel
from cluscomp_runtime.tokenizer import Tokenizer

FEW = RecoveryOptions(steps=24, batch=4, context=64, rate=3e-3, checks=3)


@pytest.fixture(scope="module")
def source(stories_folder: Path) -> Model:
    return open_source(stories_folder)


@pytest.fixture(scope="module")
def clustered(source: Model) -> Model:
    """At 3 bits per weight, everything read."""
    lazy = compress(source, plan_bits(source, bits=3, share="kind", embedding_bits=16)).model
    return TrainableModel(lazy).with_values({})


@pytest.fixture(scope="module")
def token_ids(source: Model, stories_text: Path) -> list[int]:
    tokenizer = Tokenizer.from_files(source.files)
    assert tokenizer is not None
    return tokenizer.encode(read_text(stories_text))


def divergence(model: Model, source: Model, windows: list[list[int]]) -> float:
    found = evaluate(LanguageModel.from_model(model), windows, reference=LanguageModel.from_model(source)).kl
    assert found is not None
    return found


def test_the_trainable_model_computes_the_model(clustered: Model) -> None:
    ids = torch.arange(1, 41).reshape(2, 20)
    trainable = TrainableModel(clustered)
    expected = LanguageModel.from_model(clustered, kernel="dense").forward(ids)
    torch.testing.assert_close(trainable.decoder(ids).detach(), expected, rtol=1e-4, atol=1e-4)
    same = trainable.with_values(trainable.stored())
    assert same.digest() == clustered.digest()


def test_every_parameter_gets_a_gradient(clustered: Model) -> None:
    trainable = TrainableModel(clustered)
    trainable.decoder(torch.arange(1, 41).reshape(2, 20)).square().sum().backward()
    kinds = {name.split(".")[0] for name in trainable.parameters}
    assert kinds == {"codebook", "row_scale", "norm"}
    assert all(values.grad is not None and values.grad.abs().sum() > 0 for values in trainable.parameters.values())


def test_an_original_too_large_to_keep_teaches_the_same(
    clustered: Model, source: Model, token_ids: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = replace(FEW, steps=2, checks=1)
    kept = recover(TrainableModel(clustered), source, token_ids, options)
    monkeypatch.setattr("cluscomp_export.training.recovery.KEPT_TEACHER_BYTES", 0)
    read = recover(TrainableModel(clustered), source, token_ids, options)
    assert read.curve == kept.curve
    assert all(np.array_equal(read.values[name], values) for name, values in kept.values.items())


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_recovery_brings_unseen_text_closer(
    clustered: Model, source: Model, token_ids: list[int], precision: Precision
) -> None:
    half = len(token_ids) // 2
    windows = [token_ids[start : start + 128] for start in range(half, len(token_ids) - 128, 128)]
    result = recover(TrainableModel(clustered), source, token_ids[:half], replace(FEW, precision=precision))
    assert divergence(result.model, source, windows) < 0.9 * divergence(clustered, source, windows)
    assert [entry["step"] for entry in result.curve] == [0, 8, 16, 24]
    assert result.curve[-1]["held_out"] < result.curve[0]["held_out"]
    assert result.stopped is None
    for name, tensor in clustered.clustered.items():
        trained = result.model.tensors[name]
        assert isinstance(trained, ClusteredWeight)
        np.testing.assert_array_equal(trained.stages[0].codes.read(), tensor.stages[0].codes.read())
        assert trained.stages[0].codebook.values.dtype == tensor.stages[0].codebook.values.dtype


@pytest.mark.parametrize(("capabilities", "precision"), [({"amx_bf16": True}, "bfloat16"), ({"avx2": True}, "float32")])
def test_the_precision_is_the_fast_one_unless_asked_for(
    capabilities: dict[str, bool], precision: Precision, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert fast_precision() == precision
    assert phases_of(ConversionOptions(effort="best")).recorded()["recovery"]["precision"] == precision
    asked = ConversionOptions(effort="best", recovery_precision="float32")
    assert phases_of(asked).recorded()["recovery"]["precision"] == "float32"


def test_the_same_training_gives_the_same_digest(clustered: Model, source: Model, token_ids: list[int]) -> None:
    options = RecoveryOptions(steps=2, batch=1, context=32)
    first, second = (recover(TrainableModel(clustered), source, token_ids, options).model.digest() for _ in range(2))
    other = recover(
        TrainableModel(clustered), source, token_ids, RecoveryOptions(steps=2, batch=1, context=32, seed=1)
    ).model.digest()
    assert first == second != other


def test_the_rate_goes_with_the_way_there_is_to_go(clustered: Model, source: Model, token_ids: list[int]) -> None:
    options = RecoveryOptions(steps=2, batch=1, context=32)
    usual = recover(TrainableModel(clustered), source, token_ids, options)
    rate = RATE_OF_ROOT * math.sqrt(usual.curve[0]["held_out"])
    same = recover(TrainableModel(clustered), source, token_ids, replace(options, rate=rate))
    other = recover(TrainableModel(clustered), source, token_ids, replace(options, rate=2 * rate))
    assert same.model.digest() == usual.model.digest() != other.model.digest()


def test_a_divergence_that_rounding_made_negative_is_none(
    clustered: Model, source: Model, token_ids: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Training, "evaluate", lambda self: -1e-9)
    result = recover(TrainableModel(clustered), source, token_ids, RecoveryOptions(steps=2, batch=1, context=32))
    assert result.model.digest() == clustered.digest()


def test_a_loss_that_is_not_finite_keeps_the_best_state(
    clustered: Model, source: Model, token_ids: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    take_step = Training.step

    def breaking(self: Training, step: int) -> float:
        if step == 9:
            with torch.no_grad():
                next(iter(self.student.parameters.values())).fill_(math.nan)
        return take_step(self, step)

    monkeypatch.setattr(Training, "step", breaking)
    result = recover(TrainableModel(clustered), source, token_ids, FEW)
    assert result.stopped is not None
    assert "step 10" in result.stopped
    assert len(result.curve) == 2
    assert all(np.isfinite(values.astype(np.float32)).all() for values in result.values.values())
    assert result.model.digest() != clustered.digest()


def test_a_training_that_does_harm_changes_nothing(clustered: Model, source: Model, token_ids: list[int]) -> None:
    options = RecoveryOptions(steps=8, batch=1, context=32, rate=3.0, checks=8, patience=2)
    result = recover(TrainableModel(clustered), source, token_ids, options)
    assert result.model.digest() == clustered.digest()
    assert result.stopped is not None
    assert "no progress" in result.stopped


def test_a_model_without_codebooks_and_a_text_without_words_are_refused(
    clustered: Model, source: Model, token_ids: list[int]
) -> None:
    with pytest.raises(InvalidRequestError, match="no codebook"):
        TrainableModel(source)
    with pytest.raises(InvalidRequestError, match="too short"):
        recover(TrainableModel(clustered), source, token_ids[:10], FEW)


def test_norms_in_half_precision_are_stored_as_such(clustered: Model) -> None:
    name = "model.norm.weight"
    narrow = clustered.tensors[name].decode().astype(np.float16)
    model = Model(clustered.config, {**clustered.tensors, name: DenseTensor(name, Array.of(narrow))})
    trainable = TrainableModel(model)
    assert trainable.stored()[f"norm.{name}"].dtype == np.float16
    assert trainable.with_values(trainable.stored()).digest() == model.digest()


def test_convert_with_all_effort(
    source: Model, stories_folder: Path, stories_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few: dict[str, Any] = {"recovery_steps": 24, "recovery_context": 64, "recovery_lr": 3e-3, "recovery_checks": 3}
    options = ConversionOptions(bits=3, share="kind", calibration=str(stories_text), effort="best", **few)
    outputs = tmp_path / "best.clus", tmp_path / "again.clus"
    report = convert(stories_folder, outputs[0], options)
    curve = report.curves["recovery"]
    assert [entry["step"] for entry in curve] == [0, 8, 16, 24]
    assert curve[-1]["held_out"] < curve[0]["held_out"]
    # Killed in the middle of the training, then while writing, after it: no attempt trains again what one before it did.
    take_step, steps = Training.step, []

    def counted(self: Training, step: int) -> float:
        steps.append(step)
        if step == 20 and steps.count(20) == 1:
            raise KeyboardInterrupt
        return take_step(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(Training, "step", counted)
        patch.setattr("cluscomp_export.conversion.self_test.make_self_test", interrupt)
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                convert(stories_folder, outputs[1], options)
    # A checkpoint is kept at every check.
    assert steps == [*range(21), *range(16, 24)]
    again = convert(stories_folder, outputs[1], options)
    assert again.curves == report.curves
    assert again.reused > 0
    assert outputs[1].read_bytes() == outputs[0].read_bytes()
    provenance = open_packed(outputs[0]).provenance
    assert provenance["options"]["recovery"]["steps"] == 24
    # In steps of int8 most of what is learnt would be lost; whoever wants it may have it.
    assert {book.values.dtype for book in open_packed(outputs[0]).codebooks.values()} == {"float16"}
    assert {book.dtype for book in prepare(stories_folder, replace(options, codebook_bits=8)).plan.codebooks} == {"int8"}


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt
