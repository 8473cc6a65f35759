"""Perplexity by llama.cpp's protocol, against an independent computation."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from cluscomp_export.evaluate import evaluate, evaluate_files, text_windows
from cluscomp_export.sources import open_source
from cluscomp_formats.errors import InvalidFileError, InvalidRequestError
from cluscomp_runtime import LanguageModel


def test_windows_do_not_overlap_and_start_with_the_begin_token() -> None:
    assert text_windows(range(10, 23), context=4, windows=None, bos_id=None) == [
        [10, 11, 12, 13],
        [14, 15, 16, 17],
        [18, 19, 20, 21],
    ]
    assert text_windows(range(10, 23), context=4, windows=2, bos_id=1) == [[1, 11, 12, 13], [1, 15, 16, 17]]


@pytest.mark.parametrize(("tokens", "context"), [(7, 8), (100, 3)])
def test_too_little_text_is_refused(tokens: int, context: int) -> None:
    with pytest.raises(InvalidRequestError):
        text_windows(range(tokens), context=context, windows=None, bos_id=None)


def test_perplexity_equals_that_of_transformers(stories_folder: Path, stories_text: Path) -> None:
    from transformers import LlamaForCausalLM

    result = evaluate_files(stories_folder, text=stories_text, windows=4, context=128)
    peer = LlamaForCausalLM.from_pretrained(stories_folder)
    tokenizer = LanguageModel.from_model(open_source(stories_folder)).tokenizer
    assert tokenizer is not None
    text = tokenizer.encode(stories_text.read_text())
    assert text[0] == 1
    # The begin token, which comes first in the text, also replaces the first token of every later window.
    windows = [[1, *text[start + 1 : start + 128]] for start in range(0, 4 * 128, 128)]
    losses = []
    with torch.inference_mode():
        for window in windows:
            scores = torch.log_softmax(peer(torch.tensor([window])).logits[0].double(), -1)
            losses += [-scores[position, window[position + 1]] for position in range(64, 127)]
    assert result.scored_tokens == len(losses) == 4 * 63
    assert result.perplexity == pytest.approx(math.exp(torch.stack(losses).mean()), rel=1e-4)


def test_a_model_does_not_diverge_from_itself(stories_folder: Path, stories_text: Path) -> None:
    result = evaluate_files(stories_folder, text=stories_text, reference=stories_folder, windows=2, context=64)
    assert result.kl == pytest.approx(0, abs=1e-6)
    assert result.top1 == 1
    assert result.reference_perplexity == result.perplexity


def test_divergence_by_hand() -> None:
    class Fixed:
        def __init__(self, logits: list[float]) -> None:
            self.logits = torch.tensor(logits)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.logits.expand(*ids.shape, -1)

    # The reference says 1/2, 1/4, 1/4; the model 1/4, 1/2, 1/4.
    reference, model = Fixed([math.log(2), 0, 0]), Fixed([0, math.log(2), 0])
    result = evaluate(model, [[0, 1, 2, 0]], reference=reference)  # type: ignore[arg-type]
    assert result.scored_tokens == 1
    assert result.perplexity == pytest.approx(4)
    assert result.reference_perplexity == pytest.approx(2)
    assert result.kl == pytest.approx(0.25 * math.log(2))
    assert result.top1 == 0


def test_a_text_that_cannot_be_read_is_refused(stories_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidFileError, match="cannot be read"):
        evaluate_files(stories_folder, text=tmp_path / "none.txt")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(InvalidFileError, match="not UTF-8"):
        evaluate_files(stories_folder, text=tmp_path / "latin.txt")
