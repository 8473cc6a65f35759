"""Tiled codes: against the specification's order, code by code, and back."""

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluscomp_formats import Array, Codebook, Stage, tiled_codes
from cluscomp_formats.sections import tiles
from cluscomp_formats.sections.bits import largest_code, pack_bits, packed_bytes
from cluscomp_formats.sections.tiles import largest_padding, tile_codes, tiled_bytes, tiled_pieces, untile_codes

Codes = npt.NDArray[np.uint16]


def places(in_features: int, groups: int) -> list[tuple[int, int]]:
    """Channel and group of each stored code, including those of the padding, in the order of `docs/packed-format.md`."""
    order = []
    for tile in range(-(-groups // 16)):
        width = min(16, groups - 16 * tile)
        for quad in range(-(-in_features // 4)):
            for group in range(width + width % 2):
                order += [(4 * quad + channel, 16 * tile + group) for channel in range(4)]
    return order


def stream_of(codes: list[int], bits: int) -> bytes:
    stream = sum(code << (bits * index) for index, code in enumerate(codes))
    return stream.to_bytes(packed_bytes(len(codes), bits), "little")


def random_codes(in_features: int, groups: int, bits: int) -> Codes:
    random = np.random.default_rng([in_features, groups, bits])
    return random.integers(0, 1 << bits, (in_features, groups)).astype(np.uint16)


@given(st.integers(1, 13), st.integers(1, 70), st.integers(1, 16))
def test_codes_lie_in_the_order_of_the_specification(in_features: int, groups: int, bits: int) -> None:
    codes = random_codes(in_features, groups, bits)
    stored = [int(codes[at]) if at[0] < in_features and at[1] < groups else 0 for at in places(in_features, groups)]
    stream = tile_codes(codes, bits)
    assert stream.tobytes() == stream_of(stored, bits)
    assert stream.size == tiled_bytes(in_features, groups, bits) == len(stored) * bits // 8
    assert np.array_equal(untile_codes(stream, in_features, groups, bits), codes)
    assert largest_padding(stream, in_features, groups, bits) == 0
    assert largest_code(stream, len(stored), bits) == codes.max()


def test_the_example_of_the_specification() -> None:
    codes = np.array([[0, 1, 2]] * 2 + [[2, 1, 0]], dtype=np.uint16)
    assert tile_codes(codes, 2).tobytes() == bytes.fromhex("20 15 0a 00")


@pytest.mark.parametrize("bits", [1, 3, 8, 11, 16])
@pytest.mark.parametrize("shape", [(5, 200), (64, 48), (7, 33), (2100, 17)])
def test_pieces_of_any_length_give_the_same(monkeypatch: pytest.MonkeyPatch, bits: int, shape: tuple[int, int]) -> None:
    codes = random_codes(*shape, bits)
    stream = tile_codes(codes, bits)
    monkeypatch.setattr(tiles, "_PIECE", 1)
    pieces = list(tiled_pieces(codes, bits))
    assert len(pieces) == -(-shape[1] // 16)
    assert np.array_equal(np.concatenate(pieces), stream)
    assert np.array_equal(untile_codes(stream, *shape, bits), codes)


@given(st.integers(1, 9), st.integers(1, 40), st.integers(1, 16), st.data())
def test_any_padding_that_is_not_zero_is_found(in_features: int, groups: int, bits: int, data: st.DataObject) -> None:
    order = places(in_features, groups)
    padding = [at for at, (channel, group) in enumerate(order) if channel >= in_features or group >= groups]
    if not padding:
        return
    stored = [0 if at in padding else (1 << bits) - 1 for at in range(len(order))]
    code = data.draw(st.integers(1, (1 << bits) - 1))
    stored[data.draw(st.sampled_from(padding))] = code
    stream = np.frombuffer(stream_of(stored, bits), dtype=np.uint8)
    assert largest_padding(stream, in_features, groups, bits) == code
    assert untile_codes(stream, in_features, groups, bits).min() == (1 << bits) - 1


@pytest.mark.parametrize("bits", [3, 8, 16])
def test_other_layouts_in_memory_give_the_same(bits: int) -> None:
    codes = random_codes(24, 20, bits)
    assert np.array_equal(tile_codes(np.asfortranarray(codes), bits), tile_codes(codes, bits))
    assert np.array_equal(tile_codes(codes[::2, 3:], bits), tile_codes(codes[::2, 3:].copy(), bits))


def test_the_largest_code_of_a_long_stream() -> None:
    codes = np.zeros(200_001, dtype=np.uint16)
    codes[131_072] = 0x155
    assert largest_code(pack_bits(codes, 9), codes.size, 9) == 0x155
    assert largest_code(pack_bits(codes, 16), codes.size, 16) == 0x155


def test_refuses_a_stream_of_the_wrong_length() -> None:
    with pytest.raises(ValueError, match="take 24 bytes"):
        untile_codes(np.zeros(23, dtype=np.uint8), 6, 7, 3)


def test_a_stage_gives_its_stored_codes_or_tiles_them() -> None:
    codes = random_codes(6, 5, 3)
    codebook = Codebook("c", Array.of(np.zeros((8, 2), dtype=np.float32)))
    stream = tile_codes(codes, 3)
    assert np.array_equal(tiled_codes(Stage(codebook, Array.of(codes))), stream)

    def unread() -> Codes:
        raise AssertionError

    assert tiled_codes(Stage(codebook, Array((6, 5), "uint16", unread, lambda: stream))) is stream


def test_a_codebook_of_another_width_gets_codes_of_its_width() -> None:
    codes = random_codes(6, 5, 3)
    stored = Array((6, 5), "uint16", lambda: codes, lambda: tile_codes(codes, 3))
    larger = Codebook("c", Array.of(np.zeros((16, 2), dtype=np.float32)))
    assert np.array_equal(tiled_codes(Stage(larger, stored)), tile_codes(codes, 4))
