"""Temporaries of killed writers are removed; those of running writers, and all other files, are not touched."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from cluscomp_formats.errors import OutputExistsError, StorageError
from cluscomp_formats.files.atomic import atomic_write, check_output
from cluscomp_formats.files.atomic_folder import atomic_folder, check_output_folder
from cluscomp_formats.files.leftovers import SHOWN_BYTES, clear_leftovers, locked, old_name, restore_old_folder, unfinished_name

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs locks that end with their process")


def make_folder(path: Path, content: str = "x") -> Path:
    path.mkdir()
    (path / "file").write_text(content)
    return path


@pytest.fixture
def of_process(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Path], Path], Path, int], Path]:
    """Return the temporary name of another process."""

    def name(made: Callable[[Path], Path], output: Path, process: int) -> Path:
        with monkeypatch.context() as patch:
            patch.setattr(os, "getpid", lambda: process)
            return made(output)

    return name


OfProcess = Callable[[Callable[[Path], Path], Path, int], Path]


def test_files_of_dead_writers_go_whatever_their_process_was(of_process: OfProcess, tmp_path: Path) -> None:
    output = tmp_path / "m.clus"
    of_process(unfinished_name, output, 1).write_text("x")
    unfinished_name(output).write_text("of a process that had our id")
    clear_leftovers(output, folder=False)
    assert list(tmp_path.iterdir()) == []


def test_folders_of_dead_writers_go_when_a_folder_is_made(of_process: OfProcess, tmp_path: Path) -> None:
    left = make_folder(of_process(unfinished_name, tmp_path / "m", 77))
    for_another = make_folder(of_process(unfinished_name, tmp_path / "n", 77))
    clear_leftovers(tmp_path / "m", folder=False)
    assert left.exists()
    clear_leftovers(tmp_path / "m", folder=True)
    assert list(tmp_path.iterdir()) == [for_another]


def test_what_a_living_writer_makes_stays(of_process: OfProcess, tmp_path: Path) -> None:
    make_folder(tmp_path / "m")
    for made in (unfinished_name, old_name):
        left = make_folder(of_process(made, tmp_path / "m", 5))
        with locked(left):
            clear_leftovers(tmp_path / "m", folder=True)
            assert (left / "file").exists()
    with pytest.raises(StorageError), atomic_write(tmp_path / "n"), atomic_write(tmp_path / "n"):
        pytest.fail("two writers share a temporary file")
    with atomic_write(tmp_path / "n") as stream:
        clear_leftovers(tmp_path / "n", folder=False)
        stream.write(b"whole")
    assert (tmp_path / "n").read_bytes() == b"whole"


MARK = "0123456789abcdef"


def test_what_does_not_carry_our_mark_stays(tmp_path: Path) -> None:
    make_folder(tmp_path / "m")
    ours = unfinished_name(tmp_path / "m").name
    names = [".m.1.part", ".m.1.old", ".m.2024.old", ".m.part", f".m.cluscomp-1-{MARK}.part", f".m.cluscomp-1-{MARK}.old"]
    names += [f".m.cluscomp-\u0661-{MARK}.part", f"{ours}.bak", ours[1:], ours.replace("cluscomp-", "cluscomp-1")]
    names.append(unfinished_name(tmp_path / "mm").name)
    for make in (lambda path: path.write_text("mine"), make_folder):
        for name in names:
            make(tmp_path / name)
        restore_old_folder(tmp_path / "m")
        for folder in (False, True):
            clear_leftovers(tmp_path / "m", folder=folder)
        assert {path.name for path in tmp_path.iterdir()} == {"m", *names}
        for name in names:
            (shutil.rmtree if make is make_folder else os.unlink)(tmp_path / name)


def test_links_pipes_and_things_of_another_kind_stay(of_process: OfProcess, tmp_path: Path) -> None:
    make_folder(tmp_path / "precious")
    of_process(unfinished_name, tmp_path / "m", 1).symlink_to(tmp_path / "precious")
    of_process(unfinished_name, tmp_path / "m", 2).symlink_to(tmp_path / "precious" / "file")
    os.mkfifo(of_process(unfinished_name, tmp_path / "m", 3))
    of_process(old_name, tmp_path / "m", 4).write_text("x")
    before = set(tmp_path.iterdir())
    for folder in (False, True):
        clear_leftovers(tmp_path / "m", folder=folder)
    assert set(tmp_path.iterdir()) == before
    assert (tmp_path / "precious" / "file").exists()


def test_a_refused_output_costs_nothing(of_process: OfProcess, tmp_path: Path) -> None:
    (tmp_path / "m").write_text("x")
    left = of_process(unfinished_name, tmp_path / "m", 1)
    left.write_text("x")
    with pytest.raises(OutputExistsError):
        check_output(tmp_path / "m", force=False)
    assert left.exists()
    check_output(tmp_path / "m", force=True)
    assert not left.exists()
    make_folder(tmp_path / "folder")
    left = make_folder(of_process(unfinished_name, tmp_path / "folder", 1))
    with pytest.raises(OutputExistsError):
        check_output_folder(tmp_path / "folder", force=False, replaceable=lambda _: True)
    assert left.exists()
    check_output_folder(tmp_path / "folder", force=True, replaceable=lambda _: True)
    assert not left.exists()


@pytest.mark.parametrize("name", ["n" * 255, "\u00e9" * 127, os.fsdecode(b"\xff" * 255)])
def test_names_as_long_as_a_file_system_takes(name: str, tmp_path: Path) -> None:
    output = tmp_path / name
    assert len(os.fsencode(unfinished_name(output).name)) <= SHOWN_BYTES + 60
    assert unfinished_name(output) != unfinished_name(tmp_path / (name[:-1] + "x"))
    with atomic_write(output) as stream:
        stream.write(b"whole")
    assert output.read_bytes() == b"whole"
    unfinished_name(output).write_text("x")
    clear_leftovers(output, folder=False)
    assert list(tmp_path.iterdir()) == [output]


def test_a_folder_that_had_stepped_aside_gets_its_name_back(of_process: OfProcess, tmp_path: Path) -> None:
    make_folder(of_process(old_name, tmp_path / "m", 12), "the old model")
    make_folder(of_process(unfinished_name, tmp_path / "m", 12), "the new one, unfinished perhaps")
    with pytest.raises(OutputExistsError):
        check_output_folder(tmp_path / "m", force=False, replaceable=lambda _: True)
    assert (tmp_path / "m" / "file").read_text() == "the old model"
    clear_leftovers(tmp_path / "m", folder=True)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_a_folder_that_has_been_replaced_goes(of_process: OfProcess, tmp_path: Path) -> None:
    make_folder(tmp_path / "m", "new")
    make_folder(of_process(old_name, tmp_path / "m", 12))
    make_folder(of_process(unfinished_name, tmp_path / "m", 12))
    clear_leftovers(tmp_path / "m", folder=True)
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
