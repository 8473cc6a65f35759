"""Models that the writer rejects, and when; and that it leaves nothing behind when it fails."""

from __future__ import annotations

import errno
import subprocess
import sys
import textwrap
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluscomp_formats.errors import InvalidRequestError, OutputExistsError, StorageError
from cluscomp_formats.files.leftovers import locked, unfinished_name
from cluscomp_formats.hf import open_hf, write_hf
from cluscomp_formats.hf import writer as writer_module
from cluscomp_formats.hf.reader import holds_only_model
from cluscomp_formats.ir import AnyArray, Array, ClusteredWeight, Codebook, DenseTensor, Model, Stage


def dense(name: str, loader: Callable[[], AnyArray] | None = None) -> DenseTensor:
    return DenseTensor(name, Array((4,), "float32", loader or (lambda: np.ones(4, dtype=np.float32))))


def weight(name: str = "w", codebook: str = "book", largest: int = 2) -> ClusteredWeight:
    values = Array.of(np.zeros((3, 2), dtype=np.float16))
    codes = Array.of(np.full((2, 2), largest, dtype=np.uint16))
    return ClusteredWeight(name, (4, 2), (Stage(Codebook(codebook, values), codes),))


def unread() -> AnyArray:
    raise AssertionError("a payload was read although the request is bad")


def side_file(content: bytes = b"x") -> Array:
    return Array.of(np.frombuffer(content, np.uint8))


def models_of(*tensors: Any) -> Model:
    return Model({}, {tensor.name: tensor for tensor in tensors})


BAD_REQUESTS: dict[str, tuple[Model, str]] = {
    "empty tensor name": (models_of(dense("", unread)), "bad_name"),
    "lone surrogate": (models_of(dense("\ud800", unread)), "bad_name"),
    "file name leading out": (Model({}, {"d": dense("d", unread)}, {"../x": side_file()}), "bad_name"),
    "file of the format": (Model({}, {"d": dense("d", unread)}, {"config.json": side_file()}), "bad_name"),
    "file of the format in capitals": (Model({}, {"d": dense("d", unread)}, {"Config.JSON": side_file()}), "bad_name"),
    "weights as a side file": (Model({}, {"d": dense("d", unread)}, {"x.safetensors": side_file()}), "bad_name"),
    "long file name": (Model({}, {"d": dense("d", unread)}, {"é" * 128: side_file()}), "bad_name"),
    "too many dimensions": (models_of(DenseTensor("d", Array((1,) * 9, "int8", unread))), "bad_shape"),
    "NaN in the configuration": (Model({"eps": float("nan")}, {"d": dense("d", unread)}), "not_json"),
    "metadata": (models_of(dense("__metadata__", unread)), "name_collision"),
    "dense under a part's name": (models_of(weight("w.weight"), dense("w.codes", unread)), "name_collision"),
    "dense under a codebook's name": (models_of(weight(), dense("codebooks.book", unread)), "name_collision"),
    "module and weight": (models_of(weight("w.weight", "a"), weight("w", "b")), "name_collision"),
}


@pytest.mark.parametrize("case", BAD_REQUESTS)
def test_refuses_before_anything_is_read_or_written(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def touched(*_: Any, **__: Any) -> Any:
        raise AssertionError("a folder was made although the request is bad")

    monkeypatch.setattr(writer_module, "atomic_folder", touched)
    model, kind = BAD_REQUESTS[case]
    with pytest.raises(InvalidRequestError) as caught:
        write_hf(model, tmp_path / "m")
    assert {problem.kind for problem in caught.value.problems} == {kind}


def test_a_header_that_gets_too_long_is_refused_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer_module, "MAX_HEADER_BYTES", 100)
    with pytest.raises(InvalidRequestError, match="too long"):
        write_hf(models_of(dense("d", unread), dense("e", unread)), tmp_path / "m")
    with pytest.raises(InvalidRequestError, match="the shard size is out of range"):
        write_hf(models_of(), tmp_path / "m", shard_bytes=0)


