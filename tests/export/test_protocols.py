"""How texts become windows."""

from __future__ import annotations

from typing import Any

import pytest

from cluscomp_export.evaluation.protocols import choose_protocol, join_rows
from cluscomp_formats.errors import InvalidRequestError


def test_llama_cpps_windows_begin_with_the_begin_token() -> None:
    protocol = choose_protocol(context=4)
    assert protocol.windows(range(10, 23), count=None, bos_id=None) == [[10, 11, 12, 13], [14, 15, 16, 17], [18, 19, 20, 21]]
    assert protocol.windows(range(10, 23), count=2, bos_id=1) == [[1, 11, 12, 13], [1, 15, 16, 17]]


def test_gptqs_windows_are_cut_as_they_come() -> None:
    protocol = choose_protocol("gptq", context=4)
    assert protocol.windows([1, *range(11, 19)], count=None, bos_id=1) == [[1, 11, 12, 13], [14, 15, 16, 17]]


def test_windows_overlap_by_what_the_stride_leaves() -> None:
    protocol = choose_protocol("gptq", context=4, stride=3)
    assert protocol.windows(range(10, 21), count=None, bos_id=None) == [[10, 11, 12, 13], [13, 14, 15, 16], [16, 17, 18, 19]]


@pytest.mark.parametrize("name", ["llama.cpp", "gptq"])
@pytest.mark.parametrize("stride", [1, 3, 7, 8, 15])
def test_overlapping_windows_score_no_token_twice_and_leave_none_out(name: str, stride: int) -> None:
    protocol = choose_protocol(name, context=16, stride=stride)
    windows = protocol.windows(range(100), count=None, bos_id=None)
    scored = [token for index, window in enumerate(windows) for token in window[protocol.first_scored(index) :]]
    assert scored == list(range(scored[0], windows[-1][-1] + 1))
    assert windows[-1][-1] + stride > 99


def test_defaults_do_not_exceed_what_the_model_takes() -> None:
    assert choose_protocol("llama.cpp", limit=4096).context == 512
    assert choose_protocol("llama.cpp", limit=256).context == 256
    assert choose_protocol("gptq", limit=4096).context == 2048
    assert choose_protocol("gptq", limit=512).context == 512


@pytest.mark.parametrize(
    "options",
    [
        {"name": "wikitext"},
        {"context": 3},
        {"name": "gptq", "context": 1},
        {"context": 513, "limit": 512},
        {"stride": 0},
        {"stride": 513},
        {"context": -1, "stride": -1},
    ],
)
def test_parameters_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError):
        choose_protocol(**options)


def test_too_little_text_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="too short"):
        choose_protocol(context=8).windows(range(7), count=None, bos_id=None)


@pytest.mark.parametrize(
    ("text", "joined"),
    [
        (" \n = Title = \n \n Words \n", "\n\n = Title = \n\n\n\n\n Words \n"),
        ("one\ntwo", "one\n\n\ntwo"),
        # Only \n ends a line, as in the files of the data set.
        ("a\u2028b\x0cc\n", "a\u2028b\x0cc\n"),
        ("", ""),
    ],
)
def test_lines_are_joined_as_rows_of_the_data_set(text: str, joined: str) -> None:
    assert join_rows(text) == joined


def test_only_gptq_joins_unless_told() -> None:
    assert choose_protocol().prepare("a\nb") == choose_protocol("gptq", join="none").prepare("a\nb") == "a\nb"
    assert choose_protocol("gptq").prepare("a\nb") == choose_protocol(join="rows").prepare("a\nb") == "a\n\n\nb"
