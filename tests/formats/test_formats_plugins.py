"""Formats of installed plug-ins, in separate processes."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from cluscomp_formats.format import Format
from cluscomp_formats.registry import BUILTIN

OURS = list(BUILTIN)
PAGE = Path(__file__).parents[2] / "docs" / "plugins.md"


def install(site: Path, distribution: str, module: str, code: str, entries: dict[str, str]) -> None:
    """Create the metadata that pip installs for a package with these entry points."""
    (site / f"{module}.py").write_text(code, encoding="utf-8")
    metadata = site / f"{module}-1.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
    lines = [f"{name} = {target}" for name, target in entries.items()]
    (metadata / "entry_points.txt").write_text("\n".join(["[cluscomp_formats]", *lines, ""]))


def python(site: Path, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([str(site), *(path for path in sys.path if path)])
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        encoding="utf-8",
        env={**os.environ, "PYTHONPATH": paths, **environment},
    )


def command(site: Path, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return python(site, "-c", "from cluscomp_export.cli.main import main; main()", *arguments, **environment)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the plug-in of the documentation is installed."""
    folder = tmp_path_factory.mktemp("site")
    page = PAGE.read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    ((entry, target),) = re.findall(r"^\[project\.entry-points\.cluscomp_formats\]\n(\w+) = \"(.*)\"$", page, re.MULTILINE)
    install(folder, "cluscomp-boxed", "cluscomp_boxed", code, {entry: target})
    return folder


@pytest.fixture(scope="module")
def boxed(site: Path, stories_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("boxed") / "model"
    done = command(site, "convert", stories_folder, output, "--to", "boxed", "--dim", 4, "--clusters", 64)
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(path.name for path in output.iterdir()) == ["label.txt", "model.clus"]
    return output


def test_the_commands_know_it(site: Path, boxed: Path, stories_folder: Path, tmp_path: Path) -> None:
    report = json.loads(command(site, "inspect", boxed, "--json").stdout)
    assert (report["format"], report["self_test"]) == ("boxed", True)
    assert report["file_bytes"] == sum(path.stat().st_size for path in boxed.iterdir())
    assert command(site, "convert", boxed, tmp_path / "packed.clus").returncode == 0
    assert command(site, "verify", boxed, tmp_path / "packed.clus").stdout.endswith("EQUAL\n")
    assert "boxed: a folder with a label" in command(site, "inspect", PAGE).stderr


def test_the_runtime_loads_it(site: Path, boxed: Path) -> None:
    code = "import sys, cluscomp_runtime; print(cluscomp_runtime.load(sys.argv[1], selftest=True).kernel_summary)"
    done = python(site, "-c", code, boxed)
    assert (done.returncode, done.stderr) == (0, "")
    assert "matrices" in done.stdout


def test_its_output_is_checked_before_the_work(site: Path, boxed: Path, stories_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").touch()
    for output, force in ((boxed, ()), (tmp_path, ("--force",))):
        assert command(site, "convert", stories_folder, output, "--to", "boxed", *force).returncode == 5
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_help_and_tab_completion_offer_it(site: Path) -> None:
    assert f"[{'|'.join([*OURS, 'boxed'])}]" in command(site, "convert", "--help").stdout
    words = {"_CLUSCOMP_EXPORT_COMPLETE": "bash_complete", "COMP_WORDS": "cluscomp-export convert --to b", "COMP_CWORD": "3"}
    code = "import sys; sys.argv[0] = 'cluscomp-export'; from cluscomp_export.cli.main import main; main()"
    assert python(site, "-c", code, **words).stdout == "plain,boxed\n"


def test_without_it_the_name_is_refused(tmp_path: Path, stories_folder: Path) -> None:
    done = command(tmp_path, "convert", stories_folder, tmp_path / "out", "--to", "boxed")
    assert done.returncode == 2
    assert f"'boxed' is not one of {', '.join(OURS)}." in done.stderr


BROKEN = """
from pathlib import Path
from cluscomp_formats.format import Format

def fail(path):
    raise RuntimeError("no idea")

TAKEN = Format("packed", "another", fail, fail)
UNSURE = Format("unsure", "a format that cannot tell", fail, fail)
SOUND = Format("sound", "a format that is only read", lambda path: False, fail)
NUMBER = 7
"""


def test_a_plug_in_that_does_not_work_leaves_the_others_alone(tmp_path: Path, boxed: Path, stories_folder: Path) -> None:
    entries = {"a": "broken:TAKEN", "b": "broken:NUMBER", "c": "broken:MISSING", "d": "not_there:X", "e": "broken:UNSURE"}
    install(tmp_path, "broken-formats", "broken", BROKEN, {**entries, "f": "broken:SOUND"})
    packed = boxed / "model.clus"
    done = command(tmp_path, "inspect", packed, "--json")
    assert done.returncode == 0
    assert json.loads(done.stdout)["format"] == "packed"
    warnings = done.stderr.splitlines()
    for line, name, reason in zip(
        warnings,
        "abcd",
        ("there is already a format called 'packed'", "is a int, not a", "AttributeError", "ModuleNotFoundError"),
        strict=True,
    ):
        assert f"warning: the format plug-in '{name}' of broken-formats is not used" in line
        assert reason in line
        assert line.endswith("update or uninstall broken-formats")
    # It is called only for files that no built-in format recognises.
    done = command(tmp_path, "convert", stories_folder, tmp_path / "out", "--to", "unsure")
    assert f"is not one of {', '.join(OURS)}." in done.stderr
    done = command(tmp_path, "inspect", stories_folder, "--quick")
    assert done.returncode == 0
    assert "the format 'unsure' failed to test" in done.stderr
    code = "from cluscomp_export.conversion.output_format import output_format; output_format('sound')"
    assert "this format can only be read" in python(tmp_path, "-c", code).stderr


def test_nothing_is_looked_for_before_it_is_needed(tmp_path: Path) -> None:
    install(tmp_path, "noisy", "noisy", "print('imported')", {"noisy": "noisy:FORMAT"})
    code = "import cluscomp_runtime, cluscomp_export.cli.main, cluscomp_export.conversion.convert, cluscomp_formats.registry"
    assert python(tmp_path, "-c", code).stdout == ""
    asked = f"{code} as registry; registry.formats(); registry.formats()"
    assert python(tmp_path, "-c", asked).stdout == "imported\n"


def test_the_page_has_every_member_of_a_format() -> None:
    assert re.findall(r"^\| `(\w+)[`(]", PAGE.read_text(encoding="utf-8"), re.MULTILINE) == [
        field.name for field in dataclasses.fields(Format)
    ]
