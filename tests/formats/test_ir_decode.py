"""`ClusteredWeight.decode()` against values computed by hand."""

from collections.abc import Sequence

import numpy as np
import pytest

from cluscomp_formats.ir import Array, ClusteredWeight, Codebook, DenseTensor, Outliers, Stage, float32_to_bfloat16

# Centroids whose digits tell which code (tens) and which position in the vector (ones) an element came from.
TENS = Codebook("tens", Array.of(np.array([[0, 1], [10, 11], [20, 21]], dtype=np.float16)))


def codes(rows: Sequence[Sequence[int]]) -> Array:
    return Array.of(np.array(rows, dtype=np.uint16))


def test_vectors_along_the_out_axis() -> None:
    # weight [out_features=3, in_features=2]; codes [in_features, groups]: input 0 has codes 1, 2 and input 1 has 0, 1.
    weight = ClusteredWeight("w", (3, 2), (Stage(TENS, codes([[1, 2], [0, 1]])),))
    expected = [
        [10, 0],
        [11, 1],
        [20, 10],  # the second element of the second group would be output 3, which does not exist
    ]
    assert weight.decode().tolist() == expected
    assert weight.decode().dtype == np.float32


def test_vectors_along_the_in_axis() -> None:
    # codes [out_features, groups]: the padding is now at the end of every row.
    weight = ClusteredWeight("w", (2, 3), (Stage(TENS, codes([[1, 2], [0, 1]])),), group_axis="in")
    assert weight.decode().tolist() == [[10, 11, 20], [0, 1, 10]]


def test_stages_add_up_and_may_differ_in_cluster_dim() -> None:
    hundreds = Codebook("hundreds", Array.of(np.array([[100, 200, 300], [400, 500, 600]], dtype=np.float32)))
    stages = (Stage(TENS, codes([[1, 2]])), Stage(hundreds, codes([[1]])))
    assert ClusteredWeight("w", (3, 1), stages).decode().tolist() == [[410], [511], [620]]


def test_two_stages_may_share_a_codebook() -> None:
    stages = (Stage(TENS, codes([[1]])), Stage(TENS, codes([[2]])))
    assert ClusteredWeight("w", (2, 1), stages).decode().tolist() == [[30], [32]]


def test_scales_multiply_rows_and_columns() -> None:
    weight = ClusteredWeight(
        "w",
        (2, 2),
        (Stage(TENS, codes([[1], [2]])),),
        row_scale=Array.of(np.array([1, 2], dtype=np.float16)),
        column_scale=Array.of(np.array([0.5, -1], dtype=np.float32)),
    )
    # Unscaled: [[10, 20], [11, 21]].
    assert weight.decode().tolist() == [[5, -20], [11, -42]]


def test_products_are_taken_in_float32_row_scale_first() -> None:
    one = Codebook("one", Array.of(np.array([[1.1]], dtype=np.float32)))
    row, column = np.float32(1.4), np.float32(1.7)
    weight = ClusteredWeight(
        "w",
        (1, 1),
        (Stage(one, codes([[0]])),),
        row_scale=Array.of(np.array([row])),
        column_scale=Array.of(np.array([column])),
    )
    assert weight.decode()[0, 0] == (np.float32(1.1) * row) * column
    assert (np.float32(1.1) * row) * column != np.float32(1.1) * (row * column)


@pytest.mark.parametrize("positions_dtype", [np.uint32, np.uint64])
def test_outliers_are_added_after_the_scales(positions_dtype: type) -> None:
    outliers = Outliers(
        Array.of(np.array([1, 2], dtype=positions_dtype)),
        Array.of(float32_to_bfloat16(np.array([0.5, -4], dtype=np.float32)), "bfloat16"),
    )
    scale = Array.of(np.array([2, 2], dtype=np.float32))
    weight = ClusteredWeight("w", (2, 2), (Stage(TENS, codes([[1], [2]])),), row_scale=scale, outliers=outliers)
    # Scaled: [[20, 40], [22, 42]]; position 1 is row 0, column 1, position 2 is row 1, column 0.
    assert weight.decode().tolist() == [[20, 40.5], [18, 42]]


def test_what_float32_cannot_hold_becomes_infinite_without_a_warning() -> None:
    scale = Array.of(np.array([1e300, 1.0]))
    book = Codebook("book", Array.of(np.array([[1.0, 3e38]], np.float32)))
    codes = Stage(book, Array.of(np.zeros((1, 1), np.uint16)))
    weight = ClusteredWeight("w", (2, 1), (codes, codes), row_scale=scale)
    assert weight.decode().tolist() == [[np.inf], [np.inf]]


def test_int8_codebook_holds_whole_numbers() -> None:
    codebook = Codebook("steps", Array.of(np.array([[127, -128], [3, -1]], dtype=np.int8)))
    stages = (Stage(codebook, codes([[1, 0], [0, 1]])),)
    assert ClusteredWeight("w", (4, 2), stages).decode().tolist() == [[3, 127], [-1, -128], [127, 3], [-128, -1]]
    scale = Array.of(np.array([1, 0.5, 2, 0.25], dtype=np.float16))
    scaled = ClusteredWeight("w", (4, 2), stages, row_scale=scale).decode()
    assert scaled.tolist() == [[3, 127], [-0.5, -64], [254, 6], [-32, -0.25]]
    assert codebook.values.nbytes == 4


def test_bfloat16_codebook() -> None:
    values = float32_to_bfloat16(np.array([[1.5, -2]], dtype=np.float32))
    codebook = Codebook("b", Array.of(values, "bfloat16"))
    assert ClusteredWeight("w", (2, 1), (Stage(codebook, codes([[0]])),)).decode().tolist() == [[1.5], [-2]]


def test_code_past_the_codebook_is_an_error() -> None:
    with pytest.raises(IndexError):
        ClusteredWeight("w", (2, 1), (Stage(TENS, codes([[3]])),)).decode()


def test_decoding_leaves_the_payloads_alone() -> None:
    dense = np.array([[1, 2]], dtype=np.float32)
    row_scale = np.array([3], dtype=np.float32)
    stage = Stage(Codebook("c", Array.of(dense)), codes([[0]]))
    weight = ClusteredWeight("w", (1, 2), (stage,), "in", row_scale=Array.of(row_scale))
    weight.decode()
    assert weight.decode().tolist() == [[3, 6]]
    assert dense.tolist() == [[1, 2]]
    assert row_scale.tolist() == [3]


def test_sizes_count_codes_at_their_true_width() -> None:
    weight = ClusteredWeight(
        "w",
        (3, 2),
        (Stage(TENS, codes([[1, 2], [0, 1]])),),
        row_scale=Array.of(np.ones(3, dtype=np.float16)),
    )
    # Tiled codes are padded to 4 channels and an even number of groups; three clusters take 2 bits.
    assert weight.own_bits == 4 * 2 * 2 + 3 * 16
    assert weight.num_weights == 6
    dense = DenseTensor("d", Array.of(np.ones((2, 3), dtype=np.float16)))
    assert dense.own_bits == 6 * 16
    assert dense.decode().dtype == np.float32


@pytest.mark.parametrize(
    ("num_clusters", "bits"), [(1, 1), (2, 1), (3, 2), (4, 2), (5, 3), (256, 8), (257, 9), (65535, 16), (65536, 16)]
)
def test_code_bits(num_clusters: int, bits: int) -> None:
    assert Codebook("c", Array.of(np.zeros((num_clusters, 1), dtype=np.float16))).code_bits == bits
