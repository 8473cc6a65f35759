"""Perplexity and divergence on files: each protocol and statistic against an independent computation."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from model_builders import tiny_llama

from cluscomp_export.evaluation.evaluate import Evaluation, evaluate, evaluate_files
from cluscomp_export.evaluation.protocols import choose_protocol
from cluscomp_export.sources import open_source
from cluscomp_formats.errors import ClusCompError, InvalidFileError, InvalidRequestError
from cluscomp_formats.packed import write_packed
from cluscomp_formats.sections.digest import NO_DIGEST
from cluscomp_runtime import LanguageModel
from cluscomp_runtime.tokenizer import Tokenizer

ROUNDING = 1e-4
"""Two implementations in float32, relative: their logits differ by 1e-5 or so, and losses average that."""


class Peer:
    """transformers' own model, whose own loss is the mean over what `labels` does not leave out."""

    def __init__(self, folder: Path) -> None:
        from transformers import LlamaForCausalLM

        self.model = LlamaForCausalLM.from_pretrained(folder)

    @torch.inference_mode()
    def loss(self, window: list[int], first: int) -> float:
        """Mean loss of the tokens from position `first` on."""
        labels = torch.tensor([[-100] * first + window[first:]])
        return float(self.model(torch.tensor([window]), labels=labels).loss)


@pytest.fixture(scope="module")
def peer(stories_folder: Path) -> Peer:
    return Peer(stories_folder)


@pytest.fixture(scope="module")
def tokenize(stories_folder: Path) -> Callable[[str], list[int]]:
    tokenizer = Tokenizer.from_files(open_source(stories_folder).files)
    assert tokenizer is not None
    return tokenizer.encode


def test_llama_cpp_scores_the_second_half_of_windows_that_begin_with_the_begin_token(
    stories_folder: Path, stories_text: Path, peer: Peer, tokenize: Callable[[str], list[int]]
) -> None:
    result = evaluate_files(stories_folder, text=stories_text, windows=4, context=128)
    ids = tokenize(stories_text.read_text(encoding="utf-8"))
    assert ids[0] == 1
    windows = [[1, *ids[start + 1 : start + 128]] for start in range(0, 4 * 128, 128)]
    # llama.cpp: first = n_ctx / 2, and n_ctx - 1 - first predictions from there on.
    losses = [peer.loss(window, 65) for window in windows]
    assert result.scored_tokens == 4 * (128 - 1 - 64)
    assert result.perplexity == pytest.approx(math.exp(np.mean(losses)), rel=ROUNDING)


def test_gptq_scores_whole_windows_of_joined_rows(
    stories_folder: Path, stories_text: Path, peer: Peer, tokenize: Callable[[str], list[int]]
) -> None:
    result = evaluate_files(stories_folder, text=stories_text, protocol="gptq", context=100)
    # As the script of GPTQ does it, on what the data set's loading script makes of the file.
    with stories_text.open(encoding="utf-8") as lines:
        rows = [line if line.strip() else "" for line in lines]
    ids = torch.tensor([tokenize("\n\n".join(rows))])
    samples = ids.numel() // 100
    losses = [peer.loss(ids[0, index * 100 : (index + 1) * 100].tolist(), 0) * 100 for index in range(samples)]
    assert result.windows == samples
    assert result.scored_tokens == samples * 99
    assert result.perplexity == pytest.approx(math.exp(sum(losses) / (samples * 100)), rel=ROUNDING)
    # transformers' loss leaves out the first token by itself; the tokenizer's begin token comes once, at the very start.
    assert ids[0, 0] == 1
    assert 1 not in ids[0, 1:]


def test_a_stride_scores_every_token_once_with_more_before_it(
    stories_folder: Path, stories_text: Path, peer: Peer, tokenize: Callable[[str], list[int]]
) -> None:
    result = evaluate_files(stories_folder, text=stories_text, protocol="gptq", join="none", context=64, stride=24, windows=5)
    ids = tokenize(stories_text.read_text(encoding="utf-8"))
    # The sliding window of transformers' guide to perplexity: labels of tokens that were scored before are left out.
    total, scored, end = 0.0, 0, 0
    for begin in range(0, 5 * 24, 24):
        new = begin + 64 - end
        first = 64 - new
        count = new if begin else new - 1
        total += peer.loss(ids[begin : begin + 64], first) * count
        scored, end = scored + count, begin + 64
    assert result.scored_tokens == scored == 63 + 4 * 24
    assert result.perplexity == pytest.approx(math.exp(total / scored), rel=ROUNDING)


