"""What `inspect` says of models whose every figure is known."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from packed_surgery import header_of, with_section
from safetensors.numpy import load_file, save_file

from cluscomp_export.cli.tables import print_inspection
from cluscomp_export.inspection.inspect import Inspection, inspect_model
from cluscomp_formats import registry
from cluscomp_formats.errors import InvalidRequestError
from cluscomp_formats.format import Format
from cluscomp_formats.ir import AnyArray, Array, ClusteredWeight, Codebook, DenseTensor, Model, Outliers, Stage, Tensor
from cluscomp_formats.packed import write_packed

Inspect = Callable[..., Inspection]

SHARED = Codebook("shared", Array.of(np.array([[0, 0], [1, 1], [0, 0], [2, 2]], np.float16)))
"""Centroids 0 and 2 are the same; a code takes 2 bits."""

SIGNS = Codebook("signs", Array.of(np.array([[0.0], [-0.0], [1.0]], np.float32)))
"""Zeros of both signs are not the same bits."""


def weight(name: str, codebook: Codebook, codes: list[list[int]], shape: tuple[int, int], **extras: Any) -> ClusteredWeight:
    return ClusteredWeight(name, shape, (Stage(codebook, Array.of(np.array(codes, np.uint16))),), **extras)


def model_of(*tensors: Tensor) -> Model:
    return Model({"model_type": "strange"}, {tensor.name: tensor for tensor in tensors})


KNOWN = model_of(
    weight("layers.0.a.weight", SHARED, [[0, 0], [1, 1]], (4, 2)),
    weight("layers.0.b.weight", SHARED, [[0, 0], [0, 0]], (4, 2)),
    weight("layers.0.c.weight", SIGNS, [[0, 1], [0, 1]], (2, 2)),
    DenseTensor("norm.weight", Array.of(np.ones(3, np.float32))),
)
"""`shared`: 6 codes say 0 and 2 say 1. `signs`: 2 codes say 0 and 2 say 1, so a code tells 1 bit in 2."""


@pytest.fixture
def known(tmp_path: Path) -> Path:
    write_packed(KNOWN, tmp_path / "known.clus")
    return tmp_path / "known.clus"


@pytest.fixture
def inspect_lenient(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Inspect:
    """Inspects a model as the reader of a format that checks nothing gives it."""

    def inspect(model: Model, **options: Any) -> Inspection:
        fmt = Format("lenient", "of this test", lambda _: True, lambda _: model)
        monkeypatch.setattr(registry, "formats", lambda: (fmt,))
        (tmp_path / "lenient").touch()
        return inspect_model(tmp_path / "lenient", **options)

    return inspect


def by_name(rows: list[dict[str, Any]], name: str) -> dict[str, Any]:
    return next(row for row in rows if row["name"] == name)


def test_the_use_of_codebooks(known: Path) -> None:
    report = inspect_model(known)
    assert report.problems == []
    assert report.digest == KNOWN.digest()
    assert by_name(report.codebooks, "shared") == {
        "name": "shared",
        "dim": 2,
        "clusters": 4,
        "dtype": "float16",
        "code_bits": 2,
        "codes": 8,
        "tensors": 2,
        "dead": 2,
        "duplicates": 1,
        # 3/4 log2 4/3 + 1/4 log2 4
        "entropy_bits": pytest.approx(2 - 0.75 * math.log2(3), abs=1e-12),
        "largest_share": 0.75,
        "out_of_range": 0,
        "not_finite": False,
    }
    signs = by_name(report.codebooks, "signs")
    assert [signs[key] for key in ("dead", "duplicates", "entropy_bits", "largest_share")] == [1, 0, 1.0, 0.5]


def test_tensors_are_ranked_by_what_their_codes_leave_unused(known: Path) -> None:
    report = inspect_model(known)
    # a: 4 codes of 2 bits that tell 1, over 8 weights. b: 4 that tell nothing. c: 4 codes over 4 weights.
    unused = {row["name"]: row["unused_bits_per_weight"] for row in report.tensors}
    assert unused == {"layers.0.a.weight": 0.5, "layers.0.b.weight": 1.0, "layers.0.c.weight": 1.0, "norm.weight": None}
    names = ["layers.0.b.weight", "layers.0.c.weight", "layers.0.a.weight"]
    assert report.worst_tensors == {"by": "unused_bits_per_weight", "names": names}


def test_stages_that_share_a_codebook_count_together(inspect_lenient: Inspect) -> None:
    one = weight("w", SHARED, [[0, 1], [0, 1]], (4, 2))
    two = replace(one, stages=(*one.stages, Stage(SHARED, Array.of(np.array([[2, 3], [2, 3]], np.uint16)))))
    report = inspect_lenient(model_of(two))
    shared = report.codebooks[0]
    assert [shared[key] for key in ("codes", "tensors", "dead", "entropy_bits")] == [8, 1, 0, 2.0]
    # Each stage tells 1 bit in 2, 4 codes each over 8 weights.
    assert report.tensors[0]["unused_bits_per_weight"] == 1.0


def test_every_payload_is_read_once_and_none_if_quick(inspect_lenient: Inspect) -> None:
    reads: Counter[str] = Counter()

    def counted(name: str, array: Array) -> Array:
        def load() -> AnyArray:
            reads[name] += 1
            return array.read()

        return Array(array.shape, array.dtype, load)

    book = Codebook("book", counted("book", SHARED.values))
    codes = Array.of(np.zeros((2, 2), np.uint16))
    first, second = (ClusteredWeight(name, (4, 2), (Stage(book, counted(name, codes)),)) for name in "ab")
    report = inspect_lenient(model_of(first, second), quick=True)
    assert (report.digest, report.problems, report.exit_code) == (None, [], 0)
    (row,) = report.codebooks
    assert (row["codes"], row["dead"], row["not_finite"]) == (8, None, None)
    assert report.worst_tensors["names"] == []
    assert not reads
    assert inspect_lenient(model_of(first, second)).digest
    assert reads == {"book": 1, "a": 1, "b": 1}


def damaged(known: Path) -> None:
    """A code past its codebook, an unreadable array of codes and a centroid that is not finite, in one file.

    Sections: shared, a, b, signs, c, norm.
    """
    data = known.read_bytes()
    data = with_section(data, 3, np.array([[0.0], [np.nan], [1.0]], np.float32).tobytes())
    data = with_section(data, 4, bytes([0b00_00_00_11, 0b00_00_00_11]))
    flipped = bytearray(data)
    flipped[header_of(data)["sections"][2]["offset"]] ^= 1
    known.write_bytes(flipped)


def test_all_that_is_wrong_with_a_file_is_listed(known: Path) -> None:
    damaged(known)
    report = inspect_model(known)
    assert report.exit_code == 3
    assert report.digest is None
    assert [(problem["kind"], problem["tensor"]) for problem in report.problems] == [
        ("checksum_mismatch", "layers.0.b.weight"),
        ("not_finite", "signs"),
        ("code_out_of_range", "layers.0.c.weight"),
    ]
    shared, signs = (by_name(report.codebooks, name) for name in ("shared", "signs"))
    # What is not known of some codes is not known of the codebook.
    assert [shared[key] for key in ("dead", "duplicates", "entropy_bits", "out_of_range")] == [None, 1, None, 0]
    assert [signs[key] for key in ("dead", "duplicates", "out_of_range", "not_finite")] == [None, None, 1, True]
    assert by_name(report.tensors, "layers.0.a.weight")["unused_bits_per_weight"] == 0.5
    assert report.worst_tensors["names"] == ["layers.0.a.weight"]


def test_a_faulty_file_is_held_against_its_original_as_far_as_it_is_sound(known: Path, tmp_path: Path) -> None:
    write_packed(KNOWN, tmp_path / "original.clus")
    damaged(known)
    report = inspect_model(known, reference=tmp_path / "original.clus")
    assert len(report.problems) == 3
    assert report.reference["differences"] == []
    errors = {row["name"]: row["relative_error"] for row in report.tensors}
    # b cannot be read, c has faulty codes of a faulty codebook.
    assert errors == {"layers.0.a.weight": 0, "layers.0.b.weight": None, "layers.0.c.weight": None, "norm.weight": 0}


def test_a_reader_that_checks_nothing_makes_no_difference(inspect_lenient: Inspect) -> None:
    infinite = Array.of(np.array([1, np.inf], np.float16))
    unsorted = Outliers(Array.of(np.array([3, 3], np.uint32)), Array.of(np.zeros(2, np.float32)))
    report = inspect_lenient(
        model_of(
            weight("a", SHARED, [[0, 9], [0, 0]], (4, 2)),
            weight("b", SHARED, [[0, 0], [0, 0]], (4, 2), column_scale=infinite),
            weight("c", SIGNS, [[0, 1], [0, 1]], (2, 2), outliers=unsorted),
            DenseTensor("norm", Array.of(np.array([0x7F80, 0x3F80], np.uint16), "bfloat16")),
        )
    )
    assert [(problem["kind"], problem["tensor"]) for problem in report.problems] == [
        ("code_out_of_range", "a"),
        ("not_finite", "b"),
        ("outliers_unsorted", "c"),
        ("not_finite", "norm"),
    ]
    assert report.problems[3]["found"] == "1 of 2 values"
    assert by_name(report.codebooks, "shared")["out_of_range"] == 1
    assert by_name(report.codebooks, "shared")["dead"] is None
    assert report.exit_code == 3


def test_a_dense_source_has_no_codebooks_and_is_checked_too(stories_folder: Path, tmp_path: Path) -> None:
    report = inspect_model(stories_folder)
    assert (report.format, report.codebooks, report.problems) == ("huggingface", [], [])
    assert report.worst_tensors["names"] == []
    tensors = load_file(stories_folder / "model.safetensors")
    tensors["model.norm.weight"][3] = np.nan
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((stories_folder / "config.json").read_bytes())
    problems = inspect_model(tmp_path).problems
    assert [(problem["kind"], problem["tensor"], problem["found"]) for problem in problems] == [
        ("not_finite", "model.norm.weight", "1 of 64 values")
    ]


def test_the_errors_against_a_reference(known: Path, tmp_path: Path) -> None:
    # a decodes to [0, 1] in each row.
    a, b = np.full((4, 2), 0.5, np.float32), np.zeros((4, 2), np.float32)
    original = model_of(DenseTensor("layers.0.a.weight", Array.of(a)), DenseTensor("layers.0.b.weight", Array.of(b)))
    write_packed(original, tmp_path / "original.clus")
    report = inspect_model(known, reference=tmp_path / "original.clus")
    row = by_name(report.tensors, "layers.0.a.weight")
    assert (row["relative_error"], row["largest_difference"]) == (1.0, 0.5)
    assert by_name(report.tensors, "layers.0.b.weight")["relative_error"] == 0
    assert report.worst_tensors == {"by": "relative_error", "names": ["layers.0.a.weight"]}
    assert report.reference["differences"] == ["only the second has 2 tensor(s): layers.0.c.weight, norm.weight"]
    json.dumps(vars(report), allow_nan=False)
    with pytest.raises(InvalidRequestError, match="`quick`"):
        inspect_model(known, reference=known, quick=True)


def test_an_error_against_zeros_is_no_number(known: Path, tmp_path: Path) -> None:
    zeros = DenseTensor("layers.0.a.weight", Array.of(np.zeros((4, 2), np.float32)))
    write_packed(model_of(zeros), tmp_path / "original.clus")
    report = inspect_model(known, reference=tmp_path / "original.clus")
    row = by_name(report.tensors, "layers.0.a.weight")
    assert (row["relative_error"], row["largest_difference"]) == (None, 1.0)


def test_the_tables_say_the_same(known: Path, capsys: pytest.CaptureFixture[str]) -> None:
    print_inspection(inspect_model(known))
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "shared 1 2 x 4 float16 2 1 0.81 of 2 75.00% 0" in lines
    # Tiled codes of 2 channels have as many of padding.
    assert "layers.0.b.weight 1.00 2.00" in lines
    print_inspection(inspect_model(known, quick=True))
    assert "? of 2" in capsys.readouterr().out
    damaged(known)
    print_inspection(inspect_model(known))
    captured = capsys.readouterr()
    assert "problems: 3" in captured.out
    assert captured.err.count("error: ") == 3


def test_the_page_has_every_member_of_the_report(known: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "inspect.md").read_text(encoding="utf-8")
    report = inspect_model(known, reference=known)
    members = {*vars(report), *report.codebooks[0], *report.worst_tensors, *report.reference, "relative_error"}
    assert [member for member in sorted(members) if f"`{member}`" not in page] == []
