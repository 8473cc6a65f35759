"""Strict JSON: the cost of checking a value."""

from __future__ import annotations

import json
import tracemalloc

import pytest

from cluscomp_formats.strict_json import StrictJsonError, json_faults, parse_strict


def test_faults_are_named_by_their_path() -> None:
    value = {"a": [1, {"b": float("inf")}], "k" * 300: {"c": 1 << 64}}
    assert dict(json_faults(value, "config")) == {
        "config.a[1].b": "the number inf",
        f"config.{'k' * 80}.c": "an integer of more than 64 bits",
    }


def test_a_long_name_is_not_repeated_for_every_member_below_it() -> None:
    text = json.dumps({"k" * 30_000: [0] * 30_000}).encode()
    tracemalloc.start()
    parse_strict(text)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # A path for each member would need 900 MB.
    assert peak < 100 * len(text)


@pytest.mark.parametrize("text", [b"[" * 70 + b"]" * 70, b"[" * 100_000, b'{"a":' * 100_000])
def test_deep_nesting_is_refused(text: bytes) -> None:
    with pytest.raises(StrictJsonError):
        parse_strict(text)
