"""Any model written and read back is the same, bit for bit, and written again gives the same bytes."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluscomp_formats.ir import (
    CODEBOOK_DTYPES,
    DTYPES,
    FLOAT_DTYPES,
    Array,
    ClusteredWeight,
    Codebook,
    DenseTensor,
    Model,
    Outliers,
    Stage,
    Tensor,
)
from cluscomp_formats.packed import open_packed, read_header, write_packed

NAMES = st.text(st.characters(exclude_categories=["Cc", "Cs"]), min_size=1, max_size=12)
FILE_NAMES = NAMES.filter(lambda name: not set(name) & set("/\\:") and name not in (".", ".."))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(), children, max_size=3),
    max_leaves=8,
)
OBJECTS = st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), JSON, max_size=4)


def arbitrary(rng: np.random.Generator, dtype: str, shape: tuple[int, ...]) -> Array:
    """Any bits at all, NaN included."""
    count = int(np.prod(shape))
    if dtype == "bool":
        return Array.of((rng.integers(0, 2, count) == 1).reshape(shape))
    raw = rng.bytes(count * DTYPES[dtype].itemsize)
    return Array.of(np.frombuffer(raw, dtype=DTYPES[dtype]).reshape(shape), dtype)


def finite(rng: np.random.Generator, dtype: str, shape: tuple[int, ...]) -> Array:
    values = rng.standard_normal(shape)
    if dtype == "bfloat16":
        return Array.of((values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16), dtype)
    return Array.of(values.astype(dtype))


@st.composite
def clustered(draw: st.DrawFn, name: str, codebooks: list[Codebook], rng: np.random.Generator) -> ClusteredWeight:
    shape = (draw(st.integers(1, 20)), draw(st.integers(1, 20)))
    axis = draw(st.sampled_from(["out", "in"]))
    along, across = shape if axis == "out" else shape[::-1]
    stages = []
    for codebook in draw(st.lists(st.sampled_from(codebooks), min_size=1, max_size=3)):
        codes = rng.integers(0, codebook.num_clusters, (across, -(-along // codebook.cluster_dim)))
        codes.flat[0] = codebook.num_clusters - 1
        stages.append(Stage(codebook, Array.of(codes.astype(np.uint16))))
    floats = st.sampled_from(FLOAT_DTYPES)
    outliers = None
    if draw(st.booleans()):
        count = draw(st.integers(0, min(5, shape[0] * shape[1])))
        positions = np.sort(rng.choice(shape[0] * shape[1], count, replace=False))
        stored = positions.astype(draw(st.sampled_from(["uint32", "uint64"])))
        outliers = Outliers(Array.of(stored), finite(rng, draw(floats), (count,)))
    return ClusteredWeight(
        name,
        shape,
        tuple(stages),
        axis,
        finite(rng, draw(floats), shape[:1]) if draw(st.booleans()) else None,
        finite(rng, draw(floats), shape[1:]) if draw(st.booleans()) else None,
        outliers,
    )


@st.composite
def models(draw: st.DrawFn) -> Model:
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    sizes = st.one_of(st.integers(1, 40), st.sampled_from([255, 256, 257, 4096, 65535, 65536]))
    codebooks = [
        Codebook(name, finite(rng, draw(st.sampled_from(CODEBOOK_DTYPES)), (draw(sizes), draw(st.integers(1, 16)))))
        for name in draw(st.lists(NAMES, min_size=1, max_size=3, unique=True))
    ]
    tensors: dict[str, Tensor] = {}
    for name in draw(st.lists(NAMES, max_size=5, unique=True)):
        if draw(st.booleans()):
            tensors[name] = draw(clustered(name, codebooks, rng))
        else:
            shape = tuple(draw(st.lists(st.integers(0, 5), max_size=4)))
            tensors[name] = DenseTensor(name, arbitrary(rng, draw(st.sampled_from(list(DTYPES))), shape))
    contents = draw(st.dictionaries(FILE_NAMES, st.binary(max_size=40), max_size=3))
    files = {name: Array.of(np.frombuffer(content, dtype=np.uint8)) for name, content in contents.items()}
    return Model(draw(OBJECTS), tensors, files, draw(OBJECTS), draw(st.none() | OBJECTS))


def assert_same(found: Model, original: Model) -> None:
    assert (found.config, found.provenance, found.self_test) == (original.config, original.provenance, original.self_test)
    # Frozen dataclasses compare names, shapes, dtypes and structure; the payloads are compared below.
    assert found.tensors == original.tensors
    for (ours, ours_array), (theirs, theirs_array) in zip(found.payloads(), original.payloads(), strict=True):
        assert ours == theirs
        assert ours_array.read().tobytes() == theirs_array.read().tobytes(), ours
    assert found.files.keys() == original.files.keys()
    for name, array in found.files.items():
        assert array.read().tobytes() == original.files[name].read().tobytes()
    assert found.digest() == original.digest()


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


def test_sixteen_bit_codes_are_mapped_not_copied(tmp_path: Path) -> None:
    codebook = Codebook("c", Array.of(np.zeros((65536, 1), dtype=np.float16)))
    codes = np.arange(20, dtype=np.uint16).reshape(4, 5)
    write_packed(Model({}, {"w": ClusteredWeight("w", (5, 4), (Stage(codebook, Array.of(codes)),))}), tmp_path / "m.clus")
    found = open_packed(tmp_path / "m.clus").clustered["w"].stages[0].codes.read()
    assert np.array_equal(found, codes)
    assert not found.flags.owndata
    assert not found.flags.writeable


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
