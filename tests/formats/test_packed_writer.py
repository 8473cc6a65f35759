"""Models that the writer rejects, and when; and that it leaves nothing behind when it fails."""

import errno
import os
import subprocess
import sys
import textwrap
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest

from cluscomp_formats.errors import InvalidRequestError, OutputExistsError, StorageError
from cluscomp_formats.ir import AnyArray, Array, ClusteredWeight, Codebook, DenseTensor, Model, Outliers, Stage
from cluscomp_formats.packed import open_packed, write_packed
from cluscomp_formats.packed import writer as writer_module
from cluscomp_formats.sections import model_problems
from cluscomp_formats.sections import payload_stream as stream_module
from cluscomp_formats.sections import tiles as tiles_module


def array(*values: float, dtype: str = "float32") -> Array:
    return Array.of(np.array(values, dtype=dtype))


def dense(name: str, loader: Callable[[], AnyArray] | None = None) -> DenseTensor:
    return DenseTensor(name, Array((4,), "float32", loader or (lambda: np.ones(4, dtype=np.float32))))


def weight(**changes: Any) -> ClusteredWeight:
    codebook = changes.pop("codebook", np.zeros((3, 2), dtype=np.float16))
    codes = changes.pop("codes", np.zeros((2, 2), dtype=np.uint16))
    return ClusteredWeight("w", (4, 2), (Stage(Codebook("book", Array.of(codebook)), Array.of(codes)),), **changes)


def outliers(positions: list[int], values: list[float]) -> Outliers:
    return Outliers(array(*positions, dtype="uint32"), array(*values))


def unread() -> AnyArray:
    raise AssertionError("a payload was read although the request is bad")


def cyclic() -> dict[str, Any]:
    config: dict[str, Any] = {}
    config["self"] = config
    return config


BAD_REQUESTS: dict[str, tuple[Model, str]] = {
    "empty tensor name": (Model({}, {"": dense("", unread)}), "bad_name"),
    "control character": (Model({}, {"a\tb": dense("a\tb", unread)}), "bad_name"),
    "lone surrogate": (Model({}, {"\ud800": dense("\ud800", unread)}), "bad_name"),
    "long name": (Model({}, {"é" * 257: dense("é" * 257, unread)}), "bad_name"),
    "file name with folder": (Model({}, {"d": dense("d", unread)}, {"a/b": array(1, dtype="uint8")}), "bad_name"),
    "file name leading out": (Model({}, {"d": dense("d", unread)}, {"..": array(1, dtype="uint8")}), "bad_name"),
    "side file of another type": (Model({}, {"d": dense("d", unread)}, {"f": array(1)}), "bad_side_file"),
    "too many dimensions": (Model({}, {"d": DenseTensor("d", Array((1,) * 9, "int8", unread))}), "bad_shape"),
    "NaN in the configuration": (Model({"eps": float("nan")}, {"d": dense("d", unread)}), "not_json"),
    "set in the configuration": (Model({"x": [{1}]}, {"d": dense("d", unread)}), "not_json"),
    "integer key": (Model({"x": {1: 2}}, {"d": dense("d", unread)}), "not_json"),
    "giant integer": (Model({"x": 2**64}, {"d": dense("d", unread)}), "not_json"),
    "bytes in the provenance": (Model({}, {"d": dense("d", unread)}, {}, {"x": b""}), "not_json"),
    "path in the self-test": (Model({}, {"d": dense("d", unread)}, {}, {}, {"x": Path()}), "not_json"),
    "cycle": (Model(cyclic(), {"d": dense("d", unread)}), "not_json"),
    "no dict": (Model(MappingProxyType({}), {"d": dense("d", unread)}), "not_json"),
}


@pytest.mark.parametrize("case", BAD_REQUESTS)
def test_refuses_before_anything_is_read_or_written(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def touched(*_: Any, **__: Any) -> Any:
        raise AssertionError("a file was opened although the request is bad")

    monkeypatch.setattr(writer_module, "atomic_write", touched)
    model, kind = BAD_REQUESTS[case]
    with pytest.raises(InvalidRequestError) as caught:
        write_packed(model, tmp_path / "m.clus")
    assert [problem.kind for problem in caught.value.problems] == [kind]
    assert list(tmp_path.iterdir()) == []


def test_a_header_that_gets_too_long_is_refused_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_problems, "MAX_HEADER_LENGTH", 1000)
    with pytest.raises(InvalidRequestError, match="too long"):
        write_packed(Model({"x": "y" * 1000}, {"d": dense("d", unread)}), tmp_path / "m.clus")


def test_all_bad_names_come_together(tmp_path: Path) -> None:
    model = Model({"x": float("inf")}, {"": dense("", unread), "\n": dense("\n", unread)})
    with pytest.raises(InvalidRequestError) as caught:
        write_packed(model, tmp_path / "m.clus")
    assert [problem.kind for problem in caught.value.problems] == ["bad_name", "bad_name", "not_json"]


