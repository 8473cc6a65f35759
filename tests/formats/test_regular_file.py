"""Files are checked before they are opened, and no more is read than requested."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hostile_paths import place

from cluscomp_formats.errors import InvalidFileError, StorageError
from cluscomp_formats.files.regular_file import check_there, first_bytes, open_regular, read_whole

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs pipes and links")


@pytest.mark.parametrize(
    ("what", "kind"),
    [
        ("nothing", "missing"),
        ("folder", "is_folder"),
        ("pipe", "not_a_file"),
        ("link to a pipe", "not_a_file"),
        ("socket", "not_a_file"),
        ("device", "not_a_file"),
        ("dangling link", "missing"),
        ("loop", "missing"),
        ("sparse file", "file_too_long"),
    ],
)
def test_what_is_no_small_regular_file(what: str, kind: str, tmp_path: Path) -> None:
    path = place(tmp_path / "file", what)
    with pytest.raises(InvalidFileError) as caught:
        read_whole(path, 100)
    assert [(problem.kind, problem.file) for problem in caught.value.problems] == [(kind, str(path))]
    assert first_bytes(path, 3) == (b"\0\0\0" if what == "sparse file" else b"")


@pytest.mark.parametrize("name", ["a\0b", "n" * 300, "file/below"])
def test_names_no_system_takes(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for look in (read_whole, open_regular, check_there):
        with pytest.raises(InvalidFileError) as caught:
            look(tmp_path / name)
        assert caught.value.problems[0].kind == "missing"
    assert first_bytes(tmp_path / name, 3) == b""


def test_a_file_replaced_by_a_pipe_after_the_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.touch()
    os.mkfifo(tmp_path / "pipe")
    status = path.stat()
    (tmp_path / "pipe").replace(path)
    monkeypatch.setattr(Path, "stat", lambda *_, **__: status)
    with pytest.raises(InvalidFileError, match="a device or pipe"):
        open_regular(path)


def test_what_the_system_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()

    def refuse(*_: object, **__: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(StorageError, match="Permission denied"):
        read_whole(tmp_path / "file")


def test_whole_or_nothing(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for content in (b"", b"x" * 100):
        path.write_bytes(content)
        assert read_whole(path, 100) == content
    assert first_bytes(path, 3) == b"xxx"
    with pytest.raises(InvalidFileError, match="too long"):
        read_whole(path, 99)


def test_a_file_that_grows_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"12")
    before = os.stat_result((*path.stat()[:6], 1, *path.stat()[7:]))
    monkeypatch.setattr(os, "fstat", lambda _: before)
    with pytest.raises(InvalidFileError, match="changed while it was read"):
        read_whole(path)
