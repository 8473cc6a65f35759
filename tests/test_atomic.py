"""A file is complete or not there."""

import errno
import sys
from pathlib import Path

import pytest

from cluscomp_formats.atomic import atomic_write, check_output, storage_error
from cluscomp_formats.errors import OutputExistsError, StorageError


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
    with pytest.raises(OutputExistsError, match="appeared"), atomic_write(path):
        path.write_bytes(b"theirs")
    assert path.read_bytes() == b"theirs"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX errors")
def test_a_name_the_file_system_refuses(tmp_path: Path) -> None:
    with pytest.raises(StorageError), atomic_write(tmp_path / ("n" * 250)):
        pytest.fail("the block ran although the file could not be made")


def test_unknown_errors_have_a_message_and_no_remedy() -> None:
    (problem,) = storage_error(Path("x"), OSError("odd")).problems
    assert (problem.message, problem.remedy) == ("odd", None)
