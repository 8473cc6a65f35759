"""The tables of docs/onnx-format.md match the code."""

from __future__ import annotations

import re
from pathlib import Path

import onnx
import pytest
from runtime_models import clustered_model, small_config

from cluscomp_export.onnx_graph import build_graph
from cluscomp_formats.onnx import spec
from cluscomp_formats.onnx.functions import FUNCTION_TEXTS, functions
from cluscomp_formats.onnx.writer import write_onnx

TEXT = (Path(__file__).parents[2] / "docs" / "onnx-format.md").read_text(encoding="utf-8")
PROSE = " ".join(TEXT.split())


def rows(*headings: str) -> list[list[str]]:
    """Return the rows of the table with these columns."""
    lines = TEXT.splitlines()
    found = []
    for line in lines[lines.index(f"| {' | '.join(headings)} |") + 2 :]:
        if not line.startswith("|"):
            break
        found.append([cell.strip() for cell in line.strip("|").split("|")])
    return found


def words(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def test_functions() -> None:
    blocks = [block.strip() for block in TEXT.split("```")[1::2]]
    assert [text.strip() for text in FUNCTION_TEXTS.values()] == [
        block for block in blocks if block.split()[0] in FUNCTION_TEXTS
    ]


def test_operators() -> None:
    stated = {
        words(name)[0]: words(attributes)
        for name, _, attributes, _ in rows("operator", "inputs", "attributes (int)", "computes")
    }
    assert stated == {name: list(function.attribute) for name, function in functions().items()}


def test_functions_import_what_the_model_does() -> None:
    for name, function in functions().items():
        assert (function.domain, function.name) == (spec.DOMAIN, name)
        assert [(entry.domain, entry.version) for entry in function.opset_import] == [("", spec.OPSET)]
    assert f"ONNX's operators in version {spec.OPSET} and `{spec.DOMAIN}` {spec.DOMAIN_VERSION}" in PROSE


def test_metadata() -> None:
    stated = rows("key", "value")
    required = [words(key)[0] for key, _ in stated if not key.startswith("*")]
    assert required == [spec.METADATA_PREFIX + key for key in spec.METADATA_KEYS]
    optional = [words(key)[0] for key, _ in stated if key.startswith("*")]
    assert optional == [spec.METADATA_PREFIX + key for key in spec.OPTIONAL_METADATA_KEYS]


def test_element_types() -> None:
    assert {words(dtype)[0]: int(number) for dtype, number in rows("dtype", "ONNX element type")} == spec.ELEMENT_TYPES
    assert spec.ELEMENT_TYPES["bfloat16"] == onnx.TensorProto.BFLOAT16
    for dtype, number in spec.ELEMENT_TYPES.items():
        if dtype != "bfloat16":
            assert onnx.helper.tensor_dtype_to_np_dtype(number).name == dtype


def test_files_and_limits() -> None:
    named = [words(file)[0] for file, _ in rows("file", "content") if words(file)]
    assert named == [f"{spec.SUBFOLDER}/{spec.MODEL_FILE}", f"{spec.SUBFOLDER}/{spec.DATA_FILE}", spec.CONFIG]
    assert f"At most {spec.MAX_MODEL_BYTES} bytes" in TEXT
    assert (spec.data_offset(65, spec.PAGE), spec.data_offset(65, spec.PAGE - 1)) == (spec.PAGE, 128)
    assert f"One of {spec.PAGE} bytes or more" in PROSE


def test_inputs_and_outputs(tmp_path: Path) -> None:
    model = clustered_model(small_config())
    write_onnx(model, tmp_path / "model", build_graph(model))
    graph = onnx.load(tmp_path / "model" / spec.SUBFOLDER / spec.MODEL_FILE, load_external_data=False).graph
    stated = {name for names, _, _ in rows("name", "type", "shape") for name in words(names)[:1]}
    found = {re.sub(r"\.\d+\.", ".N.", value.name) for value in (*graph.input, *graph.output)}
    assert {name for name in found if not name.endswith(".value")} == stated


def test_the_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = clustered_model(small_config())
    write_onnx(model, tmp_path / "model-folder", build_graph(model))
    monkeypatch.chdir(tmp_path)
    code = next(block for block in TEXT.split("```") if block.startswith("python\n"))
    scope: dict[str, object] = {}
    exec(code.removeprefix("python\n"), scope)  # noqa: S102
    assert scope["logits"].shape == (1, 3, 97)  # type: ignore[attr-defined]
