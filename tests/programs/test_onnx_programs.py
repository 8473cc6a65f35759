"""ONNX folders in the JavaScript programs that run them generate what our own runtime generates."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import run_page
from clustered_models import with_clusters
from model_builders import tiny_llama

from cluscomp_export.conversion.convert import ConversionOptions, convert
from cluscomp_export.onnx_graph import build_graph
from cluscomp_formats.onnx.writer import write_onnx
from cluscomp_runtime import LanguageModel, load

PROMPT = "Once upon a time"
NEW_TOKENS = 64
MARGIN = 2e-3
"""No choice is closer, so ids can be demanded: float32 rounding moves the logits of these models by less than a tenth of it."""

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


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that needs every operator: stages, 16-bit and narrower codes, both group axes, scales, outliers."""
    output = tmp_path_factory.mktemp("onnx") / "everything"
    model = with_clusters(tiny_llama())
    write_onnx(model, output, build_graph(model))
    return output


def ids_request(
    model: LanguageModel, prompt_ids: list[int], new_tokens: int = NEW_TOKENS, **others: Any
) -> tuple[dict[str, Any], list[int]]:
    """A request, and what our runtime answers."""
    expected = list(model.generate(prompt_ids, max_new_tokens=new_tokens).token_ids)
    logits = model.forward([[*prompt_ids, *expected[:-1]]])[0, len(prompt_ids) - 1 :]
    second, best = np.partition(logits, -2)[:, -2:].T
    assert float((best - second).min()) > MARGIN
    return {"prompt_ids": prompt_ids, "new_tokens": new_tokens, **others}, expected


@pytest.mark.parametrize("session_options", [{}, COMPACT], ids=["folded", "compact"])
def test_onnxruntime_web(folder: Path, ours: LanguageModel, node: Callable[..., Any], session_options: dict[str, Any]) -> None:
    assert ours.tokenizer is not None
    request, expected = ids_request(ours, ours.tokenizer.encode(PROMPT), session_options=session_options)
    assert node("onnxruntime_web.mjs", {"folder": str(folder), **request})["ids"] == expected


def test_onnxruntime_web_knows_every_operator(everything: Path, node: Callable[..., Any]) -> None:
    request, expected = ids_request(load(everything, kernel="dense"), [1, 2, 3], 32)
    assert node("onnxruntime_web.mjs", {"folder": str(everything), **request})["ids"] == expected


@pytest.mark.usefixtures("node")
def test_a_browser_knows_every_operator(everything: Path, chromium: str) -> None:
    request, expected = ids_request(load(everything, kernel="dense"), [1, 2, 3], 32)
    assert run_page(chromium, "onnxruntime_web.html", everything, request)["ids"] == expected


@pytest.mark.parametrize("session_options", [{}, COMPACT], ids=["folded", "compact"])
def test_transformers_js(folder: Path, ours: LanguageModel, node: Callable[..., Any], session_options: dict[str, Any]) -> None:
    request = {"folder": str(folder), "prompt": PROMPT, "new_tokens": NEW_TOKENS, "session_options": session_options}
    assert node("transformers_js.mjs", request)["text"] == ours.generate(PROMPT, max_new_tokens=NEW_TOKENS).text


@pytest.mark.usefixtures("node")
def test_transformers_js_in_a_browser(folder: Path, ours: LanguageModel, chromium: str) -> None:
    answer = run_page(chromium, "transformers_js.html", folder, {"prompt": PROMPT, "new_tokens": NEW_TOKENS})
    assert answer["text"] == ours.generate(PROMPT, max_new_tokens=NEW_TOKENS).text
