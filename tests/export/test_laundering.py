"""An artefact that contradicts its own digest or self-test does not become one that says nothing of it."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluscomp_export.conversion.convert import ConversionOptions, convert
from cluscomp_export.conversion.merge import merge
from cluscomp_export.conversion.output_format import output_format
from cluscomp_formats.delta import Delta, write_delta
from cluscomp_formats.errors import ClusCompError, InvalidFileError, SelfTestError
from cluscomp_formats.ir import Array, Model, Stage
from cluscomp_formats.packed import open_packed, write_packed
from cluscomp_formats.parameters import norm_name, parameters
from cluscomp_formats.progress import silent

WRITERS = [("packed", None), ("hf", None), ("gguf", None), ("onnx", None), ("gguf", "q8_0")]
NORM = norm_name("model.norm.weight")


@pytest.fixture(scope="module")
def artefact(stories_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("artefact") / "stories.clus"
    options = ConversionOptions(dim=8, clusters=16, effort="fast", threads=1)
    convert(stories_folder, output, options)
    return output


def with_other_codes(model: Model) -> Model:
    """What a file holds whose content is not what its digest says."""
    weight = next(iter(model.clustered.values()))
    stages = tuple(Stage(stage.codebook, Array.of(np.zeros(stage.codes.shape, np.uint16))) for stage in weight.stages)
    return replace(model, tensors={**model.tensors, weight.name: replace(weight, stages=stages)})


@pytest.mark.parametrize(("to", "gguf_type"), WRITERS)
def test_no_writer_takes_content_that_is_not_what_its_digest_says(
    to: str, gguf_type: str | None, artefact: Path, tmp_path: Path
) -> None:
    fmt = output_format(to, gguf_type)
    output = tmp_path / "out"
    with pytest.raises(InvalidFileError) as caught:
        fmt.write(with_other_codes(open_packed(artefact)), output, force=False, self_test=None, on_progress=silent)
    assert caught.value.problems[0].kind == "digest_mismatch"
    assert list(tmp_path.iterdir()) == []


def test_the_error_names_the_source(artefact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file whose digest is another's, for whatever reason: it has no record that would tell first."""
    damaged = replace(with_other_codes(open_packed(artefact)), self_test=None)
    monkeypatch.setattr("cluscomp_export.conversion.prepare.open_source", lambda *_, **__: damaged)
    with pytest.raises(InvalidFileError, match="does not match the digest") as caught:
        convert(artefact, tmp_path / "out.clus", ConversionOptions())
    assert caught.value.problems[0].file == str(artefact)
    assert list(tmp_path.iterdir()) == []


def other_logits(record: dict[str, Any]) -> None:
    record["sequences"][0]["top_logits"][0][0] += 1.0


def wide_tolerances(record: dict[str, Any]) -> None:
    record["tolerance"] = {name: 100 * value for name, value in record["tolerance"].items()}


@pytest.mark.parametrize("forge", [other_logits, wide_tolerances])
@pytest.mark.parametrize(("to", "gguf_type"), [("hf", None), ("gguf", "q8_0")])
def test_what_fails_its_self_test_is_not_converted(
    to: str, gguf_type: str | None, forge: Callable[[dict[str, Any]], None], artefact: Path, tmp_path: Path
) -> None:
    model = open_packed(artefact)
    record = copy.deepcopy(dict(model.self_test or {}))
    forge(record)
    failing = tmp_path / "failing.clus"
    write_packed(replace(model, self_test=record), failing)
    with pytest.raises(SelfTestError) as caught:
        convert(failing, tmp_path / "out", ConversionOptions(to=to, gguf_type=gguf_type))
    assert (caught.value.exit_code, caught.value.problems[0].file) == (7, str(failing))
    assert list(tmp_path.iterdir()) == [failing]


def test_what_fails_its_self_test_is_not_merged_into(artefact: Path, tmp_path: Path) -> None:
    model = open_packed(artefact)
    record = copy.deepcopy(dict(model.self_test or {}))
    other_logits(record)
    failing, delta = tmp_path / "failing.clus", tmp_path / "my.delta"
    write_packed(replace(model, self_test=record), failing)
    digest = model.digest()
    write_delta(Delta(digest, digest, {NORM: parameters(model)[NORM]}, {}), delta)
    merge(artefact, [delta], tmp_path / "sound.clus")
    with pytest.raises(SelfTestError):
        merge(failing, [delta], tmp_path / "out.clus")
    assert not (tmp_path / "out.clus").exists()


def test_a_record_that_is_malformed_is_an_error_of_the_file(artefact: Path, tmp_path: Path) -> None:
    model = open_packed(artefact)
    record = json.loads(json.dumps(model.self_test))
    record["tolerance"] = dict.fromkeys(record["tolerance"], 1e299)
    failing = tmp_path / "failing.clus"
    write_packed(replace(model, self_test=record), failing)
    with pytest.raises(ClusCompError, match=r"tolerance\.float32 is malformed") as caught:
        convert(failing, tmp_path / "out", ConversionOptions(to="hf"))
    assert caught.value.exit_code == 3


def test_a_record_that_cannot_be_run_is_copied_and_said_so(artefact: Path, tmp_path: Path) -> None:
    model = open_packed(artefact)
    unknown = tmp_path / "unknown.clus"
    write_packed(replace(model, config={**model.config, "model_type": "unknown"}, claimed_digest=None), unknown)
    report = convert(unknown, tmp_path / "out", ConversionOptions(to="hf"))
    assert any("self-test was not run" in warning for warning in report.warnings)
    assert report.self_test