def test_the_default_context_is_what_the_model_takes(stories_folder: Path, stories_text: Path) -> None:
    result = evaluate_files(stories_folder, text=stories_text, protocol="gptq", windows=1)
    assert result.context == 512
    with pytest.raises(InvalidRequestError, match="longer than the model"):
        evaluate_files(stories_folder, text=stories_text, protocol="gptq", context=513)


def test_a_model_does_not_diverge_from_itself(stories_folder: Path, stories_text: Path) -> None:
    result = evaluate_files(stories_folder, text=stories_text, reference=stories_folder, windows=2, context=64)
    assert result.kl == pytest.approx(0, abs=1e-6)
    assert result.kl_max == pytest.approx(0, abs=1e-6)
    assert result.top1 == 1
    assert result.top1_error == 0
    assert result.reference_perplexity == result.perplexity
    assert result.perplexity_ratio == 1
    assert result.perplexity_ratio_error == 0


class Fixed:
    """Gives the logits of a table for each position, whatever the tokens."""

    def __init__(self, table: list[list[float]] | torch.Tensor) -> None:
        self.table = torch.as_tensor(table)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.table.expand(len(ids), -1, -1)


def test_divergence_by_hand() -> None:
    # The reference says 1/2, 1/4, 1/4; the model 1/4, 1/2, 1/4.
    reference, model = Fixed([[math.log(2), 0, 0]] * 4), Fixed([[0, math.log(2), 0]] * 4)
    result = evaluate(model, [[0, 1, 2, 0]], reference=reference)
    assert result.scored_tokens == 1
    assert result.perplexity == pytest.approx(4)
    assert result.reference_perplexity == pytest.approx(2)
    assert result.perplexity_ratio == pytest.approx(2)
    assert result.kl == pytest.approx(0.25 * math.log(2))
    assert result.kl_median == result.kl_p99 == result.kl_max == result.kl
    assert result.top1 == 0
    assert result.perplexity_error is None


