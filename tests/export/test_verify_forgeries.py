"""Artefacts that carry the digest of a source and are not made from it, or not sound: `verify` calls none of them derived.

Each forgery brings a self-test record that is honest for what it holds, unless the record is what is forged.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from model_builders import tiny_llama

from cluscomp_export.conversion.convert import ConversionOptions, convert
from cluscomp_export.inspection.judging_outputs import chosen_sequences, compare_outputs
from cluscomp_export.inspection.verify import Verification, verify
from cluscomp_export.sources import open_source
from cluscomp_formats.ir import Array, ClusteredWeight, Codebook, DenseTensor, Model, Outliers, Stage, Tensor
from cluscomp_formats.packed import open_packed, write_packed
from cluscomp_formats.parameters import codebook_name, norm_name, with_parameters
from cluscomp_runtime import LanguageModel
from cluscomp_runtime.selftest import make_self_test

FIRST = "model.layers.0.self_attn.q_proj.weight"
SECOND = "model.layers.1.self_attn.q_proj.weight"
NORM = "model.layers.2.input_layernorm.weight"
EMBEDDING = "model.embed_tokens.weight"

Forgery = Callable[[Model], Model]


@pytest.fixture(scope="module")
def honest(stories_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("honest") / "stories.clus"
    options = ConversionOptions(dim=4, clusters=256, effort="fast", threads=1)
    convert(stories_folder, output, options)
    return output


def changed(model: Model, **tensors: Tensor) -> Model:
    return replace(model, tensors={**model.tensors, **{tensor.name: tensor for tensor in tensors.values()}})


def with_codes(model: Model, names: list[str], new: Callable[[np.ndarray], np.ndarray]) -> Model:
    def recoded(weight: ClusteredWeight) -> ClusteredWeight:
        stages = (Stage(stage.codebook, Array.of(new(stage.codes.read()))) for stage in weight.stages)
        return replace(weight, stages=tuple(stages))

    return replace(model, tensors={**model.tensors, **{name: recoded(model.clustered[name]) for name in names}})


def permuted(values: np.ndarray) -> np.ndarray:
    return np.random.default_rng(0).permutation(values.reshape(-1)).reshape(values.shape)


def with_codebook(model: Model, new: Callable[[np.ndarray], np.ndarray]) -> Model:
    name = model.clustered[FIRST].stages[0].codebook.name
    values = model.codebooks[name].values
    return with_parameters(model, {codebook_name(name): Array.of(new(values.read()).astype(values.read().dtype))})


def with_norm(model: Model, new: Callable[[np.ndarray], np.ndarray]) -> Model:
    return with_parameters(model, {norm_name(NORM): Array.of(new(model.tensors[NORM].decode()))})


def with_config(**settings: Any) -> Forgery:
    return lambda model: replace(model, config={**model.config, **settings})


def fewer_layers(model: Model) -> Model:
    kept = {name: tensor for name, tensor in model.tensors.items() if ".layers." not in name or ".layers.0." in name}
    return replace(model, config={**model.config, "num_hidden_layers": 1}, tensors=kept)


def swapped(model: Model) -> Model:
    return changed(model, a=replace(model.clustered[FIRST], name=SECOND), b=replace(model.clustered[SECOND], name=FIRST))


def reversed_embedding(model: Model) -> Model:
    values = model.tensors[EMBEDDING].values  # type: ignore[union-attr]
    return changed(model, a=DenseTensor(EMBEDDING, Array.of(values.read()[::-1].copy(), values.dtype)))


def one_bit_of_the_embedding(model: Model) -> Model:
    values = model.tensors[EMBEDDING].values  # type: ignore[union-attr]
    content = values.read().copy()
    content.view(np.uint8).reshape(-1)[1000] ^= 1
    return changed(model, a=DenseTensor(EMBEDDING, Array.of(content, values.dtype)))


def half_precision_norm(model: Model) -> Model:
    return changed(model, a=DenseTensor(NORM, Array.of(model.tensors[NORM].decode().astype(np.float16))))


def untied(model: Model) -> Model:
    head = DenseTensor("lm_head.weight", Array.of(np.zeros(model.tensors[EMBEDDING].shape, np.float32)))
    return changed(replace(model, config={**model.config, "tie_word_embeddings": False}), a=head)


def with_outliers(model: Model) -> Model:
    weight = model.clustered[FIRST]
    positions = Array.of(np.arange(0, weight.num_weights, 2, dtype=np.uint32))
    values = Array.of(np.full(positions.shape, 9, np.float32))
    return changed(model, a=replace(weight, outliers=Outliers(positions, values)))


def of_another_model(model: Model) -> Model:
    """Random weights of the same shapes, stored as they are in the same codebooks."""
    generator = np.random.default_rng(1)

    def other(codebook: Codebook) -> Array:
        values = codebook.values.read()
        return Array.of(generator.permutation(values))

    random = with_codes(model, list(model.clustered), permuted)
    return with_parameters(random, {codebook_name(name): other(book) for name, book in model.codebooks.items()})


def trained(model: Model) -> Model:
    """A provenance that explains changed norms."""
    provenance = json.loads(json.dumps(model.provenance))
    provenance["options"]["recovery"] = {"steps": 48}
    return replace(model, provenance=provenance)


CONTENT: dict[str, Forgery] = {
    "all codes zero": lambda model: with_codes(model, list(model.clustered), np.zeros_like),
    "all codes permuted": lambda model: with_codes(model, list(model.clustered), permuted),
    "codes of one matrix permuted": lambda model: with_codes(model, [FIRST], permuted),
    "codes of one matrix zero": lambda model: with_codes(model, [SECOND], np.zeros_like),
    "one layer of five": fewer_layers,
    "another model": of_another_model,
    "codebook in another order": lambda model: with_codebook(model, lambda values: values[::-1]),
    "codebook three times as large": lambda model: with_codebook(model, lambda values: values * 3),
    "codebook of one centroid": lambda model: with_codebook(model, lambda values: np.broadcast_to(values[0], values.shape)),
    "outliers on top": with_outliers,
    "embedding in another order": reversed_embedding,
    "one bit of the embedding": one_bit_of_the_embedding,
    "norm a little larger": lambda model: with_norm(model, lambda values: values * np.float32(1.01)),
    "norm of zeros, said to be trained": lambda model: with_norm(trained(model), np.zeros_like),
    "norm of less precision": half_precision_norm,
    "head of zeros": untied,
    "another rope_theta": with_config(rope_theta=20000.0),
    "another epsilon": with_config(rms_norm_eps=1e-2),
    "fewer and wider heads": with_config(num_attention_heads=4, head_dim=16, num_key_value_heads=2),
    "another end token": with_config(eos_token_id=5),
    "another context": with_config(max_position_embeddings=64),
}


def verified(model: Model, source: Path, folder: Path) -> Verification:
    path = folder / "forged.clus"
    write_packed(replace(model, claimed_digest=None), path)
    return verify(source, path)


def test_what_they_are_made_from_is_derived(stories_folder: Path, honest: Path) -> None:
    result = verify(stories_folder, honest)
    assert (result.verdict, result.exit_code) == ("derived", 0)
    assert any("outputs on" in text for text in result.proven)
    assert all("not authenticated" in text for text in result.claimed)
    assert len(result.claimed) == 1


# Outliers.
@pytest.mark.filterwarnings("ignore:this model runs in torch")
@pytest.mark.parametrize("forge", CONTENT.values(), ids=CONTENT.keys())
def test_other_content_is_different(forge: Forgery, stories_folder: Path, honest: Path, tmp_path: Path) -> None:
    forged = forge(replace(open_packed(honest), claimed_digest=None, self_test=None))
    record = make_self_test(forged)
    result = verified(replace(forged, self_test=record), stories_folder, tmp_path)
    assert (result.verdict, result.exit_code) == ("different", 1)
    assert all(test["passed"] for test in result.self_tests.values())
    assert "cannot have been made from" in result.reasons[0]


def test_matrices_of_two_layers_swapped_are_not_derived(stories_folder: Path, honest: Path, tmp_path: Path) -> None:
    """Matrices of neighbouring layers have a little in common, as much as one of half a bit has with its original."""
    forged = swapped(replace(open_packed(honest), claimed_digest=None, self_test=None))
    result = verified(replace(forged, self_test=make_self_test(forged)), stories_folder, tmp_path)
    assert (result.verdict, result.exit_code) == ("degraded", 1)
    assert {reason.split(":")[0] for reason in result.reasons[1:3]} == {FIRST, SECOND}
    assert not any("was made from" in reason for reason in result.reasons)


def larger_tolerances(record: dict[str, Any], factor: float) -> None:
    record["tolerance"] = {name: value * factor for name, value in record["tolerance"].items()}


def endless_tolerances(record: dict[str, Any]) -> None:
    record["tolerance"] = dict.fromkeys(record["tolerance"], 1e299)


def tolerance_of_one_dtype(record: dict[str, Any]) -> None:
    record["tolerance"]["bfloat16"] *= 50


def other_logits(record: dict[str, Any]) -> None:
    logits = record["sequences"][0]["top_logits"]
    logits[3] = [value + 0.01 for value in logits[3]]


RECORDS: dict[str, Callable[[dict[str, Any]], None]] = {
    "endless tolerances": endless_tolerances,
    "tolerances of the logits' size": lambda record: larger_tolerances(record, 1e5),
    "tolerances a hundred times as large": lambda record: larger_tolerances(record, 100),
    "a tolerance that the others do not explain": tolerance_of_one_dtype,
    "other logits": other_logits,
    "logits within a wide tolerance": lambda record: (larger_tolerances(record, 1000), other_logits(record))[0],
}


@pytest.mark.parametrize("forge", RECORDS.values(), ids=RECORDS.keys())
def test_a_record_of_something_else_is_different(
    forge: Callable[[dict[str, Any]], None], stories_folder: Path, honest: Path, tmp_path: Path
) -> None:
    model = open_packed(honest)
    record = copy.deepcopy(dict(model.self_test or {}))
    forge(record)
    result = verified(replace(model, self_test=record), stories_folder, tmp_path)
    assert (result.verdict, result.exit_code) == ("different", 1)
    assert any("self-test record is not what these weights compute" in reason for reason in result.reasons)


def test_the_record_of_another_model_is_different(stories_folder: Path, honest: Path, tmp_path: Path) -> None:
    model = open_packed(honest)
    other = make_self_test(with_codes(replace(model, claimed_digest=None), [FIRST], permuted))
    assert verified(replace(model, self_test=other), stories_folder, tmp_path).verdict == "different"


@pytest.mark.parametrize("name", ["tokenizer.json", "chat_template.jinja"])
def test_another_tokenizer_or_template_is_different(name: str, stories_folder: Path, honest: Path, tmp_path: Path) -> None:
    """The digest does not cover them; they decide what a text is all the same."""
    model = open_packed(honest)
    content = b"{{ messages }}"
    if name in model.files:
        tokenizer = json.loads(model.files[name].read().tobytes())
        vocabulary = tokenizer["model"]["vocab"]
        first, second = list(vocabulary)[300:302]
        vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
        content = json.dumps(tokenizer).encode()
    forged = replace(model, files={**model.files, name: Array.of(np.frombuffer(content, np.uint8))})
    result = verified(forged, stories_folder, tmp_path)
    assert (result.verdict, result.exit_code) == ("different", 1)
    assert any(f"{name} is not that of" in reason for reason in result.reasons)
    with_digest = verify(honest, tmp_path / "forged.clus")
    assert with_digest.digests[0] == with_digest.digests[1]
    assert with_digest.verdict == "different"


def test_side_files_that_say_nothing_about_text_are_told_of(stories_folder: Path, honest: Path, tmp_path: Path) -> None:
    model = open_packed(honest)
    extra = {**model.files, "notes.txt": Array.of(np.frombuffer(b"mine", np.uint8))}
    result = verified(replace(model, files=extra), stories_folder, tmp_path)
    assert result.verdict == "derived"
    assert any("only the second has the side files notes.txt" in reason for reason in result.reasons)


FEW_BITS = {"dim": 8, "clusters": 16, "threads": 1}


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (ConversionOptions(effort="fast", **FEW_BITS), "its outputs are no closer to the source than chance"),
        (
            ConversionOptions(effort="balanced", calibration_windows=8, calibration_context=256, **FEW_BITS),
            "its matrices keep too little of it",
        ),
    ],
)
def test_an_honest_model_of_too_few_bits_is_degraded_and_not_called_another(
    options: ConversionOptions, reason: str, stories_folder: Path, tmp_path: Path
) -> None:
    """Error feedback moves the weights, for the sake of the outputs, until few of them are left."""
    output = tmp_path / "few.clus"
    convert(stories_folder, output, options)
    result = verify(stories_folder, output)
    assert (result.verdict, result.exit_code) == ("degraded", 1)
    assert any(reason in text for text in result.reasons)
    assert not any("cannot have been made" in text for text in result.reasons)


def test_chance_is_the_best_that_ignores_the_input(stories_folder: Path) -> None:
    model = LanguageModel.from_model(open_source(stories_folder))
    sequences = chosen_sequences(model)
    assert sequences == chosen_sequences(model)
    with torch.inference_mode():
        logits = torch.cat([model.forward(torch.tensor([sequence]))[0].double() for sequence in sequences])
    expected = torch.log_softmax(logits, -1)
    found = compare_outputs(model, model, sequences)
    assert (found.kl, found.top1, found.max_difference, found.positions) == (0, 1, 0, len(logits))
    # Any fixed prediction is further from them.
    for fixed in (expected.exp().mean(0).log(), torch.zeros(len(expected[0])), expected[0], expected.mean(0)):
        divergence = (expected.exp() * (expected - torch.log_softmax(fixed, -1))).sum(-1).mean().item()
        assert divergence >= found.chance - 1e-4
    assert found.uniform == pytest.approx(
        (expected.exp() * expected).sum(-1).mean().item() + math.log(len(expected[0])), abs=1e-4
    )


def test_a_source_that_ignores_its_input_tells_nothing_by_its_outputs() -> None:
    model = tiny_llama()
    still = DenseTensor(EMBEDDING, Array.of(np.zeros(model.tensors[EMBEDDING].shape, np.float32)))
    language_model = LanguageModel.from_model(changed(model, a=still))
    assert not compare_outputs(language_model, language_model, chosen_sequences(language_model)).tells
