"""ONNX folders in the JavaScript programs that run them generate what our own runtime generates."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from browser import run_page

from cluscomp_export.convert import ConversionOptions, convert
from cluscomp_runtime import LanguageModel, load

PROMPT = "Once upon a time"
NEW_TOKENS = 64
COMPACT = {
    "logSeverityLevel": 3,
    "extra": {"optimization": {"constant_folding_max_output_size_in_bytes": "100"}},
}
"""Session options under which onnxruntime keeps codebooks and codes and looks weights up at every call."""


@pytest.fixture(scope="module")
def folder(packed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("onnx") / "stories"
    convert(packed, output, ConversionOptions(to="onnx"))
    return output


@pytest.fixture(scope="module")
def ours(packed: Path) -> LanguageModel:
    return load(packed)


@pytest.mark.parametrize("session_options", [{}, COMPACT], ids=["folded", "compact"])
def test_onnxruntime_web(folder: Path, ours: LanguageModel, node: Callable[..., Any], session_options: dict[str, Any]) -> None:
    assert ours.tokenizer is not None
    prompt_ids = ours.tokenizer.encode(PROMPT)
    request = {"folder": str(folder), "prompt_ids": prompt_ids, "new_tokens": NEW_TOKENS, "session_options": session_options}
    answer = node("onnxruntime_web.mjs", request)
    assert answer["ids"] == list(ours.generate(prompt_ids, max_new_tokens=NEW_TOKENS).token_ids)


@pytest.mark.parametrize("session_options", [{}, COMPACT], ids=["folded", "compact"])
def test_transformers_js(folder: Path, ours: LanguageModel, node: Callable[..., Any], session_options: dict[str, Any]) -> None:
    request = {"folder": str(folder), "prompt": PROMPT, "new_tokens": NEW_TOKENS, "session_options": session_options}
    assert node("transformers_js.mjs", request)["text"] == ours.generate(PROMPT, max_new_tokens=NEW_TOKENS).text


@pytest.mark.usefixtures("node")
def test_transformers_js_in_a_browser(folder: Path, ours: LanguageModel, chromium: str) -> None:
    answer = run_page(chromium, folder, {"prompt": PROMPT, "new_tokens": NEW_TOKENS})
    assert answer["text"] == ours.generate(PROMPT, max_new_tokens=NEW_TOKENS).text
