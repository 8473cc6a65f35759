"""Unfinished work: what is taken up again is what was kept, and anything doubtful is as good as absent."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from cluscomp_export.store import ArraySpecs
from cluscomp_export.work_folder import WorkFolder, fingerprint, remove_work, work_folder, work_path
from cluscomp_formats.errors import StorageError

ARRAYS = {
    "codes": np.arange(12, dtype=np.uint16).reshape(3, 4),
    "row_scale": np.array([0.5, 2], dtype=np.float16),
    "sha256": np.ones((2, 1), dtype=np.float32),
    "none": np.empty(0, dtype=np.float16),
}
FORMS: ArraySpecs = {name: (values.dtype.name, values.shape) for name, values in ARRAYS.items()}
CONVERSION = fingerprint({"seed": 0})


class StopError(Exception):
    """Stands for whatever ends a conversion early."""


def keep(output: Path, *names: str, conversion: str = CONVERSION) -> None:
    """Save units and stop before the end."""
    with contextlib.suppress(StopError), work_folder(output) as work:
        work.begin(conversion)
        for name in names:
            work.save(name, ARRAYS)
        raise StopError


def units(output: Path) -> list[Path]:
    return sorted(work_path(output).iterdir())


def load(output: Path, name: str = "unit", forms: ArraySpecs = FORMS, conversion: str = CONVERSION) -> object:
    with contextlib.suppress(StopError), work_folder(output) as work:
        work.conversion = conversion
        found = work.load(name, forms)
        raise StopError
    return found


def test_what_was_kept_is_found_again_bit_for_bit(tmp_path: Path) -> None:
    output = tmp_path / "m"
    keep(output, "unit", "../../other\0unit" + 300 * "x")
    with work_folder(output) as work:
        assert work.begin(CONVERSION) == (2, 0)
        for name in ("unit", "../../other\0unit" + 300 * "x"):
            found = work.load(name, FORMS)
            assert found is not None
            assert {name: (values.dtype, values.shape) for name, values in found.items()} == {
                name: (values.dtype, values.shape) for name, values in ARRAYS.items()
            }
            assert all(values.tobytes() == ARRAYS[name].tobytes() for name, values in found.items())
        assert work.load("another", FORMS) is None
        assert work.reused == 2
    assert list(tmp_path.iterdir()) == []


def test_the_units_are_safetensors_files(tmp_path: Path) -> None:
    keep(tmp_path / "m", "unit")
    (file,) = units(tmp_path / "m")
    np.testing.assert_array_equal(load_file(file)["array.codes"], ARRAYS["codes"])


def test_every_changed_byte_makes_a_unit_absent(tmp_path: Path) -> None:
    output = tmp_path / "m"
    keep(output, "unit")
    (file,) = units(output)
    sound = file.read_bytes()
    work = WorkFolder(work_path(output))
    work.conversion = CONVERSION
    for position in range(len(sound)):
        file.write_bytes(sound[:position] + bytes([sound[position] ^ 1]) + sound[position + 1 :])
        found = work.load("unit", FORMS)
        # Only what says nothing about the arrays may change: the metadata other readers want, and the padding of the header.
        assert found is None or all(values.tobytes() == ARRAYS[name].tobytes() for name, values in found.items()), position
    for length in range(len(sound)):
        file.write_bytes(sound[:length])
        assert work.load("unit", FORMS) is None
    file.write_bytes(sound + b"\0")
    assert work.load("unit", FORMS) is None
    file.write_bytes(sound)
    assert work.load("unit", FORMS) is not None


def test_a_unit_counts_only_under_its_own_name_forms_and_conversion(tmp_path: Path) -> None:
    output = tmp_path / "m"
    keep(output, "unit", "twin")
    other = fingerprint({"seed": 1})
    assert load(output) is not None
    assert load(output, forms={**FORMS, "codes": ("uint16", (4, 3))}) is None
    assert load(output, forms={"codes": FORMS["codes"]}) is None
    work = WorkFolder(work_path(output))
    work.conversion = CONVERSION
    unit, twin = work._file("unit"), work._file("twin")
    twin.write_bytes(unit.read_bytes())
    assert load(output, "twin") is None
    work.conversion = other
    unit.rename(work._file("unit"))
    assert load(output, conversion=other) is None


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_folders_and_pipes_in_place_of_a_unit_are_absent(tmp_path: Path) -> None:
    keep(tmp_path / "m", "unit")
    (file,) = units(tmp_path / "m")
    file.unlink()
    file.mkdir()
    assert load(tmp_path / "m") is None
    file.rmdir()
    os.mkfifo(file)
    assert load(tmp_path / "m") is None


def test_the_work_of_another_conversion_is_discarded_and_nothing_else(tmp_path: Path) -> None:
    output = tmp_path / "m"
    keep(output, "unit")
    (work_path(output) / "notes.txt").write_text("mine")
    with work_folder(output) as work:
        assert work.begin(fingerprint({"seed": 1})) == (0, 1)
    assert [path.name for path in units(output)] == ["notes.txt"]


def test_work_of_the_finished_conversion_is_removed_and_of_others_kept(tmp_path: Path) -> None:
    keep(tmp_path / "m", "unit")
    remove_work(tmp_path / "m", fingerprint({"seed": 1}))
    assert len(units(tmp_path / "m")) == 1
    remove_work(tmp_path / "m", CONVERSION)
    assert list(tmp_path.iterdir()) == []


def test_an_attempt_that_finished_nothing_leaves_no_folder(tmp_path: Path) -> None:
    keep(tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


def test_two_conversions_to_one_output_do_not_meet(tmp_path: Path) -> None:
    output = tmp_path / "m"
    with work_folder(output) as work:
        work.begin(CONVERSION)
        work.save("unit", ARRAYS)
        with pytest.raises(StorageError) as caught, work_folder(output):
            pytest.fail("two processes may work in one folder")
        assert caught.value.problems[0].kind == "busy"
        assert work.load("unit", FORMS) is not None
    with work_folder(output):
        pass


def test_a_link_or_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    work_path(tmp_path / "m").symlink_to(tmp_path / "elsewhere")
    work_path(tmp_path / "n").write_text("mine")
    for name in ("m", "n"):
        with pytest.raises(StorageError), work_folder(tmp_path / name):
            pytest.fail("worked in a folder that is none of ours")
    assert work_path(tmp_path / "n").read_text() == "mine"


def test_a_full_disk_is_a_storage_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(StorageError, match="No space left"):
        keep(tmp_path / "m", "unit")
    assert list(tmp_path.iterdir()) == []
