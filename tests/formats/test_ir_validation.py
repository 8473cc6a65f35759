"""Values that the IR rejects, and the storage and rounding of arrays."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from cluscomp_formats.ir import (
    DTYPES,
    Array,
    ClusteredWeight,
    Codebook,
    DenseTensor,
    Model,
    Outliers,
    Stage,
    bfloat16_to_float32,
    float32_to_bfloat16,
)
from cluscomp_formats.strict_json import canonical_json

CODEBOOK = Codebook("c", Array.of(np.zeros((3, 2), dtype=np.float16)))
STAGE = Stage(CODEBOOK, Array.of(np.zeros((4, 3), dtype=np.uint16)))


def floats(*shape: int) -> Array:
    return Array.of(np.ones(shape, dtype=np.float32))


def positions(count: int, dtype: str = "uint32") -> Array:
    return Array.of(np.arange(count, dtype=dtype))


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "unknown dtype": (lambda: Array((1,), "float8", lambda: np.zeros(1)), "unknown dtype 'float8'"),
    "unknown numpy dtype": (lambda: Array.of(np.zeros(1, dtype=np.complex64)), "unknown dtype 'complex64'"),
    "negative length": (lambda: Array((2, -1), "int8", lambda: np.zeros(1)), "negative"),
    "bfloat16 as floats": (lambda: Array.of(np.zeros(2, dtype=np.float32), "bfloat16"), "bit patterns"),
    "vector as codebook": (lambda: Codebook("c", floats(3)), "must be 2-D"),
    "codebook of float64": (lambda: Codebook("c", Array.of(np.zeros((3, 2)))), "float32 or float16 or bfloat16 or int8"),
    "codebook of uint8": (lambda: Codebook("c", Array.of(np.zeros((3, 2), np.uint8))), "got uint8"),
    "no clusters": (lambda: Codebook("c", floats(0, 4)), "1 to 65536 clusters"),
    "empty vectors": (lambda: Codebook("c", floats(4, 0)), "shape"),
    "too many clusters": (lambda: Codebook("c", floats(65537, 1)), "1 to 65536 clusters"),
    "no stages": (lambda: ClusteredWeight("w", (6, 4), ()), "at least one stage"),
    "codes of another shape": (lambda: ClusteredWeight("w", (4, 6), (STAGE,)), r"expected uint16 \(6, 2\)"),
    "codes of another axis": (lambda: ClusteredWeight("w", (6, 4), (STAGE,), "in"), r"expected uint16 \(6, 2\)"),
    "codes of another dtype": (
        lambda: ClusteredWeight("w", (6, 4), (Stage(CODEBOOK, Array.of(np.zeros((4, 3), dtype=np.int32))),)),
        "codes are int32",
    ),
    "unknown axis": (lambda: ClusteredWeight("w", (6, 4), (STAGE,), "across"), "group_axis must be 'out' or 'in'"),  # type: ignore[arg-type]
    "empty weight": (lambda: ClusteredWeight("w", (0, 4), (STAGE,)), "out_features"),
    "row scale of another length": (lambda: ClusteredWeight("w", (6, 4), (STAGE,), row_scale=floats(4)), "row_scale"),
    "column scale of another length": (lambda: ClusteredWeight("w", (6, 4), (STAGE,), column_scale=floats(6)), "column_scale"),
    "integer scale": (lambda: ClusteredWeight("w", (6, 4), (STAGE,), row_scale=positions(6)), "expected float"),
    "signed positions": (lambda: Outliers(positions(2, "int64"), floats(2)), "uint32 or uint64"),
    "positions as a matrix": (lambda: Outliers(Array.of(np.zeros((1, 1), dtype=np.uint32)), floats(1, 1)), "1-D"),
    "more values than positions": (lambda: Outliers(positions(2), floats(3)), "expected float"),
    "tensor under another name": (lambda: Model({}, {"a": DenseTensor("b", floats(1))}), "'b' is listed under 'a'"),
    "two codebooks of one name": (
        lambda: Model(
            {},
            {
                "v": ClusteredWeight("v", (6, 4), (STAGE,)),
                "w": ClusteredWeight("w", (6, 4), (Stage(Codebook("c", floats(3, 2)), STAGE.codes),)),
            },
        ),
        "two different codebooks are called 'c'",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses(case: str) -> None:
    make, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        make()


def test_sizes_cost_no_io() -> None:
    def loader() -> Any:
        raise AssertionError("read although only sizes were asked for")

    array = Array((3, 5), "bfloat16", loader)
    assert (array.size, array.nbytes) == (15, 30)
    assert Array((), "float64", loader).nbytes == 8
    assert Array((4, 0), "float64", loader).nbytes == 0


@pytest.mark.parametrize("wrong", [np.zeros(3, dtype=np.float32), np.zeros(2, dtype=np.float64), np.zeros((2, 1), dtype="f4")])
def test_a_loader_that_breaks_its_promise_is_found(wrong: Any) -> None:
    with pytest.raises(ValueError, match="declared float32"):
        Array((2,), "float32", lambda: wrong).read()


def test_reading_gives_contiguous_values_of_the_declared_shape() -> None:
    transposed = np.arange(6, dtype=np.float32).reshape(2, 3).T
    for array in (Array.of(transposed), Array((3, 2), "float32", lambda: transposed)):
        assert array.read().flags.c_contiguous
        assert array.read().tolist() == [[0, 3], [1, 4], [2, 5]]


def test_scalars_stay_scalars() -> None:
    scalar = np.array(2.5, dtype=np.float32)
    for array in (Array.of(scalar), Array((), "float32", lambda: scalar)):
        assert array.read().shape == ()
        assert array.to_float32() == np.float32(2.5)


@pytest.mark.parametrize("dtype", [name for name in DTYPES if name != "bfloat16"])
def test_every_dtype_is_held_by_the_numpy_type_of_its_name(dtype: str) -> None:
    assert DTYPES[dtype].name == dtype
    assert DTYPES[dtype].newbyteorder("<") == DTYPES[dtype]
    assert Array.of(np.ones(2, dtype=dtype)).to_float32().tolist() == [1, 1]


def test_big_endian_arrays_are_stored_little_endian() -> None:
    assert Array.of(np.array([1.5], dtype=">f4")).read().tobytes() == np.array([1.5], dtype="<f4").tobytes()


def test_bfloat16_rounds_to_nearest_even_by_hand() -> None:
    # 1 + 2**-8 lies halfway between 1 (0x3F80, even) and 1 + 2**-7 (0x3F81); 1 + 3 * 2**-8 halfway to 0x3F82.
    values = np.array([1, 1 + 2**-8, 1 + 2**-8 + 2**-20, 1 + 3 * 2**-8, -0.0, np.inf, 3.4e38], dtype=np.float32)
    assert [hex(bits) for bits in float32_to_bfloat16(values)] == [
        "0x3f80",
        "0x3f80",
        "0x3f81",
        "0x3f82",
        "0x8000",
        "0x7f80",
        "0x7f80",
    ]


def test_bfloat16_rounds_as_torch_does() -> None:
    bits = np.random.default_rng(0).integers(0, 2**32, 200_000, dtype=np.uint32)
    values = bits.view(np.float32)
    ours = bfloat16_to_float32(float32_to_bfloat16(values))
    theirs = torch.from_numpy(values).to(torch.bfloat16).to(torch.float32).numpy()
    assert np.array_equal(ours, theirs, equal_nan=True)
    assert np.isnan(values).any()


def test_every_bfloat16_survives_widening_and_rounding() -> None:
    bits = np.arange(65536, dtype=np.uint16)
    wide = bfloat16_to_float32(bits)
    assert np.array_equal(wide, torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16).float().numpy(), equal_nan=True)
    kept = ~np.isnan(wide)
    assert np.array_equal(float32_to_bfloat16(wide)[kept], bits[kept])


def test_canonical_json() -> None:
    assert canonical_json({"b": [1, 1.0, 1e-07, None, True], "a": "é"}) == '{"a":"\\u00e9","b":[1,1.0,1e-07,null,true]}'
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_json({"a": float("nan")})
