"""Verdicts: equal, derived, different, unknown, each for its own reason."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from cluscomp_export.conversion.convert import ConversionOptions, convert
from cluscomp_export.inspection.verify import verify
from cluscomp_formats.ir import Array, DenseTensor, Model
from cluscomp_formats.packed import open_packed, write_packed
from cluscomp_runtime import LanguageModel


@pytest.fixture(scope="module")
def packed(stories_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("packed") / "stories.clus"
    convert(stories_folder, output, ConversionOptions(bits=5))
    return output


def rewritten(packed: Path, output: Path, **changes: object) -> Path:
    write_packed(dataclasses.replace(open_packed(packed), **changes), output)  # type: ignore[arg-type]
    return output


def test_a_copy_is_equal(packed: Path, tmp_path: Path) -> None:
    copy = shutil.copy(packed, tmp_path / "copy.clus")
    result = verify(packed, Path(copy))
    assert (result.verdict, result.exit_code) == ("equal", 0)
    assert result.logits is not None
    assert result.logits["max_difference"] == 0
    assert all(test["passed"] for test in result.self_tests.values())


@pytest.mark.parametrize("swap", [False, True])
def test_an_artefact_is_derived_from_its_source(stories_folder: Path, packed: Path, swap: bool) -> None:
    result = verify(packed, stories_folder) if swap else verify(stories_folder, packed)
    assert (result.verdict, result.exit_code) == ("derived", 0)
    worst = max(error.relative for error in result.tensors)
    assert 0 < worst < 0.5
    assert result.logits is not None
    assert result.logits["kl"] < 0.5


def test_an_artefact_of_another_source_is_different(stories_folder: Path, packed: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(stories_folder, other)
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, other / "model.safetensors")
    result = verify(other, packed)
    assert (result.verdict, result.exit_code) == ("different", 1)
    assert "another source" in result.reasons[0]


def test_one_changed_value_is_found_and_named(packed: Path, tmp_path: Path) -> None:
    model = open_packed(packed)
    name = "model.layers.2.input_layernorm.weight"
    values = model.tensors[name].decode().copy()
    values[11] *= 1.5
    changed = {**model.tensors, name: DenseTensor(name, Array.of(values))}
    other = tmp_path / "other.clus"
    write_packed(Model(model.config, changed, model.files, model.provenance, model.self_test), other)
    result = verify(packed, other)
    assert result.verdict == "different"
    assert [error.name for error in result.tensors if error.max_absolute > 0] == [name]
    assert result.self_tests[str(packed)]["passed"]
    assert not result.self_tests[str(other)]["passed"]


def test_a_derived_artefact_that_fails_its_self_test_is_different(stories_folder: Path, packed: Path, tmp_path: Path) -> None:
    record = open_packed(packed).self_test
    assert record is not None
    logits = np.array(record["sequences"][0]["top_logits"])
    broken = {**record, "sequences": [{**record["sequences"][0], "top_logits": (logits + 1).tolist()}]}
    other = rewritten(packed, tmp_path / "other.clus", self_test=broken)
    assert verify(stories_folder, other).exit_code == 1


def test_without_provenance_or_self_test_nothing_can_be_told(stories_folder: Path, packed: Path, tmp_path: Path) -> None:
    anonymous = rewritten(packed, tmp_path / "anonymous.clus", provenance={})
    assert verify(stories_folder, anonymous).exit_code == 2
    untested = rewritten(packed, tmp_path / "untested.clus", self_test=None)
    assert verify(stories_folder, untested).exit_code == 2


def test_models_of_other_shape_are_different(packed: Path, tmp_path: Path) -> None:
    model = open_packed(packed)
    tensors = {name: tensor for name, tensor in model.tensors.items() if name != "model.norm.weight"}
    other = tmp_path / "other.clus"
    write_packed(Model(model.config, tensors, model.files), other)
    result = verify(packed, other)
    assert result.verdict == "different"
    assert any("model.norm.weight" in reason for reason in result.reasons)


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_an_artefact_that_does_not_fit_the_memory_is_run_matrix_by_matrix(
    stories_folder: Path, packed: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    kernels: list[str] = []
    from_model = LanguageModel.from_model

    def refuse(model: Model, *, kernel: str, **options: Any) -> LanguageModel:
        kernels.append(kernel)
        if kernel == "auto":
            raise error
        return from_model(model, kernel=kernel, **options)

    monkeypatch.setattr(LanguageModel, "from_model", refuse)
    result = verify(stories_folder, packed)
    # The dense source is read matrix by matrix in any case, and so is all that its record is computed from.
    assert kernels[:3] == ["reference", "auto", "reference"]
    assert set(kernels[3:]) == {"reference"}
    assert result.verdict == "derived"
    assert any("does not fit into memory" in reason for reason in result.reasons)


def test_a_model_that_does_not_fit_at_all_is_not_run(
    stories_folder: Path, packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> LanguageModel:
        raise MemoryError

    monkeypatch.setattr(LanguageModel, "from_model", refuse)
    result = verify(stories_folder, packed)
    assert any("was not run: not enough memory" in reason for reason in result.reasons)
    assert result.logits is None
