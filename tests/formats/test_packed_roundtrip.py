"""Any model written and read back is bit-identical, and writing it again gives the same bytes."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from model_strategies import assert_same, models

from cluscomp_formats import tiled_codes
from cluscomp_formats.ir import Array, ClusteredWeight, Codebook, DenseTensor, Model, Stage
from cluscomp_formats.packed import open_packed, read_header, write_packed
from cluscomp_formats.sections.tiles import tile_codes


@settings(max_examples=150, deadline=None)
@given(models())
def test_any_model_round_trips(tmp_path_factory: pytest.TempPathFactory, model: Model) -> None:
    path = tmp_path_factory.mktemp("roundtrip") / "model.clus"
    report = write_packed(model, path)
    found = open_packed(path, check=True)
    assert_same(found, model)
    assert report.digest == model.digest() == read_header(path).digest
    assert report.file_bytes == path.stat().st_size
    again = path.with_name("again.clus")
    write_packed(found, again)
    assert again.read_bytes() == path.read_bytes()


def test_sizes_are_what_the_model_says(tmp_path: Path) -> None:
    codebook = Codebook("c", Array.of(np.zeros((5, 4), dtype=np.float16)))
    codes = Array.of(np.zeros((16, 8), dtype=np.uint16))
    weight = ClusteredWeight("w", (32, 16), (Stage(codebook, codes),))
    report = write_packed(Model({}, {"w": weight}), tmp_path / "m.clus")
    assert report.payload_bytes == weight.own_bits // 8 + codebook.values.nbytes == 16 * 8 * 3 // 8 + 40
    assert report.num_sections == 2
    assert report.path == tmp_path / "m.clus"


def test_opening_reads_no_payload_and_arrays_are_read_only(tmp_path: Path) -> None:
    values = np.arange(4096, dtype=np.float32)
    path = tmp_path / "m.clus"
    write_packed(Model({}, {"d": DenseTensor("d", Array.of(values))}), path)
    damaged = bytearray(path.read_bytes())
    damaged[64] ^= 1
    path.write_bytes(damaged)
    array = open_packed(path).tensors["d"]
    assert array.shape == (4096,)
    path.write_bytes(bytes([*damaged[:64], damaged[64] ^ 1, *damaged[65:]]))
    found = open_packed(path).tensors["d"]
    assert isinstance(found, DenseTensor)
    assert np.array_equal(found.values.read(), values)
    assert not found.values.read().flags.writeable


def test_tiled_codes_are_mapped_not_copied(tmp_path: Path) -> None:
    codebook = Codebook("c", Array.of(np.zeros((6, 1), dtype=np.float16)))
    codes = np.arange(20, dtype=np.uint16).reshape(4, 5) % 6
    write_packed(Model({}, {"w": ClusteredWeight("w", (5, 4), (Stage(codebook, Array.of(codes)),))}), tmp_path / "m.clus")
    stage = open_packed(tmp_path / "m.clus").clustered["w"].stages[0]
    found = tiled_codes(stage)
    assert np.array_equal(found, tile_codes(codes, 3))
    assert not found.flags.owndata
    assert not found.flags.writeable
    assert np.shares_memory(found, tiled_codes(stage))
    assert np.array_equal(stage.codes.read(), codes)


def test_sixteen_bit_codes_along_the_in_axis_are_mapped_not_copied(tmp_path: Path) -> None:
    codebook = Codebook("c", Array.of(np.zeros((65536, 1), dtype=np.float16)))
    codes = np.arange(20, dtype=np.uint16).reshape(4, 5)
    weight = ClusteredWeight("w", (4, 5), (Stage(codebook, Array.of(codes)),), "in")
    write_packed(Model({}, {"w": weight}), tmp_path / "m.clus")
    array = open_packed(tmp_path / "m.clus").clustered["w"].stages[0].codes
    assert np.array_equal(array.read(), codes)
    assert not array.read().flags.owndata
    assert not array.read().flags.writeable
    assert array.tiled is None


def test_a_replaced_file_leaves_the_open_model_alone(tmp_path: Path) -> None:
    path = tmp_path / "m.clus"
    old, new = (Model({}, {"d": DenseTensor("d", Array.of(np.full(3, value)))}) for value in (1.0, 2.0))
    write_packed(old, path)
    opened = open_packed(path)
    write_packed(new, path, force=True)
    assert opened.tensors["d"].decode().tolist() == [1, 1, 1]
    assert open_packed(path).tensors["d"].decode().tolist() == [2, 2, 2]


def test_a_model_may_be_written_over_the_file_it_is_read_from(tmp_path: Path) -> None:
    path = tmp_path / "m.clus"
    write_packed(Model({"n": 1}, {"d": DenseTensor("d", Array.of(np.arange(9.0)))}), path)
    before = path.read_bytes()
    write_packed(open_packed(path), path, force=True)
    assert path.read_bytes() == before
