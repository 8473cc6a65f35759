"""Stock llama.cpp runs the dense files as we do, and refuses the native ones in its own words."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gguf_families import CONFIGS, random_model
from llama_cpp_parity import compare

from cluscomp_export.conversion.convert import ConversionOptions, convert
from cluscomp_export.sources import open_source
from cluscomp_formats.gguf import write_dense_gguf

NOTHING = {"text": "", "prompt_ids": [], "new_tokens": 0, "windows": []}


def test_the_native_flavour_is_refused_with_a_clear_message(packed: Path, tmp_path: Path, node: Callable[..., Any]) -> None:
    convert(packed, tmp_path / "native.gguf", ConversionOptions(to="gguf"))
    answer = node("llama_cpp.mjs", {"path": str(tmp_path / "native.gguf"), **NOTHING})
    assert "unknown model architecture: 'cluscomp'" in answer["refusal"]


@pytest.mark.usefixtures("node")
@pytest.mark.parametrize("gguf_type", ["f32", "f16", "bf16", "q8_0", "q4_1", "q4_0"])
def test_the_dense_flavour_means_the_same(packed: Path, stories_text: Path, tmp_path: Path, gguf_type: str) -> None:
    path = tmp_path / "dense.gguf"
    convert(packed, path, ConversionOptions(to="gguf", gguf_type=gguf_type))
    found = compare(path, gguf_type, stories_text.read_text(encoding="utf-8"), windows=8, context=256)
    assert found.scored_tokens == 8 * 127
    assert found.agrees, found


@pytest.mark.usefixtures("node")
@pytest.mark.parametrize("gguf_type", ["f32", "f16", "q8_0"])
@pytest.mark.parametrize("family", CONFIGS)
def test_other_families_mean_the_same(
    family: str, gguf_type: str, stories_folder: Path, stories_text: Path, tmp_path: Path
) -> None:
    model = random_model(CONFIGS[family], open_source(stories_folder).files)
    write_dense_gguf(model, tmp_path / "dense.gguf", gguf_type=gguf_type)
    text = stories_text.read_text(encoding="utf-8")
    found = compare(tmp_path / "dense.gguf", gguf_type, text, windows=2, context=128)
    assert found.agrees, found


@pytest.mark.usefixtures("node")
def test_the_tolerance_tells_eight_bits_from_half_precision(packed: Path, stories_text: Path, tmp_path: Path) -> None:
    path = tmp_path / "dense.gguf"
    convert(packed, path, ConversionOptions(to="gguf", gguf_type="q8_0"))
    assert not compare(path, "f16", stories_text.read_text(encoding="utf-8"), windows=2, context=256).agrees
