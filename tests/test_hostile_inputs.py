"""Whatever lies in the place of an input or output, every command says what is wrong with it: no traceback, no wait, no loss.

A table of things by places. Everything is refused before the work, so all of it runs in this process.
"""

from __future__ import annotations

import os
import shutil
import sys
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hostile_paths import place

from cluscomp_export.cli.main import main
from cluscomp_export.conversion.convert import ConversionOptions, convert
from cluscomp_export.training.finetuning import TuneOptions, tune

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs pipes, devices and links")

Run = Callable[..., tuple[int, str]]

THINGS = ("pipe", "link to a pipe", "socket", "device", "dangling link", "loop", "sparse file", "folder", "nothing")

NAMES = ("a\0b", "n" * 256, "file/below", os.fsdecode(b"\xff\xfe"), " ", "\x1b[31m", "nowhere/at/all")
"""Of which nothing is there, nor can be under some."""

INPUTS = {
    "source": "convert HERE out --dim 4 --clusters 16",
    "source of a plan": "plan HERE",
    "plan": "convert SOURCE out --plan HERE --effort fast --calibration none",
    "calibration": "plan SOURCE --bits 3 --sensitivity measured --calibration HERE",
    "model to inspect": "inspect HERE",
    "reference to inspect": "inspect MODEL --reference HERE",
    "first to verify": "verify HERE MODEL",
    "second to verify": "verify MODEL HERE",
    "delta to verify": "verify MODEL MODEL --delta HERE",
    "model to evaluate": "eval HERE --text TEXT",
    "text": "eval MODEL --text HERE",
    "reference to evaluate": "eval MODEL --text TEXT --reference HERE",
    "delta to evaluate": "eval MODEL --text TEXT --delta HERE",
    "model to generate": "generate HERE words",
    "delta to generate": "generate MODEL words --delta HERE",
    "model to tune": "tune HERE out --text TEXT --steps 1",
    "text to tune on": "tune MODEL out --text HERE --steps 1",
    "chats": "tune MODEL out --chat HERE --steps 1",
    "held out": "tune MODEL out --text TEXT --held-out HERE --steps 1",
    "model to merge": "merge HERE DELTA out",
    "delta to merge": "merge MODEL HERE out",
}

OUTPUTS = {
    "packed": "convert MODEL HERE",
    "hf": "convert MODEL HERE --to hf",
    "gguf": "convert MODEL HERE --to gguf",
    "dense gguf": "convert MODEL HERE --to gguf --gguf-type f16",
    "onnx": "convert MODEL HERE --to onnx",
    "clustered": "convert SOURCE HERE --dim 4 --clusters 16",
    "report": "convert MODEL other --report HERE",
    "plan": "plan SOURCE --save HERE",
    "evaluation": "eval MODEL --text TEXT --output HERE",
    "delta": "tune MODEL HERE --text TEXT --steps 1",
    "merged": "merge MODEL DELTA HERE",
}


