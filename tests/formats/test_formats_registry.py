"""The registry of formats, and the modules that importing the formats imports."""

import os
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from cluscomp_export.conversion.output_format import output_formats
from cluscomp_formats import packed, registry
from cluscomp_formats.errors import InvalidFileError, InvalidRequestError, Problem
from cluscomp_formats.format import Format
from cluscomp_formats.ir import Model
from cluscomp_formats.registry import open_model


@pytest.fixture
def formats(monkeypatch: pytest.MonkeyPatch) -> list[Format]:
    """A registry of two formats that differ in the first byte; the second can be written."""

    def starts_with(letter: bytes) -> Format:
        name = letter.decode()
        return Format(
            name, f"a file of {name}", lambda path: path.read_bytes()[:1] == letter, lambda _: Model({"is": name}, {})
        )

    made = [starts_with(b"b"), replace(starts_with(b"a"), write=packed.write_packed)]
    monkeypatch.setattr(registry, "formats", lambda: tuple(made))
    return made


def test_formats_are_found_by_name(formats: list[Format]) -> None:
    assert registry.find_format("a") is formats[1]
    assert registry.describe_formats() == "b: a file of b; a: a file of a"


def test_a_format_is_found_by_content_not_by_suffix(formats: list[Format], tmp_path: Path) -> None:
    path = tmp_path / "model.b"
    path.write_bytes(b"a...")
    assert registry.detect(path) is formats[1]
    assert registry.open_model(path).config == {"is": "a"}


def test_refusals(formats: list[Format], tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match="b, a"):
        registry.find_format("c")
    path = tmp_path / "other"
    path.write_bytes(b"c")
    assert registry.detect(path) is None
    with pytest.raises(InvalidFileError, match="a: a file of a") as caught:
        registry.open_model(path)
    assert f"cluscomp-export convert {path} model.clus" in str(caught.value)
    with pytest.raises(InvalidFileError, match="no such file"):
        registry.open_model(tmp_path / "nothing")


def test_our_own_formats_need_no_installation() -> None:
    """A source tree has no metadata with entry points."""
    assert registry.find_format("packed").open is packed.open_packed
    builtin = registry.BUILTIN
    assert tuple(fmt.name for fmt in registry.formats()[: len(builtin)]) == builtin
    assert output_formats()[: len(builtin)] == builtin


def test_importing_the_formats_is_light() -> None:
    script = (
        "import sys, cluscomp_formats\ncluscomp_formats.formats()\n"
        "print([name for name in ('torch', 'transformers', 'onnx', 'gguf', 'safetensors') if name in sys.modules])"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, encoding="utf-8", env=environment)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


def test_problems_print_where_what_and_why() -> None:
    problem = Problem("k", "is wrong", "m.clus", "w", "1", "2", "do so")
    assert str(problem) == "m.clus · w: is wrong\n  found: 1\n  expected: 2\n  remedy: do so"
    assert Problem("k", "is wrong").as_dict() == {"kind": "k", "message": "is wrong"}
    assert str(InvalidFileError([problem, Problem("k", "too")])).endswith("do so\ntoo")


def test_the_command_of_a_remedy_can_be_run_wherever_the_model_is(tmp_path: Path) -> None:
    model = tmp_path / "my model"
    model.write_bytes(b"")
    with pytest.raises(InvalidFileError) as caught:
        open_model(model)
    command = (caught.value.problems[0].remedy or "").partition(": ")[2]
    assert shlex.split(command) == ["cluscomp-export", "convert", str(model), "model.clus"]
