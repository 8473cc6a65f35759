"""Model folders from strangers: what lies in the place of a file is looked at, and no file comes from outside the folder."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from hostile_paths import place
from hub_cache import hub_cache

from cluscomp_export.sources import open_source
from cluscomp_export.sources.checkpoint import CONFIG, INDEX
from cluscomp_export.sources.side_files import SIDE_FILES
from cluscomp_formats.errors import InvalidFileError
from cluscomp_formats.files import side_files

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs pipes and links")

WEIGHTS = "model.safetensors"


@pytest.fixture
def folder(stories_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(stories_folder, tmp_path / "model"))


def found(folder: Path) -> set[tuple[str, str]]:
    """Kinds of the problems, and the names of the files they are about."""
    with pytest.raises(InvalidFileError) as caught:
        open_source(folder)
    return {(problem.kind, Path(problem.file or "").name) for problem in caught.value.problems}


@pytest.mark.parametrize("name", [CONFIG, INDEX, WEIGHTS, *SIDE_FILES])
@pytest.mark.parametrize(
    ("what", "kind"),
    [("folder", "is_folder"), ("pipe", "not_a_file"), ("dangling link", "missing"), ("sparse file", "file_too_long")],
)
def test_in_the_place_of_a_file(folder: Path, name: str, what: str, kind: str) -> None:
    (folder / name).unlink(missing_ok=True)
    if name == INDEX:
        (folder / WEIGHTS).unlink()
    place(folder / name, what)
    if (name, what) == (WEIGHTS, "sparse file"):
        kind = "bad_json"
    assert (kind, name) in found(folder)


def test_every_side_file_that_is_none_is_told_at_once(folder: Path) -> None:
    for name in SIDE_FILES:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)
    assert found(folder) == {("not_a_file", name) for name in SIDE_FILES}


@pytest.mark.parametrize("name", [CONFIG, INDEX, *SIDE_FILES])
def test_a_link_to_a_file_of_the_user_is_refused(folder: Path, name: str) -> None:
    private = folder.parent / "private"
    private.write_text("{}")
    (folder / name).unlink(missing_ok=True)
    if name == INDEX:
        (folder / WEIGHTS).unlink()
    (folder / name).symlink_to(private)
    assert ("foreign_link", name) in found(folder)


def test_weights_may_lie_elsewhere(folder: Path) -> None:
    shutil.move(folder / WEIGHTS, folder.parent / "large disk")
    (folder / WEIGHTS).symlink_to(folder.parent / "large disk")
    assert open_source(folder).files.keys() >= {"tokenizer.json"}


def test_links_within_the_folder_and_to_it_are_followed(folder: Path) -> None:
    (folder / "tokenizer.json").rename(folder / "another name")
    (folder / "tokenizer.json").symlink_to("another name")
    (folder.parent / "link").symlink_to(folder)
    assert "tokenizer.json" in open_source(folder.parent / "link").files


def test_the_cache_of_the_hub(folder: Path, stories_folder: Path) -> None:
    repository = folder.parent / "models--owner--name"
    snapshot = hub_cache(folder, repository)
    assert open_source(snapshot).digest() == open_source(stories_folder).digest()
    # Blobs of this model only.
    other = folder.parent / "models--owner--other" / "blobs"
    other.mkdir(parents=True)
    (other / "secret").write_text("{}")
    (snapshot / "merges.txt").symlink_to(other / "secret")
    assert found(snapshot) == {("foreign_link", "merges.txt")}


def test_side_files_are_what_they_were_when_the_model_was_opened(folder: Path) -> None:
    model = open_source(folder)
    before = (folder / "tokenizer.json").read_bytes()
    (folder / "tokenizer.json").write_text("{}")
    assert model.files["tokenizer.json"].read().tobytes() == before
    (folder / "tokenizer.json").unlink()
    assert model.files["tokenizer.json"].read().tobytes() == before


def test_side_files_are_bounded_together_too(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sparse files take no space on the disk, however many there are."""
    total = sum(array.nbytes for array in open_source(folder).files.values())
    monkeypatch.setattr(side_files, "MAX_SIDE_FILES_BYTES", total)
    open_source(folder)
    (folder / "vocab.json").write_text("{}")
    assert found(folder) == {("file_too_long", "vocab.json")}
