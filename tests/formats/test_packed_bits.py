"""Bit packing of codes, compared with hand-computed streams and with arithmetic on a big integer."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluscomp_formats.sections import bits as bits_module
from cluscomp_formats.sections.bits import pack_bits, packed_bytes, unpack_bits


def stream_of(codes: list[int], bits: int) -> bytes:
    """Pack by definition: the codes are the digits of one integer, least significant first."""
    total = sum(code << (bits * index) for index, code in enumerate(codes))
    return total.to_bytes((len(codes) * bits + 7) // 8, "little")


def test_three_bit_codes_by_hand() -> None:
    # 1, 2, 3 are 001, 010, 011: written from the least significant bit up, byte 0 is 11 010 001, byte 1 is 0.
    packed = pack_bits(np.array([1, 2, 3], dtype=np.uint16), 3)
    assert packed.tolist() == [0b11010001, 0]
    assert unpack_bits(packed, 3, 3).tolist() == [1, 2, 3]


def test_twelve_bit_codes_by_hand() -> None:
    packed = pack_bits(np.array([0xABC, 0x123], dtype=np.uint16), 12)
    assert packed.tolist() == [0xBC, 0x3A, 0x12]


def test_sixteen_bit_codes_are_plain_little_endian() -> None:
    assert pack_bits(np.array([0x1234, 0xFFFF], dtype=np.uint16), 16).tobytes() == b"\x34\x12\xff\xff"


@st.composite
def coded(draw: st.DrawFn) -> tuple[int, list[int]]:
    bits = draw(st.integers(1, 16))
    return bits, draw(st.lists(st.integers(0, 2**bits - 1), max_size=70))


@given(coded())
def test_packs_as_the_definition_says_and_unpacks(case: tuple[int, list[int]]) -> None:
    bits, codes = case
    packed = pack_bits(np.array(codes, dtype=np.uint16), bits)
    assert packed.tobytes() == stream_of(codes, bits)
    assert unpack_bits(packed, len(codes), bits).tolist() == codes


@pytest.mark.parametrize("bits", range(1, 17))
def test_blocks_join_without_a_seam(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bits_module, "_BLOCK", 32)
    for count in (31, 32, 33, 64, 95, 100):
        codes = np.random.default_rng(count).integers(0, 2**bits, count).astype(np.uint16)
        packed = pack_bits(codes, bits)
        assert packed.tobytes() == stream_of(codes.tolist(), bits)
        assert np.array_equal(unpack_bits(packed, count, bits), codes)


@pytest.mark.parametrize("bits", range(1, 17))
def test_streams_longer_than_a_block(bits: int) -> None:
    codes = np.random.default_rng(bits).integers(0, 2**bits, bits_module._BLOCK + 21).astype(np.uint16)
    packed = pack_bits(codes, bits)
    wide = np.unpackbits(codes.view(np.uint8), bitorder="little").reshape(-1, 16)
    assert np.array_equal(packed, np.packbits(wide[:, :bits].reshape(-1), bitorder="little"))
    assert np.array_equal(unpack_bits(packed, codes.size, bits), codes)


@pytest.mark.parametrize("bits", [1, 7, 8, 12, 15, 16])
def test_unpacks_read_only_and_unaligned_bytes(bits: int) -> None:
    codes = np.arange(40, dtype=np.uint16) & (2**bits - 1)
    shifted = np.frombuffer(b"\0" + pack_bits(codes, bits).tobytes(), dtype=np.uint8)[1:]
    assert np.array_equal(unpack_bits(shifted, 40, bits), codes)


def test_takes_codes_of_any_shape_and_stride_in_row_major_order() -> None:
    codes = np.arange(24, dtype=np.uint16).reshape(4, 6).T
    assert pack_bits(codes, 5).tobytes() == stream_of(codes.reshape(-1).tolist(), 5)


@pytest.mark.parametrize("bits", [0, 17, -1])
def test_refuses_other_widths(bits: int) -> None:
    with pytest.raises(ValueError, match="1 to 16 bits"):
        pack_bits(np.zeros(1, dtype=np.uint16), bits)
    with pytest.raises(ValueError, match="1 to 16 bits"):
        unpack_bits(np.zeros(1, dtype=np.uint8), 1, bits)


def test_refuses_other_types_and_lengths() -> None:
    with pytest.raises(TypeError, match="uint16"):
        pack_bits(np.zeros(1, dtype=np.int32), 4)
    with pytest.raises(ValueError, match="take 5 bytes"):
        unpack_bits(np.zeros(4, dtype=np.uint8), 3, 12)
    assert packed_bytes(3, 12) == 5
