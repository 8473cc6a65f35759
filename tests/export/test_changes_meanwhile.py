"""What changes, appears or goes away while a conversion runs is told, or does not matter; nothing of it is a traceback."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from cluscomp_export.conversion.convert import ConversionOptions, convert
from cluscomp_export.work_folder import work_path
from cluscomp_formats.errors import ClusCompError, InvalidFileError, OutputExistsError, StorageError

pytestmark = pytest.mark.skipif(os.name != "posix", reason="open files cannot be removed elsewhere")

OPTIONS = ConversionOptions(dim=4, clusters=16)


@pytest.fixture
def source(stories_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(stories_folder, tmp_path / "source"))


def convert_while(source: Path, output: Path, change: Callable[[], None]) -> None:
    """Convert, with the change as soon as the source has been checked."""
    changed = False

    def on_progress(stage: str, done: int, total: int) -> None:
        nonlocal changed
        if stage == "checking the source" and done == total and not changed:
            changed = True
            change()

    convert(source, output, OPTIONS, on_progress=on_progress)
    assert changed


def touch_weights(source: Path) -> None:
    os.utime(source / "model.safetensors", ns=(0, 0))


def shorter_weights(source: Path) -> None:
    # Not cut in place: what is mapped at that moment ends the process when it is touched.
    content = (source / "model.safetensors").read_bytes()
    (source / "model.safetensors").unlink()
    (source / "model.safetensors").write_bytes(content[:5000])


def weights_to_pipe(source: Path) -> None:
    (source / "model.safetensors").unlink()
    os.mkfifo(source / "model.safetensors")


def remove(source: Path) -> None:
    shutil.rmtree(source)


@pytest.mark.parametrize("change", [touch_weights, shorter_weights, weights_to_pipe, remove])
def test_weights(change: Callable[[Path], None], source: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidFileError, match="changed or deleted") as caught:
        convert_while(source, tmp_path / "out", lambda: change(source))
    assert caught.value.problems[0].file == str(source / "model.safetensors")
    assert not (tmp_path / "out").exists()


def test_side_files_do_not_matter_any_more(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "wanted", OPTIONS)

    def change() -> None:
        (source / "tokenizer.json").write_text("{}")
        (source / "tokenizer_config.json").unlink()
        (source / "config.json").unlink()

    convert_while(source, tmp_path / "out", change)
    assert (tmp_path / "out").read_bytes() == (tmp_path / "wanted").read_bytes()


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda path: path.write_text("theirs"), OutputExistsError),
        (lambda path: path.mkdir(), OutputExistsError),
        (os.mkfifo, OutputExistsError),
        (lambda path: path.symlink_to("nowhere"), OutputExistsError),
        (lambda path: shutil.rmtree(work_path(path)), StorageError),
        (lambda path: (shutil.rmtree(work_path(path)), work_path(path).write_text("theirs")), StorageError),
        (lambda path: shutil.rmtree(path.parent), StorageError),
    ],
    ids=["file", "folder", "pipe", "link", "no work folder", "a file for it", "no folder"],
)
def test_around_the_output(make: Callable[[Path], object], error: type[ClusCompError], source: Path, tmp_path: Path) -> None:
    output = tmp_path / "made" / "out"
    output.parent.mkdir()
    with pytest.raises(error):
        convert_while(source, output, lambda: make(output))
    if output.parent.exists():
        assert not list(output.parent.glob("*.part"))
