"""Bit-packed codes, from C and from numpy, against arithmetic on one big Python integer."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluscomp_kernels import native
from cluscomp_kernels.clus_linear import pack_codes, packed_size, unpack_codes


@pytest.fixture(params=["native", "numpy"], autouse=True)
def implementation(request: pytest.FixtureRequest) -> object:
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "numpy":
            patch.setattr(native, "library", lambda: None)
        elif native.library() is None:
            pytest.skip(native.missing_reason())
        yield request.param


def stream_of(codes: list[int], bits: int) -> bytes:
    whole = sum(code << (index * bits) for index, code in enumerate(codes))
    return whole.to_bytes((len(codes) * bits + 7) // 8, "little")


def test_hand_computed_stream() -> None:
    # 1, 2, 3 of 3 bits: bits 100 010 110 in stream order, so byte 0 is 0b11010001 and byte 1 is 0
    packed = pack_codes(np.array([1, 2, 3], dtype=np.uint16), 3)
    assert packed.tolist() == [0b11010001, 0]
    assert unpack_codes(packed, 3, 3).tolist() == [1, 2, 3]


@pytest.mark.parametrize("bits", range(1, 17))
def test_agrees_with_integer_arithmetic(bits: int) -> None:
    random = np.random.default_rng(bits)
    for count in (0, 1, 2, 7, 8, 9, 63, 64, 65, 1001):
        codes = random.integers(0, 1 << bits, count).astype(np.uint16)
        codes[-1:] = (1 << bits) - 1
        expected = stream_of(codes.tolist(), bits)
        assert pack_codes(codes, bits).tobytes() == expected
        assert np.array_equal(unpack_codes(np.frombuffer(expected, dtype=np.uint8), count, bits), codes)


@pytest.mark.parametrize("bits", [1, 5, 12, 16])
def test_work_shared_by_threads_and_chunks(bits: int) -> None:
    count = 8192 * 8 * 3 + 5
    codes = np.random.default_rng(bits).integers(0, 1 << bits, count).astype(np.uint16)
    packed = pack_codes(codes, bits)
    spread = ((codes[:, None] >> np.arange(bits)) & 1).astype(np.uint8)
    assert np.array_equal(packed, np.packbits(spread.reshape(-1), bitorder="little"))
    assert np.array_equal(unpack_codes(packed, count, bits), codes)


cases = st.integers(1, 16).flatmap(lambda bits: st.tuples(st.just(bits), st.lists(st.integers(0, (1 << bits) - 1))))


@given(cases)
def test_round_trip(case: tuple[int, list[int]]) -> None:
    bits, codes = case
    packed = pack_codes(np.array(codes, dtype=np.uint16), bits)
    assert packed.tobytes() == stream_of(codes, bits)
    assert unpack_codes(packed, len(codes), bits).tolist() == codes


def test_unused_bits_are_ignored() -> None:
    assert unpack_codes(np.array([0xFF, 0xFF], dtype=np.uint8), 3, 5).tolist() == [31, 31, 31]


def test_wrong_arguments_are_refused() -> None:
    for size in (1, 3):
        with pytest.raises(ValueError, match=rf"shape \({size},\), expected \(2,\) for 3 codes of 3 bits"):
            unpack_codes(np.zeros(size, dtype=np.uint8), 3, 3)
    with pytest.raises(TypeError, match="int8, expected uint8"):
        unpack_codes(np.zeros(2, dtype=np.int8), 3, 3)
    with pytest.raises(ValueError, match="1 to 16 bits, got 17"):
        packed_size(1, 17)
    with pytest.raises(ValueError, match="cannot be negative"):
        packed_size(-1, 3)
    with pytest.raises(ValueError, match="codes go up to 8, which does not fit 3 bits"):
        pack_codes(np.array([8], dtype=np.uint16), 3)
    with pytest.raises(TypeError, match="expected uint16"):
        pack_codes(np.array([1]), 3)
    with pytest.raises(ValueError, match=r"expected \[count\]"):
        pack_codes(np.zeros((2, 2), dtype=np.uint16), 3)