def test_refuses_values_before_the_folder_appears(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        write_hf(models_of(dense("a"), weight(largest=3)), tmp_path / "m")
    (problem,) = caught.value.problems
    assert (problem.kind, problem.tensor, problem.file) == ("code_out_of_range", "w", str(tmp_path / "m"))
    assert list(tmp_path.iterdir()) == []


def test_each_loader_is_called_once_and_one_after_the_other(tmp_path: Path) -> None:
    calls: Counter[str] = Counter()

    def loader(name: str) -> Callable[[], AnyArray]:
        def load() -> AnyArray:
            calls[name] += 1
            return np.ones(4, dtype=np.float32)

        return load

    write_hf(models_of(*(dense(name, loader(name)) for name in "cab")), tmp_path / "m", shard_bytes=20)
    assert list(calls.items()) == [("a", 1), ("b", 1), ("c", 1)]


@pytest.mark.parametrize("force", [False, True])
def test_a_failing_loader_leaves_nothing(tmp_path: Path, force: bool) -> None:
    def fail() -> AnyArray:
        raise KeyboardInterrupt

    if force:
        write_hf(models_of(dense("old")), tmp_path / "m")
    before = sorted(path.name for path in tmp_path.rglob("*"))
    with pytest.raises(KeyboardInterrupt):
        write_hf(models_of(dense("a"), dense("b", fail)), tmp_path / "m", force=force)
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


def test_an_unreadable_source_names_the_tensor(tmp_path: Path) -> None:
    def fail() -> AnyArray:
        raise OSError(errno.EIO, "Input/output error", "/source")

    with pytest.raises(StorageError) as caught:
        write_hf(models_of(dense("b", fail)), tmp_path / "m")
    (problem,) = caught.value.problems
    assert (problem.kind, problem.tensor, problem.file) == ("source_unreadable", "b", "/source")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(StorageError) as caught:
        write_hf(models_of(dense("a")), tmp_path / "m")
    assert caught.value.problems[0].remedy is not None
    assert list(tmp_path.iterdir()) == []


def test_a_killed_writer_leaves_no_folder_of_that_name(tmp_path: Path) -> None:
    code = f"""
        import os
        import numpy as np
        from pathlib import Path
        from cluscomp_formats.hf import write_hf
        from cluscomp_formats.ir import Array, DenseTensor, Model
        die = DenseTensor("b", Array((4,), "float32", lambda: os._exit(9)))
        first = DenseTensor("a", Array.of(np.ones(4, np.float32)))
        write_hf(Model({{}}, {{"a": first, "b": die}}), Path({str(tmp_path / "m")!r}))
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], env={"PYTHONPATH": ":".join(sys.path)})
    assert run.returncode == 9
    assert not (tmp_path / "m").exists()
    # The rest is not a valid model.
    (part,) = tmp_path.iterdir()
    assert not (part / "config.json").exists()


def test_the_same_model_gives_the_same_bytes(tmp_path: Path) -> None:
    model = Model({"b": 1, "a": 0.1}, {"w": weight(), "d": dense("d")}, {"t": side_file()}, {"p": "é"})
    turned = Model({"a": 0.1, "b": 1}, {"d": dense("d"), "w": weight()}, {"t": side_file()}, {"p": "é"})
    write_hf(model, tmp_path / "a")
    write_hf(turned, tmp_path / "b")
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "b").iterdir())
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in names)


def test_progress_counts_stored_bytes(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    model = Model({}, {"w": weight(), "d": dense("d")}, {"t": side_file(b"12345")})
    report = write_hf(model, tmp_path / "m", on_progress=lambda phase, done, total: seen.append((done, total)))
    # Codebook 12 bytes, four codes of two bits 1, norm 16, side file 5.
    assert report.payload_bytes == 34
    assert [done for done, _ in seen] == [16, 28, 29, 34]
    assert {total for _, total in seen} == {34}


# The self-test.


def test_the_self_test_sees_the_finished_payloads_and_its_record_is_stored(tmp_path: Path) -> None:
    model = Model({"n": 1}, {"w": weight()}, {"t": side_file()}, {"p": 1}, {"old": True})
    digests = []

    def self_test(written: Model) -> dict[str, Any]:
        digests.append(written.digest())
        assert written.self_test is None
        assert written.files["t"].read().tobytes() == b"x"
        return {"version": 1}

    report = write_hf(model, tmp_path / "m", self_test=self_test)
    assert digests == [report.digest] == [model.digest()]
    assert open_hf(tmp_path / "m", check=True).self_test == {"version": 1}
    write_hf(model, tmp_path / "n")
    assert open_hf(tmp_path / "n").self_test == {"old": True}


@pytest.mark.parametrize("record", [{"x": float("nan")}, [1]])
def test_a_self_test_record_that_is_no_json_is_refused(tmp_path: Path, record: Any) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        write_hf(models_of(weight()), tmp_path / "m", self_test=lambda _: record)
    assert caught.value.problems[0].kind == "not_json"
    assert list(tmp_path.iterdir()) == []


# The folder.


def test_an_empty_folder_is_filled_and_another_only_by_force(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    write_hf(models_of(dense("a")), tmp_path / "m")
    with pytest.raises(OutputExistsError) as caught:
        write_hf(models_of(dense("b", unread)), tmp_path / "m")
    assert caught.value.problems[0].kind == "output_exists"
    write_hf(models_of(dense("b")), tmp_path / "m", force=True, shard_bytes=1)
    assert list(open_hf(tmp_path / "m", check=True).tensors) == ["b"]
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


@pytest.mark.parametrize("foreign", ["notes.txt", "nested", "model-00001-of-00002.safetensors"])
def test_force_never_deletes_what_is_not_of_the_model(tmp_path: Path, foreign: str) -> None:
    write_hf(models_of(dense("a")), tmp_path / "m")
    assert holds_only_model(tmp_path / "m")
    (tmp_path / "m" / foreign).mkdir()
    assert not holds_only_model(tmp_path / "m")
    for folder in (tmp_path / "m", tmp_path):
        with pytest.raises(OutputExistsError) as caught:
            write_hf(models_of(dense("b", unread)), folder, force=True)
        assert caught.value.problems[0].kind == "output_is_foreign"
    assert (tmp_path / "m" / foreign).exists()


def test_other_outputs_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    for name in ("file", "link"):
        with pytest.raises(OutputExistsError) as caught:
            write_hf(models_of(dense("a", unread)), tmp_path / name, force=True)
        assert caught.value.problems[0].kind == "output_is_file"
    with pytest.raises(StorageError) as storage:
        write_hf(models_of(dense("a", unread)), tmp_path / "no" / "m")
    assert storage.value.problems[0].kind == "no_folder"


def test_a_folder_may_be_named_by_its_own_dot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "m").mkdir()
    monkeypatch.chdir(tmp_path / "m")
    write_hf(models_of(dense("a")), Path())
    assert list(open_hf(tmp_path / "m", check=True).tensors) == ["a"]


def test_what_another_writer_is_making_is_left_alone(tmp_path: Path) -> None:
    part = unfinished_name(tmp_path / "m")
    part.mkdir()
    (part / "x").write_bytes(b"1")
    with locked(part), pytest.raises(StorageError):
        write_hf(models_of(dense("a", unread)), tmp_path / "m")
    assert (part / "x").read_bytes() == b"1"


def test_a_folder_that_cannot_be_put_in_place_puts_the_old_one_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_hf(models_of(dense("old")), tmp_path / "m")
    rename = Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if self.name.endswith(".part"):
            raise PermissionError(errno.EACCES, "Permission denied")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(StorageError):
        write_hf(models_of(dense("new")), tmp_path / "m", force=True)
    assert list(open_hf(tmp_path / "m", check=True).tensors) == ["old"]
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_a_folder_that_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    def appear(_: Model) -> None:
        (tmp_path / "m").mkdir()
        (tmp_path / "m" / "mine").write_bytes(b"1")

    with pytest.raises(OutputExistsError):
        write_hf(models_of(dense("a")), tmp_path / "m", self_test=appear)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["m", "mine"]
