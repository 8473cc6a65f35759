"""The Python API: its documentation runs, its keywords are the command's flags, its errors name fields."""

from __future__ import annotations

import ast
import doctest
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import click
import pytest

import cluscomp_export
from cluscomp_export import ConversionKeywords, InvalidRequestError, TuneKeywords, convert, plan, tune
from cluscomp_export.cli.main import cli
from cluscomp_export.cli.messages import with_flags
from cluscomp_export.conversion.options import ConversionOptions
from cluscomp_export.training.finetuning import TuneOptions

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "python.md"
DOCUMENTED = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
FLAG = re.compile(r"(^|[\s(`'])--[a-z]")
COMMAND = re.compile(r"cluscomp-export|pip install|^--remove-destination$")
OF_THE_COMMAND = {"as_json", "dry_run", "force", "report_path", "save"}
"""Options that are not part of how to convert or tune."""


def test_the_page_runs(stories_folder: Path, stories_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").symlink_to(stories_folder)
    (tmp_path / "text.txt").symlink_to(stories_text)
    monkeypatch.chdir(tmp_path)
    failed, tried = doctest.testfile(str(PAGE), module_relative=False, optionflags=doctest.ELLIPSIS, encoding="utf-8")
    assert (failed, tried > 20) == (0, True)


def test_the_page_names_every_function() -> None:
    text = PAGE.read_text(encoding="utf-8")
    public = set(cluscomp_export.__all__) - {"Problem", "__version__"}
    assert [name for name in sorted(public) if f"`{name}" not in text] == []


@pytest.mark.parametrize(
    ("command", "keywords"), [("convert", ConversionKeywords), ("plan", ConversionKeywords), ("tune", TuneKeywords)]
)
def test_keywords_are_named_like_flags(command: str, keywords: type) -> None:
    options = {param.name: param for param in cli.commands[command].params if isinstance(param, click.Option)}
    of_the_machine = {"workers", "device"} if command == "plan" else set()
    assert options.keys() - OF_THE_COMMAND == set(keywords.__annotations__) - of_the_machine
    for name in options.keys() - OF_THE_COMMAND:
        assert options[name].opts == [f"--{name.replace('_', '-')}"]


def test_keywords_are_the_fields_of_the_options() -> None:
    assert [field.name for field in fields(TuneOptions)] == list(TuneKeywords.__annotations__)
    assert {field.name for field in fields(ConversionOptions)} == set(ConversionKeywords.__annotations__)


def test_the_library_says_no_flags() -> None:
    """Its messages name fields; whole commands of a shell may be in them."""
    found = []
    for package in ("cluscomp_export", "formats", "kernels", "runtime"):
        for file in (ROOT / package).rglob("*.py"):
            tree = ast.parse(file.read_text(encoding="utf-8"))
            texts = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
            docstrings = {ast.get_docstring(node, clean=False) for node in ast.walk(tree) if isinstance(node, DOCUMENTED)}
            found += [
                (file.name, text)
                for text in texts
                if text not in docstrings and FLAG.search(text) and not COMMAND.search(text) and file.parent.name != "cli"
            ]
    assert found == []


def test_importing_is_cheap() -> None:
    code = "import sys, cluscomp_export.cli.main; sys.exit(bool({'torch', 'transformers', 'onnx'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_unknown_options_are_python_errors(stories_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="bit"):
        convert(stories_folder, tmp_path / "out.clus", bit=3)  # type: ignore[call-arg]
    with pytest.raises(AttributeError, match="no attribute 'transmogrify'"):
        cluscomp_export.transmogrify  # noqa: B018


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 3, "budget": 10**6}, "`bits` and `budget` exclude each other"),
        ({"dim": 4}, "`dim` and `clusters` go together"),
        ({"bits": -1}, "`bits` is out of range"),
        ({"blockwise_lr": -1.0}, "`blockwise_lr` is out of range"),
        ({"effort": "huge"}, "`effort` has no such choice"),
        ({"budget": "much"}, "`budget` is not a size"),
        ({"threads": 0}, "`threads` is out of range"),
        ({"gguf_type": "f16"}, "`gguf_type` needs `to='gguf'`"),
        ({"plan": "plan.json", "share": "kind"}, "`plan` determines `share` already"),
    ],
)
def test_errors_of_conversions_name_the_field(options: ConversionKeywords, message: str, tmp_path: Path) -> None:
    for run in (lambda: plan(tmp_path, **options), lambda: convert(tmp_path, tmp_path.with_suffix(".clus"), **options)):
        with pytest.raises(InvalidRequestError) as caught:
            run()
        assert caught.value.problems[0].message == message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"text": "a", "chat": "b"}, "give either `text` or `chat`"),
        ({}, "give either `text` or `chat`"),
        ({"text": "a", "kl": 0.5}, "`reference` and `kl` go together"),
        ({"text": "a", "lr": -1.0}, "`lr` is out of range"),
        ({"text": "a", "train": ["codes"]}, "`train` names kinds of parameters"),
    ],
)
def test_errors_of_tunings_name_the_field(options: TuneKeywords, message: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        tune(tmp_path / "model.clus", tmp_path / "my.delta", **options)
    assert caught.value.problems[0].message == message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("`match_loss` is out of range", "--match-loss is out of range"),
        ("use `share='none'`, or `dim=4`", "use --share none, or --dim 4"),
        ("pass `force=True`", "pass --force"),
        ("`feedback=False` or `feedback`", "--no-feedback or --feedback"),
        ("`blockwise_lr=0.5`", "--blockwise-lr 0.5"),
        ("`import cluscomp_runtime.hf` and `no_option`", "`import cluscomp_runtime.hf` and `no_option`"),
    ],
)
def test_the_command_line_says_flags(text: str, expected: str) -> None:
    assert with_flags(text) == expected