@pytest.fixture(scope="module")
def known(stories_folder: Path, stories_text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the commands in the tables name."""
    folder = tmp_path_factory.mktemp("known")
    convert(stories_folder, folder / "model", ConversionOptions(dim=4, clusters=16))
    options = TuneOptions(text=stories_text, context=16, steps=1, batch=1)
    tune(folder / "model", folder / "delta", options)
    names = {"SOURCE": stories_folder, "TEXT": stories_text, "MODEL": folder / "model", "DELTA": folder / "delta"}
    return {name: str(path) for name, path in names.items()}


@pytest.fixture
def run(known: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Runs a command of the tables, with something in the place of HERE; gives the exit code and what is said."""
    monkeypatch.chdir(tmp_path)

    def call(command: str, here: Path | str, *more: str) -> tuple[int, str]:
        words = [{**known, "HERE": str(here)}.get(word, word) for word in command.split(" ")]
        monkeypatch.setattr(sys, "argv", ["cluscomp-export", *words, *more])
        # Anything else than this is a traceback.
        with pytest.raises(SystemExit) as caught:
            main()
        captured = capsys.readouterr()
        return int(caught.value.code or 0), captured.out + captured.err

    return call


def check_said(said: str, case: str) -> None:
    assert "error:" in said.lower() or "DIFFERENT" in said, case
    bad = {character for character in said if unicodedata.category(character) in ("Cc", "Cs")} - {"\n"}
    assert not bad, case


def things(folder: Path) -> Iterator[tuple[str, Path]]:
    """Everything that may lie somewhere, each in a folder of its own."""
    for number, what in enumerate(THINGS):
        (folder / str(number)).mkdir()
        yield what, place(folder / str(number) / "here", what)
    (folder / "file").write_text("x")
    yield from ((repr(name), folder / name) for name in NAMES)
    empty, noise = folder / "empty", folder / "noise"
    empty.touch()
    noise.write_bytes(bytes(range(256)) * 9)
    yield from (("an empty file", empty), ("noise", noise), ("memory", Path("/proc/self/mem")))


@pytest.mark.parametrize("where", INPUTS)
def test_in_the_place_of_an_input(where: str, run: Run, tmp_path: Path) -> None:
    for what, here in things(tmp_path):
        code, said = run(INPUTS[where], here)
        assert code in (2, 3, 4, 6), (where, what, said)
        check_said(said, f"{where}, {what}")
        assert not (tmp_path / "out").exists(), (where, what)


def state(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Everything below a folder, links not followed: kind, size, and which file it is."""
    found = {}
    for path in folder.rglob("*"):
        status = path.lstat()
        found[str(path)] = (status.st_mode, status.st_size if path.is_file() else 0, status.st_ino)
    return found


@pytest.mark.parametrize("force", [False, True], ids=["", "force"])
@pytest.mark.parametrize("where", OUTPUTS)
def test_in_the_place_of_an_output(where: str, force: bool, run: Run, tmp_path: Path, stories_folder: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis").write_text("years of work")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to("file")
    there = [tmp_path / "full", tmp_path / "link", tmp_path / "file" / "below", tmp_path / "nowhere" / "out"]
    there += [Path("/"), Path(), Path(".."), tmp_path / "a\0b", tmp_path / ("n" * 256), tmp_path / ("n" * 300) / "out"]
    there += [Path("/dev/null"), Path("/proc/out")]
    for number, what in enumerate(("pipe", "socket", "device", "dangling link", "loop")):
        (tmp_path / str(number)).mkdir()
        there.append(place(tmp_path / str(number) / "here", what))
    if where in ("clustered", "plan"):
        there += [stories_folder, stories_folder / "config.json", stories_folder / "new"]
    before = state(tmp_path), state(stories_folder)
    for here in there:
        code, said = run(OUTPUTS[where], here, *(["--force"] if force else []))
        assert code in (2, 5, 6), (where, here, said)
        check_said(said, f"{where}, {here}")
        assert (state(tmp_path), state(stories_folder)) == before, (where, here)


@pytest.mark.parametrize("force", [False, True], ids=["", "force"])
def test_a_report_where_the_output_is(force: bool, run: Run, tmp_path: Path) -> None:
    """Refused before the work: nothing is made."""
    for report in ("out", "./out", str(tmp_path / "out")):
        code, said = run("convert MODEL out --report HERE", report, *(["--force"] if force else []))
        assert code == 2
        assert "two outputs" in said
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("command", "input_file"),
    [("merge MODEL DELTA HERE --force", "DELTA"), ("merge MODEL DELTA HERE --force", "MODEL")]
    + [("tune MODEL HERE --text TEXT --force", name) for name in ("TEXT", "MODEL")]
    + [("eval MODEL --text TEXT --output HERE --force", name) for name in ("TEXT", "MODEL")]
    + [("convert MODEL HERE --force", "MODEL"), ("convert MODEL other --report HERE --force", "MODEL")]
    + [("plan SOURCE --calibration TEXT --bits 3 --save HERE --force", "TEXT")],
)
def test_no_input_is_written_over(command: str, input_file: str, run: Run, known: dict[str, str]) -> None:
    before = Path(known[input_file]).read_bytes()
    code, said = run(command, known[input_file])
    assert code == 2
    assert "one of the inputs" in said
    assert Path(known[input_file]).read_bytes() == before


def test_long_names_and_odd_ones_are_written(run: Run, tmp_path: Path) -> None:
    """What the file system takes is taken: temporary names need not be longer than the output's."""
    commands = ["convert MODEL HERE", "convert MODEL HERE --to hf"]
    for name in ("n" * 255, "\u00e9" * 127, os.fsdecode(b"\xff\xfe"), " "):
        # With a work folder beside it, once.
        for command in [*commands, "convert SOURCE HERE --dim 4 --clusters 16"][: 3 if len(name) == 255 else 2]:
            code, said = run(command, tmp_path / name)
            assert code == 0, said
            assert [path.name for path in tmp_path.iterdir()] == [name]
            shutil.rmtree(tmp_path / name) if (tmp_path / name).is_dir() else (tmp_path / name).unlink()
