"""Checks of all payloads at once: in parallel, once, and without unpacking codes."""

from pathlib import Path
from zlib import crc32 as real_crc32

import numpy as np
import numpy.typing as npt
import pytest

from cluscomp_formats import InvalidFileError, check_payloads, tiled_codes
from cluscomp_formats.gguf import open_gguf, write_gguf
from cluscomp_formats.hf import open_hf, write_hf
from cluscomp_formats.ir import Array, ClusteredWeight, Codebook, Model, Stage
from cluscomp_formats.packed import open_packed, write_packed
from cluscomp_formats.sections import payloads
from cluscomp_formats.sections.bits import largest_code


def weight(name: str, num_clusters: int, axis: str = "out") -> ClusteredWeight:
    codebook = Codebook(name, Array.of(np.zeros((num_clusters, 2), dtype=np.float16)))
    codes = np.arange(24 * 20, dtype=np.uint16).reshape(24, 20) % num_clusters
    shape = (40, 24) if axis == "out" else (24, 40)
    return ClusteredWeight(name, shape, (Stage(codebook, Array.of(codes)),), "out" if axis == "out" else "in")


@pytest.fixture
def model() -> Model:
    weights = [weight("a", 6), weight("b", 8), weight("c", 300), weight("d", 6, "in")]
    return Model({}, {each.name: each for each in weights}, {"notes.txt": Array.of(np.arange(5, dtype=np.uint8))})


@pytest.mark.parametrize("workers", [None, 1, 3])
def test_checks_everything_once_and_unpacks_no_codes(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int | None
) -> None:
    write_packed(model, tmp_path / "m.clus")
    found = open_packed(tmp_path / "m.clus")
    checksums: list[int] = []

    def crc32(data: memoryview) -> int:
        checksums.append(data.nbytes)
        return real_crc32(data)

    def refuse(*_: object) -> npt.NDArray[np.uint16]:
        raise AssertionError

    scanned: list[tuple[int, int]] = []

    def largest(stream: npt.NDArray[np.uint8], count: int, bits: int) -> int:
        scanned.append((count, bits))
        return largest_code(stream, count, bits)

    monkeypatch.setattr("zlib.crc32", crc32)
    with monkeypatch.context() as patched:
        patched.setattr(payloads, "untile_codes", refuse)
        patched.setattr(payloads, "unpack_bits", refuse)
        check_payloads(found, workers=workers, largest=largest)
    # Codes of 8 clusters need no scan.
    assert sorted(scanned) == [(480, 3), (480, 3), (480, 9)]
    assert len(checksums) == 9
    check_payloads(found, largest=refuse)
    for name in ("a", "b", "c"):
        assert not tiled_codes(found.clustered[name].stages[0]).flags.owndata
    assert found.digest() == model.digest()
    assert len(checksums) == 9


def test_reports_every_fault_in_the_order_of_the_file(model: Model, tmp_path: Path) -> None:
    path = tmp_path / "m.clus"
    write_packed(model, path)
    with path.open("r+b") as stream:
        stream.seek(64)
        content = bytearray(stream.read())
        for tensor in ("c", "a"):
            codes = tiled_codes(model.clustered[tensor].stages[0]).tobytes()
            content[content.index(codes)] ^= 1
        stream.seek(64)
        stream.write(content)
    with pytest.raises(InvalidFileError) as caught:
        check_payloads(open_packed(path))
    assert [(problem.kind, problem.tensor) for problem in caught.value.problems] == [
        ("checksum_mismatch", "a"),
        ("checksum_mismatch", "c"),
    ]


def test_gguf_files_are_mapped_too_and_folders_are_tiled(model: Model, tmp_path: Path) -> None:
    write_gguf(model, tmp_path / "m.gguf")
    write_hf(model, tmp_path / "m")
    for found, mapped in ((open_gguf(tmp_path / "m.gguf"), True), (open_hf(tmp_path / "m"), False)):
        check_payloads(found)
        for name in ("a", "b", "c"):
            stage = found.clustered[name].stages[0]
            assert (stage.codes.tiled is not None) == mapped
            assert np.array_equal(tiled_codes(stage), tiled_codes(model.clustered[name].stages[0]))


def test_a_model_in_memory_has_nothing_to_check(model: Model) -> None:
    check_payloads(model)
