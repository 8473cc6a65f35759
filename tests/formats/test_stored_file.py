"""Files larger than the address space are read in pieces, with few mappings and few open files."""

from __future__ import annotations

import copy
import mmap
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluscomp_formats.errors import InvalidFileError
from cluscomp_formats.files import stored_file
from cluscomp_formats.files.stored_file import StoredFile

WINDOW = 4 * mmap.ALLOCATIONGRANULARITY


@pytest.fixture
def content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> bytes:
    monkeypatch.setattr(stored_file, "WINDOW_BYTES", WINDOW)
    content = np.random.default_rng(0).bytes(10 * WINDOW + 123)
    (tmp_path / "file").write_bytes(content)
    return content


def test_every_piece_is_what_the_file_holds(content: bytes, tmp_path: Path) -> None:
    file = StoredFile(tmp_path / "file")
    generator = np.random.default_rng(1)
    kept = []
    for offset in (0, 1, WINDOW - 1, WINDOW, len(content), *generator.integers(0, len(content), 200).tolist()):
        left = len(content) - offset
        for length in (0, min(1, left), min(WINDOW, left), int(generator.integers(0, left + 1)), left):
            piece = file.read(offset, length)
            assert not piece.flags.writeable or length == 0
            assert piece.tobytes() == content[offset : offset + length] == file.copy(offset, length)
            kept.append((piece, offset))
    del file
    # The arrays stay valid after the file object is gone.
    assert all(piece.tobytes() == content[offset : offset + len(piece)] for piece, offset in kept)


def test_small_pieces_share_a_mapping_and_nothing_else_stays_mapped(
    content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []

    class Counting(mmap.mmap):
        def __new__(cls, handle: int, length: int, **options: Any) -> Counting:
            made.append(length)
            return super().__new__(cls, handle, length, **options)

    monkeypatch.setattr(stored_file.mmap, "mmap", Counting)
    file = StoredFile(tmp_path / "file")
    kept = [file.read(offset, 100) for offset in range(0, 10 * WINDOW - 100, 1000)]
    # Each window once, plus the pieces that cross two windows.
    assert len(made) <= 20
    assert sum(made) <= 10 * WINDOW + 10 * 2 * mmap.ALLOCATIONGRANULARITY
    del kept
    assert len(file._windows) == 0
    made.clear()
    file.read(WINDOW // 2, 3 * WINDOW)
    assert made == [3 * WINDOW]


def test_a_copy_reads_the_same_file(content: bytes, tmp_path: Path) -> None:
    file = copy.deepcopy(StoredFile(tmp_path / "file"))
    (tmp_path / "file").unlink()
    assert file.read(5, 7).tobytes() == content[5:12]


def test_a_file_cut_while_open_is_an_error_about_the_tensor(content: bytes, tmp_path: Path) -> None:
    file = StoredFile(tmp_path / "file")
    os.truncate(tmp_path / "file", len(content) - 1)
    with pytest.raises(InvalidFileError) as caught:
        file.read(0, 1, "weight")
    assert (caught.value.problems[0].kind, caught.value.problems[0].tensor) == ("file_changed", "weight")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's account of the address space")
def test_a_source_ten_times_the_address_space_opens_and_reads(tmp_path: Path) -> None:
    code = """
        import json, resource, sys
        from pathlib import Path
        from cluscomp_export.sources import open_source
        from cluscomp_formats.safetensors.spec import Entry
        from cluscomp_formats.safetensors.writer import header_bytes

        folder, size, count = Path(sys.argv[1]), 1 << 26, 80
        entries = {str(n): Entry("float16", (1 << 10, size >> 11), n * size, (n + 1) * size) for n in range(count)}
        header = header_bytes(entries)
        with (folder / "model.safetensors").open("wb") as stream:
            stream.write(header)
            stream.truncate(len(header) + count * size)
        (folder / "config.json").write_text("{}")
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        used = int(status.split("VmSize:")[1].split()[0]) * 1024
        resource.setrlimit(resource.RLIMIT_AS, (used + 8 * size, used + 8 * size))
        model = open_source(folder)
        assert len(model.tensors) == count
        for tensor in model.tensors.values():
            values = tensor.values.read()
            assert values[0, 0] == values[-1, -1] == 0
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
