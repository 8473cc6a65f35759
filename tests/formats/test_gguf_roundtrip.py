"""Any model written as GGUF and read back is bit-identical, and agrees with the packed format."""

from pathlib import Path

import gguf
import numpy as np
import pytest
from clustered_models import with_clusters
from gguf_surgery import rewrite
from hypothesis import given, settings
from model_builders import tiny_llama
from model_strategies import assert_same, models

from cluscomp_export.sources import open_source
from cluscomp_formats.gguf import looks_gguf, open_gguf, write_gguf
from cluscomp_formats.ir import Array, DenseTensor, Model
from cluscomp_formats.packed import open_packed, write_packed
from cluscomp_formats.registry import open_model


@settings(max_examples=150, deadline=None)
@given(models())
def test_any_model_round_trips(tmp_path_factory: pytest.TempPathFactory, model: Model) -> None:
    folder = tmp_path_factory.mktemp("roundtrip")
    path = folder / "model.gguf"
    report = write_gguf(model, path)
    found = open_gguf(path, check=True)
    assert_same(found, model)
    assert report.digest == model.digest()
    assert report.file_bytes == path.stat().st_size
    again = folder / "again.gguf"
    write_gguf(found, again)
    assert again.read_bytes() == path.read_bytes()


@settings(max_examples=40, deadline=None)
@given(models())
def test_by_way_of_the_packed_format_and_back_the_bytes_are_the_same(
    tmp_path_factory: pytest.TempPathFactory, model: Model
) -> None:
    folder = tmp_path_factory.mktemp("both")
    write_packed(model, folder / "1.clus")
    write_gguf(open_packed(folder / "1.clus"), folder / "1.gguf")
    write_packed(open_gguf(folder / "1.gguf"), folder / "2.clus")
    assert (folder / "1.clus").read_bytes() == (folder / "2.clus").read_bytes()


def test_the_registry_and_the_sources_open_it(tmp_path: Path) -> None:
    model = with_clusters(tiny_llama())
    path = tmp_path / "no-suffix"
    write_gguf(model, path)
    assert looks_gguf(path)
    assert_same(open_model(path), model)
    assert_same(open_source(path), model)


def test_a_file_rewritten_by_gguf_py_is_still_the_model(tmp_path: Path) -> None:
    model = with_clusters(tiny_llama())
    write_gguf(model, tmp_path / "ours.gguf")
    rewrite(tmp_path / "ours.gguf", tmp_path / "theirs.gguf", {"general.author": "someone"})
    assert_same(open_gguf(tmp_path / "theirs.gguf", check=True), model)


def test_a_model_may_be_written_over_the_file_it_is_read_from(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write_gguf(with_clusters(tiny_llama()), path)
    before = path.read_bytes()
    write_gguf(open_gguf(path), path, force=True)
    assert path.read_bytes() == before


def test_arrays_ggml_has_no_shape_for(tmp_path: Path) -> None:
    shapes: dict[str, tuple[int, ...]] = {"scalar": (), "empty": (0, 3), "five": (2, 1, 2, 1, 2)}
    values = {name: np.arange(int(np.prod(shape)), dtype=np.float32).reshape(shape) for name, shape in shapes.items()}
    model = Model({}, {name: DenseTensor(name, Array.of(array)) for name, array in values.items()})
    write_gguf(model, tmp_path / "m.gguf")
    assert_same(open_gguf(tmp_path / "m.gguf", check=True), model)
    stored = {tensor.name: tensor.shape.tolist() for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    assert stored == {"five": [8], "scalar": [1]}
