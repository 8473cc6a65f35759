"""Conversion end to end on a small trained model: quality, determinism, provenance, what is left behind."""

from __future__ import annotations

import itertools
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from cluscomp_export.compression import fit_encode as jobs
from cluscomp_export.conversion.convert import ConversionOptions, convert, prepare
from cluscomp_export.conversion.finite_values import scan_source
from cluscomp_export.sources import open_source
from cluscomp_export.threads import torch_threads
from cluscomp_export.training.loop import Training
from cluscomp_export.training.losses import PredictionLoss
from cluscomp_export.work_folder import work_folder, work_path
from cluscomp_formats.errors import (
    ClusCompError,
    InvalidFileError,
    InvalidRequestError,
    OutputExistsError,
    StorageError,
    UnsupportedError,
)
from cluscomp_formats.ir import Array, DenseTensor
from cluscomp_formats.packed import open_packed, write_packed
from cluscomp_runtime import load


@pytest.fixture(scope="module")
def packed(stories_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("packed") / "stories.clus"
    convert(stories_folder, output, ConversionOptions(bits=4, embedding_bits=8))
    return output


def folder_digest(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_artefact_is_complete_and_tells_where_it_comes_from(stories_folder: Path, packed: Path) -> None:
    model = open_packed(packed, check=True)
    assert model.provenance["source"]["digest"] == open_source(stories_folder).digest()
    assert model.provenance["options"]["bits"] == 4
    assert "tokenizer.json" in model.files
    assert model.self_test is not None
    assert len(model.clustered) == 5 * 7 + 1


def test_the_artefact_runs_and_passes_its_self_test(packed: Path) -> None:
    model = load(packed, selftest=True)
    text = model.generate("Once upon a time", max_new_tokens=40).text
    assert len(text.split()) > 10


def test_the_same_inputs_give_the_same_bytes(stories_folder: Path, packed: Path, tmp_path: Path) -> None:
    again = tmp_path / "again.clus"
    convert(stories_folder, again, ConversionOptions(bits=4, embedding_bits=8))
    assert again.read_bytes() == packed.read_bytes()


def test_clustering_gives_the_same_bytes_with_any_number_of_threads(stories_folder: Path, tmp_path: Path) -> None:
    outputs = [tmp_path / f"{threads}.clus" for threads in (1, 3)]
    for output in outputs:
        convert(stories_folder, output, ConversionOptions(bits=4, effort="fast", threads=int(output.stem)))
    assert outputs[0].read_bytes() == outputs[1].read_bytes()


@pytest.mark.parametrize(("workers", "expected"), [(None, 3), ("threads:2", 2)])
def test_all_work_keeps_to_the_threads_asked_for_and_says_so_to_torch(
    workers: str | None, expected: int, stories_folder: Path, tmp_path: Path
) -> None:
    seen: set[int] = set()
    few = {"calibration_windows": 2, "recovery_steps": 1}
    options = ConversionOptions(bits=4, effort="best", threads=3, workers=workers, **few)
    with torch_threads(2):
        convert(
            stories_folder,
            tmp_path / "out.clus",
            options,
            on_progress=lambda stage, done, total: seen.add(torch.get_num_threads()) if done else None,
        )
        assert torch.get_num_threads() == 2
    assert seen - {expected} == set()


def test_repacking_keeps_digest_and_bytes(packed: Path, tmp_path: Path) -> None:
    again = tmp_path / "again.clus"
    convert(packed, again, ConversionOptions())
    assert again.read_bytes() == packed.read_bytes()


def test_a_clustered_source_is_not_clustered_again(packed: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        convert(packed, tmp_path / "again.clus", ConversionOptions(bits=2))
    assert caught.value.problems[0].kind == "already_clustered"
    assert list(tmp_path.iterdir()) == []


def test_the_source_is_untouched(stories_folder: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(stories_folder, source)
    before = folder_digest(source)
    convert(source, tmp_path / "out.clus", ConversionOptions(dim=4, clusters=64))
    assert folder_digest(source) == before


def test_the_predicted_size_is_the_size(stories_folder: Path, packed: Path) -> None:
    predicted = prepare(stories_folder, ConversionOptions(bits=4, embedding_bits=8)).sizes.payload_bytes
    # On top of the payloads come the header, the self-test record and up to 63 bytes of padding per section.
    assert predicted <= packed.stat().st_size <= predicted + 64_000


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_all_named(stories_folder: Path, tmp_path: Path, value: float) -> None:
    source = tmp_path / "source"
    shutil.copytree(stories_folder, source)
    tensors = load_file(source / "model.safetensors")
    names = ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"]
    tensors[names[0]][3, 5] = value
    tensors[names[1]][7] = value
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(InvalidFileError) as caught:
        convert(source, tmp_path / "out.clus", ConversionOptions(bits=4))
    problems = {problem.tensor: problem for problem in caught.value.problems}
    assert sorted(problems) == names
    assert "[3, 5]" in str(problems[names[0]].found)
    assert not (tmp_path / "out.clus").exists()


def test_a_bfloat16_source_is_checked_by_its_bits(stories_folder: Path, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file as save_torch

    tensors = {
        name: torch.from_numpy(array).bfloat16() for name, array in load_file(stories_folder / "model.safetensors").items()
    }
    source = tmp_path / "source"
    shutil.copytree(stories_folder, source)
    save_torch(tensors, source / "model.safetensors")
    scan_source(open_source(source), source)
    tensors["model.norm.weight"][0] = float("-inf")
    save_torch(tensors, source / "model.safetensors")
    with pytest.raises(InvalidFileError, match=r"model\.norm\.weight"):
        scan_source(open_source(source), source)


def test_an_existing_output_is_kept_unless_forced(stories_folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.clus"
    output.write_text("precious")
    options = ConversionOptions(dim=4, clusters=64)
    with pytest.raises(OutputExistsError):
        convert(stories_folder, output, options)
    assert output.read_text(encoding="utf-8") == "precious"
    convert(stories_folder, output, options, force=True)
    assert open_packed(output).clustered


def test_the_source_is_never_the_output(packed: Path, tmp_path: Path) -> None:
    source = tmp_path / "source.clus"
    shutil.copy(packed, source)
    with pytest.raises(InvalidRequestError) as caught:
        convert(source, source, ConversionOptions(), force=True)
    assert caught.value.problems[0].kind == "output_is_source"


@pytest.mark.parametrize(
    "options",
    [
        ConversionOptions(dim=4),
        ConversionOptions(clusters=4),
        ConversionOptions(bits=3, dim=4, clusters=16),
        ConversionOptions(bits=0),
        ConversionOptions(bits=17),
        ConversionOptions(embedding_bits=0),
        ConversionOptions(to="floppy"),
    ],
)
def test_options_that_make_no_sense_are_refused_before_any_work(
    stories_folder: Path, tmp_path: Path, options: ConversionOptions
) -> None:
    with pytest.raises(InvalidRequestError):
        convert(stories_folder, tmp_path / "out.clus", options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("option", "known"),
    [
        ("gguf_type", "f32, f16, bf16, q8_0, q4_0, q4_1, q5_0, q5_1"),
        ("effort", "fast, balanced, best"),
        ("share", "none, kind, model"),
        ("sensitivity", "measured, equal"),
        ("method", "fast, lloyd"),
    ],
)
def test_a_value_that_is_no_choice_is_refused_with_the_choices(
    stories_folder: Path, tmp_path: Path, option: str, known: str
) -> None:
    options = replace(ConversionOptions(bits=4, to="gguf"), **{option: "Q4_K_M"})
    with pytest.raises(InvalidRequestError) as error:
        convert(stories_folder, tmp_path / "out.gguf", options)
    assert (error.value.problems[0].found, error.value.problems[0].expected) == ("'Q4_K_M'", known)


def test_too_little_space_is_seen_before_any_work(
    stories_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 1000))  # type: ignore[attr-defined]
    monkeypatch.setattr("cluscomp_export.compression.fit_encode.kmeans", lambda *_, **__: pytest.fail("work was started"))
    with pytest.raises(StorageError) as caught:
        convert(stories_folder, tmp_path / "out.clus", ConversionOptions(bits=4))
    assert caught.value.problems[0].kind == "no_space"


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("broken"), OSError(28, "No space left on device")])
def test_whatever_stops_it_leaves_at_most_finished_work(
    stories_folder: Path, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise error

    output, options = tmp_path / "out.clus", ConversionOptions(bits=4, embedding_bits=8)
    with monkeypatch.context() as patch:
        patch.setattr("cluscomp_export.conversion.compress_source.channel_second_moments", stop)
        with pytest.raises((type(error), ClusCompError)):
            convert(stories_folder, output, options)
    assert list(tmp_path.iterdir()) == []
    with monkeypatch.context() as patch:
        patch.setattr("cluscomp_export.compression.moments.assign_with_feedback", stop)
        with pytest.raises((type(error), ClusCompError)):
            convert(stories_folder, output, options)
    assert list(tmp_path.iterdir()) == [work_path(output)]
    plan = prepare(stories_folder, options).plan
    assert plan is not None
    # Second moments, importance of rows, and the codebooks.
    kept = 2 + len(plan.codebooks)
    assert len(list(work_path(output).iterdir())) == kept
    report = convert(stories_folder, output, options)
    assert report.reused == kept
    assert output.read_bytes() == packed.read_bytes()
    assert list(tmp_path.iterdir()) == [output]


def interrupted(source: Path, output: Path, options: ConversionOptions, monkeypatch: pytest.MonkeyPatch) -> int:
    """Stop a conversion at its tenth matrix; how many units of work it leaves."""
    assign, calls = jobs.assign, itertools.count(1)

    def stop(*arguments: Any, **keywords: Any) -> Any:
        if next(calls) == 10:
            raise KeyboardInterrupt
        return assign(*arguments, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(jobs, "assign", stop)
        with pytest.raises(KeyboardInterrupt):
            convert(source, output, options, force=True)
    return len(list(work_path(output).iterdir()))


def test_work_is_taken_up_with_other_threads_and_not_with_other_options(
    stories_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out.clus"
    options = ConversionOptions(dim=4, clusters=16, threads=1)
    kept = interrupted(stories_folder, output, options, monkeypatch)
    assert kept == 35 + 9
    stages: list[str] = []
    report = convert(
        stories_folder, output, replace(options, threads=2), on_progress=lambda stage, done, total: stages.append(stage)
    )
    assert report.reused == kept
    assert f"resuming with {kept} finished units" in stages
    for changed in ({"seed": 1}, {"clusters": 8}, {"calibration": str(stories_folder.with_suffix(".txt"))}):
        output.unlink()
        interrupted(stories_folder, output, options, monkeypatch)
        report = convert(stories_folder, output, replace(options, **changed))  # type: ignore[arg-type]
        assert report.reused == 0
        assert any("discarded" in warning for warning in report.warnings)
        assert list(tmp_path.iterdir()) == [output]


@pytest.mark.parametrize(
    "fault",
    [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), MemoryError("Unable to allocate 2 GiB")],
)
def test_memory_that_runs_out_is_an_error_with_a_remedy_and_the_work_is_kept(
    fault: Exception, stories_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_out(*_: object, **__: object) -> None:
        raise fault

    output, options = tmp_path / "out.clus", ConversionOptions(bits=3, effort="fast", recovery_steps=1)
    with monkeypatch.context() as patch:
        patch.setattr("cluscomp_export.conversion.compress_source.recover", run_out)
        with pytest.raises(UnsupportedError, match=r"free memory(?s:.*)run it again") as caught:
            convert(stories_folder, output, options)
    assert caught.value.problems[0].kind == "out_of_memory"
    assert caught.value.problems[0].found == str(fault)
    assert not output.exists()
    assert convert(stories_folder, output, options).reused > 40


def test_recovery_is_where_the_device_says(stories_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No GPU is needed to see it: torch tells "cpu:0" from "cpu", and computes on both."""
    places: set[torch.device] = set()

    def run(training: Training) -> None:
        assert isinstance(training.loss, PredictionLoss)
        assert training.loss.teacher is not None
        places.update((training.loss.student.device, training.loss.teacher.device))
        raise KeyboardInterrupt

    monkeypatch.setattr(Training, "run", run)
    options = ConversionOptions(bits=3, effort="fast", recovery_steps=1, device="cpu:0")
    with pytest.raises(KeyboardInterrupt):
        convert(stories_folder, tmp_path / "out.clus", options)
    assert places == {torch.device("cpu:0")}


def test_work_on_another_source_is_not_taken_up(stories_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, output = tmp_path / "source", tmp_path / "out.clus"
    shutil.copytree(stories_folder, source)
    options = ConversionOptions(dim=4, clusters=16)
    interrupted(source, output, options, monkeypatch)
    tensors = load_file(source / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, source / "model.safetensors")
    assert convert(source, output, options).reused == 0


def test_work_that_outlived_its_output_is_removed(
    stories_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, options = tmp_path / "out.clus", ConversionOptions(dim=4, clusters=16)
    with monkeypatch.context() as patch:
        patch.setattr("cluscomp_export.work_folder.WorkFolder.remove", lambda _: None)
        convert(stories_folder, output, options)
    assert work_path(output).exists()
    with pytest.raises(OutputExistsError):
        convert(stories_folder, output, options)
    assert list(tmp_path.iterdir()) == [output]
    # Work on a replacement is not of this output.
    interrupted(stories_folder, output, replace(options, seed=1), monkeypatch)
    with pytest.raises(OutputExistsError):
        convert(stories_folder, output, options)
    assert work_path(output).exists()


def test_a_second_conversion_to_the_same_output_is_refused(stories_folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.clus"
    with work_folder(output), pytest.raises(StorageError) as caught:
        convert(stories_folder, output, ConversionOptions(dim=4, clusters=16))
    assert caught.value.problems[0].kind == "busy"


def with_a_nan_norm(source: Path, folder: Path) -> Path:
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.input_layernorm.weight"][3] = np.nan
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_nothing_is_measured_on_a_source_with_a_nan_norm(stories_folder: Path, tmp_path: Path) -> None:
    source = with_a_nan_norm(stories_folder, tmp_path / "source")
    with pytest.raises(InvalidFileError, match="NaN or infinity") as caught:
        prepare(source, ConversionOptions(bits=4, sensitivity="measured"), to_plan=True)
    assert caught.value.problems[0].tensor == "model.layers.1.input_layernorm.weight"


def test_an_artefact_with_a_nan_norm_is_not_passed_on(packed: Path, tmp_path: Path) -> None:
    """Of whatever architecture: no self-test is needed to see it."""
    model = open_packed(packed)
    name = "model.layers.1.input_layernorm.weight"
    values = model.tensors[name].decode().copy()
    values[3] = np.inf
    tensors = {**model.tensors, name: DenseTensor(name, Array.of(values))}
    faulty = tmp_path / "faulty.clus"
    write_packed(replace(model, config={"model_type": "unknown"}, tensors=tensors, claimed_digest=None, self_test=None), faulty)
    with pytest.raises(InvalidFileError, match="NaN or infinity") as caught:
        convert(faulty, tmp_path / "out", ConversionOptions(to="hf"))
    assert (caught.value.problems[0].file, caught.value.problems[0].tensor) == (str(faulty), name)
    assert list(tmp_path.iterdir()) == [faulty]
