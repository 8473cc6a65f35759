"""Atomic writes: a file is either complete or absent."""

import errno
import sys
from pathlib import Path

import pytest
from hostile_paths import place

from cluscomp_formats.errors import OutputExistsError, StorageError
from cluscomp_formats.files.atomic import atomic_write, check_output, storage_error
from cluscomp_formats.files.atomic_folder import check_output_folder


def test_writes_reads_back_and_replaces_when_forced(tmp_path: Path) -> None:
    path = tmp_path / "out"
    for content, force in ((b"first", False), (b"second", True)):
        with atomic_write(path, force=force) as stream:
            stream.write(content)
            stream.seek(0)
            assert stream.read() == content
            assert Path(stream.name).parent == tmp_path
        assert path.read_bytes() == content
        assert list(tmp_path.iterdir()) == [path]


def test_the_target_is_untouched_until_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.write_bytes(b"old")
    with atomic_write(path, force=True) as stream:
        stream.write(b"new")
        stream.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"


@pytest.mark.parametrize("raised", [RuntimeError("x"), KeyboardInterrupt(), SystemExit()])
def test_a_failing_block_leaves_nothing(tmp_path: Path, raised: BaseException) -> None:
    def fail_half_way() -> None:
        with atomic_write(tmp_path / "out") as stream:
            stream.write(b"half")
            raise raised

    with pytest.raises(type(raised)):
        fail_half_way()
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_the_system_becomes_a_storage_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError) as caught, atomic_write(tmp_path / "out"):
        raise OSError(errno.ENOSPC, "No space left on device")
    (problem,) = caught.value.problems
    assert (problem.kind, problem.file) == ("os_error", str(tmp_path / "out"))
    assert "free some space" in str(problem.remedy)
    assert list(tmp_path.iterdir()) == []


def test_refusals(tmp_path: Path) -> None:
    existing = tmp_path / "existing"
    existing.touch()
    check_output(existing, force=True)
    check_output(tmp_path / "new", force=False)
    with pytest.raises(OutputExistsError, match="already exists"):
        check_output(existing, force=False)
    with pytest.raises(OutputExistsError, match="is a folder"):
        check_output(tmp_path, force=True)
    with pytest.raises(StorageError, match="folder does not exist"):
        check_output(tmp_path / "nowhere" / "out", force=True)
    with pytest.raises(OutputExistsError), atomic_write(existing):
        pytest.fail("the block ran although the output exists")


def test_an_output_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "out"
    with pytest.raises(OutputExistsError, match="was created while"), atomic_write(path):
        path.write_bytes(b"theirs")
    assert path.read_bytes() == b"theirs"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX errors")
def test_a_name_the_file_system_refuses(tmp_path: Path) -> None:
    with pytest.raises(StorageError), atomic_write(tmp_path / ("n" * 256)):
        pytest.fail("the block ran although the file could not be made")
    with pytest.raises(StorageError), atomic_write(tmp_path / "a\0b"):
        pytest.fail("the block ran although the file could not be made")
    (tmp_path / "file").touch()
    with pytest.raises(StorageError) as caught, atomic_write(tmp_path / "file" / "out"):
        pytest.fail("the block ran although the file could not be made")
    assert caught.value.problems[0].kind == "not_a_folder"


@pytest.mark.skipif(sys.platform == "win32", reason="needs pipes and links")
@pytest.mark.parametrize("force", [False, True])
def test_pipes_devices_sockets_and_links_are_never_replaced(force: bool, tmp_path: Path) -> None:
    path = tmp_path / "out"
    (tmp_path / "target").write_bytes(b"theirs")
    for what, kind in (
        ("pipe", "output_is_device"),
        ("socket", "output_is_device"),
        ("device", "output_is_link"),
        ("dangling link", "output_is_link"),
        ("loop", "output_is_link"),
    ):
        before = place(path, what).lstat()
        with pytest.raises(OutputExistsError) as caught:
            check_output(path, force=force)
        assert caught.value.problems[0].kind == kind
        assert path.lstat() == before
        path.unlink()
    path.symlink_to("target")
    with pytest.raises(OutputExistsError, match="is a link"):
        check_output(path, force=force)
    with pytest.raises(OutputExistsError, match="device, pipe or socket"):
        check_output(Path("/dev/null"), force=force)


@pytest.mark.skipif(sys.platform == "win32", reason="needs pipes and links")
def test_a_link_or_pipe_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "out"
    for what in ("pipe", "dangling link"):
        with pytest.raises(OutputExistsError, match="was created while"), atomic_write(path, force=True):
            before = place(path, what).lstat()
        assert path.lstat() == before
        path.unlink()


@pytest.mark.skipif(sys.platform == "win32", reason="another root")
@pytest.mark.parametrize("force", [False, True])
def test_the_root_of_a_file_system_is_not_replaced(force: bool) -> None:
    with pytest.raises(OutputExistsError):
        check_output(Path("/"), force=force)
    with pytest.raises(OutputExistsError, match="the root of a file system"):
        check_output_folder(Path("/"), force=force, replaceable=lambda _: True)


def test_unknown_errors_have_a_message_and_no_remedy() -> None:
    (problem,) = storage_error(Path("x"), OSError("odd")).problems
    assert (problem.message, problem.remedy) == ("odd", None)
