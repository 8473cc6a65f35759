"""What killed writers leave is cleared away; what living ones make, and everything else, is not touched."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cluscomp_formats.atomic import atomic_write
from cluscomp_formats.atomic_folder import atomic_folder
from cluscomp_formats.errors import StorageError
from cluscomp_formats.leftovers import clear_leftovers, held, old_name, unfinished_name

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs locks that end with their process")


def make_folder(path: Path, content: str = "x") -> Path:
    path.mkdir()
    (path / "file").write_text(content)
    return path


def test_files_and_folders_of_dead_writers_go_whatever_their_process_was(tmp_path: Path) -> None:
    output = tmp_path / "m.clus"
    (tmp_path / ".m.clus.1.part").write_text("x")
    unfinished_name(output).write_text("of a process that had our id")
    make_folder(tmp_path / ".m.clus.77.part")
    clear_leftovers(output)
    assert list(tmp_path.iterdir()) == []


def test_what_a_living_writer_makes_stays(tmp_path: Path) -> None:
    for name in (".m.5.part", ".m.6.old"):
        with held(make_folder(tmp_path / name)):
            clear_leftovers(tmp_path / "m")
            assert (tmp_path / name / "file").exists()
    with pytest.raises(StorageError), atomic_write(tmp_path / "n"), atomic_write(tmp_path / "n"):
        pytest.fail("two writers share a temporary file")
    with atomic_write(tmp_path / "n") as stream:
        clear_leftovers(tmp_path / "n")
        stream.write(b"whole")
    assert (tmp_path / "n").read_bytes() == b"whole"


@pytest.mark.parametrize(
    "name", [".m.part", ".m.x.part", ".m.1.part.bak", "m.1.part", ".mm.1.part", ".m.1.2.part", ".m.-1.part", ".m.\u0661.part"]
)
def test_other_names_stay(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine")
    clear_leftovers(tmp_path / "m")
    assert (tmp_path / name).read_text() == "mine"


def test_links_and_pipes_stay(tmp_path: Path) -> None:
    make_folder(tmp_path / "precious")
    (tmp_path / ".m.1.part").symlink_to(tmp_path / "precious")
    (tmp_path / ".m.2.part").symlink_to(tmp_path / "precious" / "file")
    clear_leftovers(tmp_path / "m")
    assert (tmp_path / "precious" / "file").exists()
    assert (tmp_path / ".m.1.part").is_symlink()


def test_a_folder_that_had_stepped_aside_gets_its_name_back(tmp_path: Path) -> None:
    make_folder(tmp_path / ".m.12.old", "the old model")
    make_folder(tmp_path / ".m.12.part", "the new one, unfinished perhaps")
    clear_leftovers(tmp_path / "m")
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
    assert (tmp_path / "m" / "file").read_text() == "the old model"


def test_a_folder_that_has_been_replaced_goes(tmp_path: Path) -> None:
    make_folder(tmp_path / "m", "new")
    make_folder(tmp_path / ".m.12.old")
    make_folder(tmp_path / ".m.12.part")
    clear_leftovers(tmp_path / "m")
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
    assert (tmp_path / "m" / "file").read_text() == "new"


def test_a_folder_aside_is_whole_whenever_it_has_that_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deleted: list[str] = []
    monkeypatch.setattr("shutil.rmtree", lambda path, **_: deleted.append(path.name))
    make_folder(tmp_path / "m")
    with atomic_folder(tmp_path / "m", force=True, replaceable=lambda _: True) as temporary:
        (temporary / "file").write_text("new")
    assert deleted
    assert set(deleted) == {unfinished_name(tmp_path / "m").name}
    assert not old_name(tmp_path / "m").exists()


@pytest.mark.parametrize("raised", [KeyboardInterrupt(), OSError(5, "Input/output error")])
def test_a_replacement_that_fails_half_way_puts_the_old_folder_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, raised: BaseException
) -> None:
    make_folder(tmp_path / "m", "old")
    rename = Path.rename

    def fail(self: Path, target: Path) -> Path:
        if self.name.endswith(".part"):
            raise raised
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with (
        pytest.raises((KeyboardInterrupt, StorageError)),
        atomic_folder(tmp_path / "m", force=True, replaceable=lambda _: True) as temporary,
    ):
        (temporary / "file").write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
    assert (tmp_path / "m" / "file").read_text() == "old"