BAD_VALUES: dict[str, tuple[ClusteredWeight, str, str]] = {
    "code past the codebook": (weight(codes=np.array([[0, 1], [3, 2]], dtype=np.uint16)), "code_out_of_range", "w"),
    "NaN in the codebook": (weight(codebook=np.full((3, 2), np.nan, dtype=np.float16)), "not_finite", "book"),
    "infinite scale": (weight(row_scale=array(1, 1, np.inf, 1)), "not_finite", "w"),
    "NaN scale": (weight(column_scale=array(np.nan, 1)), "not_finite", "w"),
    "NaN outlier": (weight(outliers=outliers([1], [np.nan])), "not_finite", "w"),
    "unsorted outliers": (weight(outliers=outliers([3, 1], [1, 1])), "outliers_unsorted", "w"),
    "doubled outlier": (weight(outliers=outliers([3, 3], [1, 1])), "outliers_unsorted", "w"),
    "outlier past the weight": (weight(outliers=outliers([8], [1])), "outlier_out_of_range", "w"),
}


@pytest.mark.parametrize("case", BAD_VALUES)
def test_refuses_values_before_the_file_appears(case: str, tmp_path: Path) -> None:
    tensor, kind, owner = BAD_VALUES[case]
    path = tmp_path / "m.clus"
    path.write_bytes(b"what was there")
    with pytest.raises(InvalidRequestError) as caught:
        write_packed(Model({}, {"a": dense("a"), "w": tensor}), path, force=True)
    (problem,) = caught.value.problems
    assert (problem.kind, problem.tensor, problem.file) == (kind, owner, str(path))
    assert path.read_bytes() == b"what was there"
    assert list(tmp_path.iterdir()) == [path]


def test_an_existing_file_is_kept_unless_forced(tmp_path: Path) -> None:
    path = tmp_path / "m.clus"
    path.write_bytes(b"what was there")
    with pytest.raises(OutputExistsError):
        write_packed(Model({}, {"d": dense("d", unread)}), path)
    assert path.read_bytes() == b"what was there"
    write_packed(Model({}, {"d": dense("d")}), path, force=True)
    assert list(open_packed(path, check=True).tensors) == ["d"]


def test_every_payload_is_read_once_and_only_one_is_held(tmp_path: Path) -> None:
    reads: Counter[str] = Counter()

    def counted(name: str) -> DenseTensor:
        def loader() -> AnyArray:
            reads[name] += 1
            return np.ones(4, dtype=np.float32)

        return dense(name, loader)

    tensors = {name: counted(name) for name in "abc"}
    write_packed(Model({}, tensors), tmp_path / "m.clus", self_test=lambda model: {"digest": model.digest()})
    assert reads == {"a": 1, "b": 1, "c": 1}


class Crash(BaseException):
    """Not derived from Exception, like KeyboardInterrupt."""


@pytest.mark.parametrize("raised", [ValueError("broken"), KeyboardInterrupt(), MemoryError(), Crash()])
def test_a_failing_loader_leaves_nothing_behind(raised: BaseException, tmp_path: Path) -> None:
    def loader() -> AnyArray:
        raise raised

    path = tmp_path / "m.clus"
    path.write_bytes(b"what was there")
    with pytest.raises(type(raised)):
        write_packed(Model({}, {"a": dense("a"), "b": dense("b", loader)}), path, force=True)
    assert path.read_bytes() == b"what was there"
    assert list(tmp_path.iterdir()) == [path]


def test_an_unreadable_source_is_not_blamed_on_the_output(tmp_path: Path) -> None:
    def loader() -> AnyArray:
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", "source.safetensors")

    with pytest.raises(StorageError) as caught:
        write_packed(Model({}, {"b": dense("b", loader)}), tmp_path / "m.clus")
    (problem,) = caught.value.problems
    assert (problem.kind, problem.file, problem.tensor) == ("source_unreadable", "source.safetensors", "b")
    assert list(tmp_path.iterdir()) == []


def test_a_failing_callback_leaves_nothing_behind(tmp_path: Path) -> None:
    def fail(*_: Any) -> Any:
        raise KeyboardInterrupt

    for callbacks in ({"on_progress": fail}, {"self_test": fail}):
        with pytest.raises(KeyboardInterrupt):
            write_packed(Model({}, {"a": dense("a")}), tmp_path / "m.clus", **callbacks)  # type: ignore[arg-type]
        assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit on the size of files")
