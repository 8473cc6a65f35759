"""Any model the formats can hold, for property tests, and what it means for two models to be the same."""

import numpy as np
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
    if dtype == "int8":
        return Array.of(rng.integers(-128, 128, shape, dtype=np.int8))
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
