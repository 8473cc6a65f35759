"""Every decoder family against transformers, on small random models: the rows of `runtime_models.ORACLES`.

A new family gets a row there for each way in which its configurations differ; weights, norms and biases are random, so that
none can be lost unnoticed.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from runtime_models import ORACLES, byte_tokenizer_files, oracle, rounding, save_oracle, token_ids

from cluscomp_export.calibration.activations import shipped_text
from cluscomp_export.conversion.convert import ConversionOptions, convert
from cluscomp_export.conversion.options import Effort
from cluscomp_export.sources import open_source
from cluscomp_formats.architectures import FAMILIES, describe
from cluscomp_formats.registry import open_model
from cluscomp_runtime import LanguageModel, load
from cluscomp_runtime.blocks import BlockRunner


def test_every_family_has_a_row() -> None:
    assert {model_type for model_type, _ in ORACLES.values()} == set(FAMILIES)


@pytest.mark.parametrize("name", ORACLES)
def test_tensors_are_those_of_transformers(name: str) -> None:
    _, model = oracle(name)
    description = describe(model.config)
    found = {name: spec.shape for name, spec in description.tensors.items()}
    assert found == {name: tensor.shape for name, tensor in model.tensors.items()}


@pytest.mark.parametrize("name", ORACLES)
def test_every_matrix_is_in_one_step(name: str) -> None:
    description = describe(oracle(name)[1].config)
    in_steps = [weight for block in description.blocks for step in block.steps for weight in step.weights]
    assert sorted(in_steps) == sorted(name for name, spec in description.tensors.items() if spec.role == "matrix")
    assert all(name.startswith(block.prefix) for block in description.blocks for step in block.steps for name in step.weights)


@pytest.mark.parametrize("name", ORACLES)
def test_logits_equal_those_of_transformers(name: str) -> None:
    peer, model = oracle(name)
    ids = token_ids(2, 40)
    double = LanguageModel.from_model(model, dtype="float64").forward(ids)
    single = LanguageModel.from_model(model).forward(ids)
    with torch.no_grad():
        expected = peer(ids).logits
    tolerance = rounding(single, double)
    assert tolerance < 2e-4 * expected.abs().max().item(), "a tolerance this wide would prove nothing"
    assert single.dtype == torch.float32
    assert (single - expected).abs().max().item() <= tolerance
    # transformers computes norms and rotary angles in float32 even here, hence the tolerance of float32.
    with torch.no_grad():
        assert (double - peer.double()(ids).logits).abs().max().item() <= tolerance


@pytest.mark.parametrize("name", ORACLES)
def test_greedy_tokens_equal_those_of_transformers(name: str) -> None:
    peer, model = oracle(name)
    prompt = token_ids(1, 7)
    expected = peer.generate(prompt, max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0)[0, 7:].tolist()
    language_model = LanguageModel.from_model(model)
    language_model.end_tokens = frozenset()
    result = language_model.generate(prompt, max_new_tokens=24)
    assert list(result.token_ids) == expected
    assert result.stop_reason == "max_new_tokens"
    assert (result.prompt_tokens, result.new_tokens) == (7, 24)


@pytest.mark.parametrize("name", ORACLES)
@pytest.mark.parametrize("first", [1, 3, 11])
def test_the_cache_changes_nothing(name: str, first: int) -> None:
    _, model = oracle(name)
    language_model = LanguageModel.from_model(model, dtype="float64")
    ids = token_ids(2, 17)
    expected = language_model.forward(ids)
    decoder = language_model.decoder
    # Pieces of several sizes: one that starts the cache, one token, several that continue it, one token again.
    cuts = [0, first, first + 1, first + 5, *range(first + 6, 18)]
    with torch.inference_mode():
        cache = decoder.cache(17, batch=2)
        parts = [decoder(ids[:, begin:end], cache) for begin, end in itertools.pairwise(cuts)]
    assert cache.length == 17
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", ORACLES)
def test_block_by_block_is_the_same(name: str) -> None:
    _, model = oracle(name)
    ids = token_ids(2, 17)
    decoder = LanguageModel.from_model(model, kernel="dense").decoder
    runner = BlockRunner(model)
    streams = [runner.embed(ids)]
    for index in range(runner.num_blocks):
        streams = runner.past(index, model.tensors, streams)
    with torch.inference_mode():
        expected = decoder.stream(ids)
        torch.testing.assert_close(streams[0], expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(runner.normed(streams[0]), decoder.norm(expected), rtol=1e-5, atol=1e-5)


CONVERTED = [
    "llama-biases",
    "mistral-window",
    "qwen2-tied-window",
    "qwen3",
    "gemma3",
    "gemma3-linear-rope",
    "qwen3-moe-some-dense",
]


def test_every_family_is_converted() -> None:
    assert {ORACLES[name][0] for name in CONVERTED} == set(FAMILIES)


@pytest.mark.parametrize("name", CONVERTED)
def test_conversion(name: str, tmp_path: Path) -> None:
    """What all phases make of a model passes its self-test, and is nearer to the original than clustering only."""
    source = tmp_path / "source"
    save_oracle(name, source, vocab_size=258)
    for file, content in byte_tokenizer_files().items():
        (source / file).write_bytes(content.read().tobytes())
    original = LanguageModel.from_model(open_source(source))
    ids = torch.tensor([list(shipped_text()[:64].encode())])
    errors = {}
    efforts: tuple[Effort, ...] = ("fast", "best")
    for effort in efforts:
        output = tmp_path / f"{effort}.clus"
        # A codebook for each matrix, as small as they are.
        steps = 4 if effort == "best" else None
        options = ConversionOptions(dim=2, clusters=48, share="none", effort=effort, recovery_steps=steps)
        convert(source, output, options)
        compressed = load(output, selftest=True)
        specs = describe(compressed.config).tensors
        assert open_model(output).clustered.keys() == {name for name, spec in specs.items() if spec.role == "matrix"}
        errors[effort] = (compressed.forward(ids) - original.forward(ids)).square().mean().item()
    assert errors["best"] < errors["fast"]