def test_a_full_disk_is_an_error_with_a_remedy(tmp_path: Path) -> None:
    """A limit of the file size makes writes fail like a full disk: in the middle, by the operating system."""
    path = tmp_path / "m.clus"
    path.write_bytes(b"what was there")
    script = textwrap.dedent(
        """
        import resource, signal, sys
        from pathlib import Path
        import numpy as np
        from cluscomp_formats.errors import StorageError
        from cluscomp_formats.ir import Array, DenseTensor, Model
        from cluscomp_formats.packed import write_packed

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
        tensors = {name: DenseTensor(name, Array.of(np.ones(200_000, dtype=np.float32))) for name in "ab"}
        try:
            write_packed(Model({}, tensors), Path(sys.argv[1]), force=True)
        except StorageError as error:
            print(error.problems[0].kind, error.problems[0].file)
        """
    )
    done = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, encoding="utf-8", env=environment())
    assert done.stdout.rstrip("\n").split(" ", 1) == ["os_error", str(path)], done.stderr
    assert path.read_bytes() == b"what was there"
    assert list(tmp_path.iterdir()) == [path]


def environment() -> dict[str, str]:
    """Return this process's environment with its search path, because pytest adds source folders only to `sys.path`."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
def test_an_unfinished_file_is_never_taken_for_a_model(tmp_path: Path) -> None:
    """A killed process leaves its temporary file, which must not open."""
    script = textwrap.dedent(
        """
        import os, signal, sys
        from pathlib import Path
        import numpy as np
        from cluscomp_formats.ir import Array, DenseTensor, Model
        from cluscomp_formats.packed import write_packed

        def die():
            os.kill(os.getpid(), signal.SIGKILL)

        tensors = {"a": DenseTensor("a", Array.of(np.ones(200_000))), "b": DenseTensor("b", Array((1,), "float32", die))}
        write_packed(Model({}, tensors), Path(sys.argv[1]))
        """
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "m.clus")], env=environment())
    (left,) = tmp_path.iterdir()
    assert left.stat().st_size > 1_000_000
    with pytest.raises(Exception, match="an incomplete write"):
        open_packed(left)


def test_progress_counts_stored_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_module, "_PIECE", 8)
    monkeypatch.setattr(tiles_module, "_PIECE", 8)
    codebook = Codebook("c", Array.of(np.zeros((300, 4), dtype=np.float16)))
    codes = Array.of(np.arange(300, dtype=np.uint16).reshape(10, 30))
    files = {"f": Array.of(np.zeros(0, dtype=np.uint8))}
    model = Model({}, {"w": ClusteredWeight("w", (120, 10), (Stage(codebook, codes),))}, files)
    seen: list[tuple[int, int]] = []
    report = write_packed(model, tmp_path / "m.clus", on_progress=lambda phase, done, total: seen.append((done, total)))
    assert report.payload_bytes == 300 * 4 * 2 + 12 * 30 * 9 // 8
    assert seen[-1] == (report.payload_bytes, report.payload_bytes)
    assert sorted(seen) == seen
    assert len(seen) == 150 + 2 + 1
    # The pieces are joined correctly.
    assert open_packed(tmp_path / "m.clus", check=True).digest() == model.digest()


def test_the_disk_is_set_to_work_on_large_models_without_changing_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model({}, {"a": dense("a"), "b": dense("b")})
    write_packed(model, tmp_path / "plain.clus")
    monkeypatch.setattr(stream_module, "_WRITEBACK", 1)
    write_packed(model, tmp_path / "flushed.clus")
    assert (tmp_path / "plain.clus").read_bytes() == (tmp_path / "flushed.clus").read_bytes()


# The self-test.


def test_the_self_test_sees_the_finished_payloads_and_its_record_is_stored(tmp_path: Path) -> None:
    path = tmp_path / "m.clus"
    model = Model({"n": 1}, {"a": dense("a")}, self_test={"old": True})

    def record(opened: Model) -> dict[str, Any]:
        assert not path.exists()
        assert opened.self_test is None
        return {"version": 1, "values": opened.tensors["a"].decode().tolist(), "digest": opened.digest()}

    write_packed(model, path, self_test=record)
    found = open_packed(path, check=True)
    assert found.self_test == {"version": 1, "values": [1, 1, 1, 1], "digest": model.digest()}
    # The same bytes as if the record had been there from the start.
    write_packed(replace(model, self_test=found.self_test), tmp_path / "direct.clus")
    assert (tmp_path / "direct.clus").read_bytes() == path.read_bytes()


@pytest.mark.parametrize("record", [None, {}])
def test_a_self_test_may_record_nothing(tmp_path: Path, record: dict[str, Any] | None) -> None:
    write_packed(Model({}, {"a": dense("a")}, self_test={"old": True}), tmp_path / "m.clus", self_test=lambda _: record)
    assert open_packed(tmp_path / "m.clus", check=True).self_test == record


def test_a_record_that_is_not_json_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match=r"self_test\.x is"):
        write_packed(Model({}, {"a": dense("a")}), tmp_path / "m.clus", self_test=lambda _: {"x": np.float32(1)})
    assert list(tmp_path.iterdir()) == []
