"""Every format to every other: the digest stays, the model runs, and verify says so."""

from __future__ import annotations

import itertools
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from folder_contents import contents
from reference_checkpoints import llama, make_reference

from cluscomp_export.conversion.convert import ConversionOptions, convert
from cluscomp_export.inspection.inspect import inspect_model
from cluscomp_export.inspection.verify import verify
from cluscomp_export.sources import open_source
from cluscomp_formats.errors import ClusCompError, InvalidRequestError, OutputExistsError
from cluscomp_runtime import load

FORMATS = ("packed", "hf", "gguf", "onnx")


@pytest.fixture(scope="module")
def artefacts(stories_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same model in every format, each made from the source."""
    folder = tmp_path_factory.mktemp("artefacts")
    made = {name: folder / name for name in FORMATS}
    for name, path in made.items():
        convert(stories_folder, path, ConversionOptions(bits=3, embedding_bits=6, to=name))
    return made


def test_every_format_holds_the_same_model(artefacts: dict[str, Path]) -> None:
    models = {name: open_source(path) for name, path in artefacts.items()}
    assert len({model.digest() for model in models.values()}) == 1
    first = models["packed"]
    for model in models.values():
        assert model.provenance == first.provenance
        assert model.self_test == first.self_test
        assert {name: array.read().tobytes() for name, array in model.files.items()} == {
            name: array.read().tobytes() for name, array in first.files.items()
        }


@pytest.mark.parametrize("target", FORMATS)
@pytest.mark.parametrize("source", FORMATS)
def test_every_pair_keeps_every_byte(artefacts: dict[str, Path], tmp_path: Path, source: str, target: str) -> None:
    output = tmp_path / "out"
    convert(artefacts[source], output, ConversionOptions(to=target))
    assert contents(output) == contents(artefacts[target])


@pytest.mark.smollm2
def test_every_pair_keeps_every_byte_of_smollm2(
    smollm2_three_blocks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = {name: tmp_path / name for name in FORMATS}
    # A few clusters, and no calibration: what is under test is the formats, not the quality.
    convert(smollm2_three_blocks, made["packed"], ConversionOptions(dim=4, clusters=64, share="kind"))
    for name in FORMATS[1:]:
        convert(made["packed"], made[name], ConversionOptions(to=name))
    expected = {name: contents(path) for name, path in made.items()}
    # Each of these is the same model, which has just passed.
    monkeypatch.setattr("cluscomp_export.conversion.convert.run_own_self_test", lambda *_: [])
    for source, target in itertools.product(FORMATS[1:], FORMATS):
        output = tmp_path / f"{target} of {source}"
        convert(made[source], output, ConversionOptions(to=target))
        assert contents(output) == expected[target], (source, target)
        shutil.rmtree(output) if output.is_dir() else output.unlink()


@pytest.mark.parametrize("target", FORMATS)
def test_a_checkpoint_of_the_authors_goes_to_every_format(tmp_path: Path, target: str) -> None:
    source = tmp_path / "reference"
    make_reference(source, llama(), 40, 3, torch.bfloat16)
    convert(source, tmp_path / "out", ConversionOptions(to=target))
    assert open_source(tmp_path / "out").digest() == open_source(source).digest()
    assert verify(source, tmp_path / "out").verdict == "equal"


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_runs_and_passes_its_self_test(artefacts: dict[str, Path], name: str) -> None:
    model = load(artefacts[name], selftest=True)
    expected = load(artefacts["packed"]).generate("Once upon a time", max_new_tokens=20)
    assert model.generate("Once upon a time", max_new_tokens=20).token_ids == expected.token_ids


@pytest.mark.parametrize("name", FORMATS)
def test_verify_and_inspect_know_every_format(stories_folder: Path, artefacts: dict[str, Path], name: str) -> None:
    assert verify(artefacts["packed"], artefacts[name]).verdict == "equal"
    assert verify(stories_folder, artefacts[name]).verdict == "derived"
    report, expected = (inspect_model(artefacts[one], reference=stories_folder) for one in (name, "packed"))
    assert report.format == name
    assert report.problems == []
    # The bits of the whole file are those of its format.
    alike = {**report.bits_per_weight, "file": expected.bits_per_weight["file"]}
    same_file = {"format": expected.format, "file": expected.file, "file_bytes": expected.file_bytes}
    assert replace(report, **same_file, bits_per_weight=alike) == expected


def test_inspect_and_verify_find_damage_that_no_checksum_covers(artefacts: dict[str, Path], tmp_path: Path) -> None:
    """A Hugging Face folder has no checksum per array, only the digest of all."""
    folder = tmp_path / "folder"
    convert(artefacts["packed"], folder, ConversionOptions(to="hf"))
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    report = inspect_model(folder)
    assert ([problem["kind"] for problem in report.problems], report.exit_code) == (["digest_mismatch"], 3)
    result = verify(folder, artefacts["packed"])
    assert result.exit_code == 1
    assert f"{folder} is not what its own digest says: it is damaged" in result.reasons


def test_a_dense_gguf_holds_the_decoded_weights(artefacts: dict[str, Path], tmp_path: Path) -> None:
    output = tmp_path / "dense.gguf"
    report = convert(artefacts["packed"], output, ConversionOptions(to="gguf", gguf_type="f32"))
    assert report.digest is None
    dense, clustered = open_source(output), open_source(artefacts["packed"])
    assert dense.tensors.keys() == clustered.tensors.keys()
    for name, tensor in clustered.tensors.items():
        assert (dense.tensors[name].decode() == tensor.decode()).all()


def test_a_gguf_type_needs_the_gguf_format(artefacts: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match="`to='gguf'`"):
        convert(artefacts["packed"], tmp_path / "out", ConversionOptions(gguf_type="f16"))


def test_a_folder_with_other_things_in_it_is_never_replaced(artefacts: dict[str, Path], tmp_path: Path) -> None:
    precious = tmp_path / "folder"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years of work")
    for force in (False, True):
        with pytest.raises(ClusCompError) as caught:
            convert(artefacts["packed"], precious, ConversionOptions(to="hf"), force=force)
        assert isinstance(caught.value, OutputExistsError)
    assert (precious / "thesis.txt").read_text() == "years of work"
