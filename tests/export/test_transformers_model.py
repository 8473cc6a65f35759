"""Models that transformers runs for us: what transformers computes with the decoded weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import hf_models
import numpy as np
import pytest
import torch
import transformers
from hf_models import VOCABULARY, clustered_model, linear_names, random_weight, with_decoded_weights
from runtime_models import byte_tokenizer_files

from cluscomp_export.evaluation.evaluate import evaluate_files
from cluscomp_export.evaluation.transformers_model import TransformersModel
from cluscomp_formats.errors import InvalidFileError, UnsupportedError
from cluscomp_formats.packed import write_packed

SAFETY = 8.0
"""Room for other orders of summation, as in the self-test record."""


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(ids)[0]
    return found


@pytest.mark.parametrize("clustered", [False, True])
@pytest.mark.parametrize("make", [hf_models.gpt2, hf_models.opt, hf_models.llama])
def test_logits_are_those_of_transformers(make: Callable[[], Any], clustered: bool) -> None:
    peer = make()
    # Conv1D stores the transpose: kernels want the groups along its other axis.
    axis: Any = "in" if make is hf_models.gpt2 else "out"
    names = linear_names(peer) if clustered else []
    weights = [
        random_weight(name, tuple(peer.get_parameter(name).shape), axis, stages=1 + number % 2, extras=number % 3 == 0)
        for number, name in enumerate(names)
    ]
    embedding = "transformer.wte.weight"
    if clustered and make is hf_models.gpt2:
        # Tied: the head is clustered with it.
        weights.append(random_weight(embedding, tuple(peer.get_parameter(embedding).shape)))
    ids = torch.randint(0, VOCABULARY, (2, 11))
    found = TransformersModel(clustered_model(peer, weights)).forward(ids)
    exact = logits(with_decoded_weights(peer, weights, torch.float64), ids)
    rounded = logits(with_decoded_weights(peer, weights, torch.float32), ids)
    error = max((rounded - exact).abs().max().item(), torch.finfo(torch.float32).eps * exact.abs().max().item())
    assert (found - exact).abs().max().item() <= SAFETY * error
    assert SAFETY * error < 1e-4 * exact.abs().max().item(), "a tolerance this wide would prove nothing"


def test_files_of_other_architectures_are_evaluated(tmp_path: Path) -> None:
    config = transformers.GPT2Config(
        n_embd=32, n_layer=2, n_head=4, vocab_size=258, n_positions=64, bos_token_id=256, eos_token_id=257
    )
    peer = transformers.GPT2LMHeadModel(config).eval()
    weights = [random_weight(name, tuple(peer.get_parameter(name).shape), "in") for name in linear_names(peer)]
    for name, chosen in (("dense", []), ("codebook", weights)):
        model = replace(clustered_model(peer, chosen), files=byte_tokenizer_files())
        write_packed(model, tmp_path / f"{name}.clus")
    text = tmp_path / "text.txt"
    text.write_text("A byte is a token here. " * 20)
    result = evaluate_files(
        tmp_path / "codebook.clus", text=text, reference=tmp_path / "dense.clus", protocol="gptq", join="none"
    )
    assert result.context == 64
    windows = torch.tensor(list(text.read_bytes()))[: 64 * result.windows].reshape(-1, 64)
    with torch.no_grad():
        expected = np.exp(float(peer(windows, labels=windows).loss))
        compressed = with_decoded_weights(peer, weights, torch.float32)
        found = np.exp(float(compressed(windows, labels=windows).loss))
    # Losses in float32, of about 5 with an error of 5e-7.
    assert result.reference_perplexity == pytest.approx(expected, rel=1e-5)
    assert result.perplexity == pytest.approx(found, rel=1e-5)
    assert result.kl is not None
    assert result.kl > 0
    assert result.record["kernel"].startswith("transformers, native")


def test_encoders_do_not_predict_a_text() -> None:
    with pytest.raises(UnsupportedError, match="causal"):
        TransformersModel(clustered_model(hf_models.bert(), []))


def test_a_missing_tensor_is_named() -> None:
    model = clustered_model(hf_models.gpt2(), [])
    name = "transformer.h.1.mlp.c_fc.bias"
    tensors = {key: tensor for key, tensor in model.tensors.items() if key != name}
    with pytest.raises(InvalidFileError, match=name):
        TransformersModel(replace(model, tensors=tensors))