def test_statistics_are_llama_cpps() -> None:
    """Formulas of llama.cpp's `perplexity --kl-divergence`, in numpy and float64."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 41, 7, generator=generator) * 2
    ids = torch.randint(7, (1, 41), generator=generator).tolist()
    result = evaluate(Fixed(logits[0]), ids, reference=Fixed(logits[1]), protocol=choose_protocol("gptq", context=41))
    log_p, log_base = (np.log(np.exp(x) / np.exp(x).sum(1, keepdims=True)) for x in logits[:, :-1].double().numpy())
    targets = np.array(ids[0][1:])
    nll, base_nll = (-log[np.arange(40), targets] for log in (log_p, log_base))
    kld = (np.exp(log_base) * (log_base - log_p)).sum(1)
    same = log_p.argmax(1) == log_base.argmax(1)

    def uncertainty(values: np.ndarray) -> float:
        return math.sqrt(((values**2).mean() - values.mean() ** 2) / (len(values) - 1))

    covariance = ((nll * base_nll).mean() - nll.mean() * base_nll.mean()) / 39
    ratio = math.exp(nll.mean() - base_nll.mean())
    # What float32 rounds in one log probability of about 5 is 5e-7.
    close = {"rel": 1e-5}
    assert result.perplexity == pytest.approx(math.exp(nll.mean()), **close)
    assert result.perplexity_error == pytest.approx(math.exp(nll.mean()) * uncertainty(nll), **close)
    assert result.reference_perplexity == pytest.approx(math.exp(base_nll.mean()), **close)
    assert result.reference_perplexity_error == pytest.approx(math.exp(base_nll.mean()) * uncertainty(base_nll), **close)
    assert result.perplexity_ratio == pytest.approx(ratio, **close)
    ratio_error = ratio * math.sqrt(uncertainty(nll) ** 2 + uncertainty(base_nll) ** 2 - 2 * covariance)
    assert result.perplexity_ratio_error == pytest.approx(ratio_error, **close)
    assert (result.kl, result.kl_error) == pytest.approx((kld.mean(), uncertainty(kld)), **close)
    quantiles = (result.kl_median, result.kl_p90, result.kl_p99, result.kl_max)
    assert quantiles == pytest.approx(np.quantile(kld, [0.5, 0.9, 0.99, 1]), **close)
    share = same.mean()
    assert 0 < share < 1
    assert (result.top1, result.top1_error) == pytest.approx((share, math.sqrt(share * (1 - share) / 39)), **close)


def test_many_tokens_are_scored_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(2, 33, 7, generator=torch.Generator().manual_seed(1))
    ids = [[token % 7 for token in range(33)]] * 3

    def run() -> Evaluation:
        return evaluate(Fixed(logits[0]), ids, reference=Fixed(logits[1]))

    whole = run()
    monkeypatch.setattr("cluscomp_export.evaluation.statistics.MAX_ELEMENTS", 5 * 7)
    assert run() == whole


def test_logits_are_bounded_by_the_batch_not_by_the_text(
    stories_folder: Path, stories_text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens: list[int] = []
    forward = LanguageModel.forward

    def watched(model: LanguageModel, ids: torch.Tensor) -> torch.Tensor:
        tokens.append(ids.numel())
        return forward(model, ids)

    monkeypatch.setattr(LanguageModel, "forward", watched)
    evaluate_files(stories_folder, text=stories_text, context=300)
    assert max(tokens) <= 1024
    assert sum(tokens) > 4000


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_outputs_are_an_error(value: float) -> None:
    with pytest.raises(ClusCompError, match="produced non-finite logits, or its perplexity overflowed"):
        evaluate(Fixed([[value, 0, 0]] * 4), [[0, 1, 2, 0]])


def test_a_perplexity_that_overflows_is_an_error() -> None:
    with pytest.raises(ClusCompError, match="produced non-finite logits, or its perplexity overflowed"):
        evaluate(Fixed([[0, 1e4, 0]] * 4), [[0, 1, 2, 0]])


def test_a_reference_with_another_vocabulary_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="vocabulary"):
        evaluate(Fixed([[0.0, 0, 0]] * 4), [[0, 1, 2, 0]], reference=Fixed([[0.0, 0]] * 4))


def test_a_model_without_tokenizer_is_refused(stories_text: Path, tmp_path: Path) -> None:
    write_packed(tiny_llama(), tmp_path / "bare.clus")
    with pytest.raises(InvalidRequestError, match="no tokenizer"):
        evaluate_files(tmp_path / "bare.clus", text=stories_text, context=64)


def test_the_record_is_all_it_takes_to_repeat_it(stories_folder: Path, stories_text: Path) -> None:
    first = evaluate_files(
        stories_folder, text=stories_text, reference=stories_folder, protocol="gptq", windows=2, context=64, stride=32
    )
    record = json.loads(json.dumps(first.record))
    assert record["text"]["sha256"] == hashlib.sha256(stories_text.read_bytes()).hexdigest()
    assert record["model"]["digest"] == record["reference"]["digest"] == open_source(stories_folder).digest()
    tokenizer = hashlib.sha256((stories_folder / "tokenizer.json").read_bytes()).hexdigest()
    assert record["model"]["tokenizer"]["tokenizer.json"] == tokenizer
    assert record["versions"]["torch"] == torch.__version__
    assert record["threads"] == torch.get_num_threads()
    assert (record["device"], record["dtype"]) == ("cpu", "float32")
    protocol = record["protocol"]
    assert protocol["scored_tokens"] == 63 + 32
    again = evaluate_files(
        Path(record["model"]["path"]),
        text=Path(record["text"]["path"]),
        reference=Path(record["reference"]["path"]),
        protocol=protocol["name"],
        dtype=record["dtype"],
        **{name: protocol[name] for name in ("windows", "context", "stride", "join")},
    )
    assert {**vars(again), "record": None} == {**vars(first), "record": None}


def test_a_text_that_cannot_be_read_is_refused(stories_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidFileError, match="no such file"):
        evaluate_files(stories_folder, text=tmp_path / "none.txt")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(InvalidFileError, match="not UTF-8"):
        evaluate_files(stories_folder, text=tmp_path / "latin.txt")


def test_figures_are_not_given_for_a_model_that_is_not_what_its_digest_says(
    stories_folder: Path, stories_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = replace(open_source(stories_folder), claimed_digest=NO_DIGEST)
    monkeypatch.setattr("cluscomp_export.evaluation.evaluate.open_source", lambda *_: model)
    with pytest.raises(InvalidFileError, match="does not match the digest"):
        evaluate_files(stories_folder, text=stories_text, context=64, windows=1)
