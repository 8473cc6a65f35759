"""The self-test: models it accepts, faults it detects, and untrusted records."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from runtime_models import byte_tokenizer_files, clustered_model, small_config

from cluscomp_formats.errors import InvalidFileError, InvalidRequestError, SelfTestError
from cluscomp_formats.ir import Array, ClusteredWeight, Codebook, DenseTensor, Model, Stage
from cluscomp_runtime import LanguageModel, make_self_test, run_self_test, selftest
from cluscomp_runtime.selftest import check_record


@pytest.fixture(scope="module")
def model() -> Model:
    return clustered_model(small_config(), stages=2, row_scale=True)


@pytest.fixture(scope="module")
def record(model: Model) -> dict[str, Any]:
    return make_self_test(model, tokens=12)


@pytest.mark.parametrize("kernel", ["auto", "dense", "reference"])
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
def test_the_model_itself_passes(model: Model, record: dict[str, Any], kernel: str, dtype: str) -> None:
    loaded = LanguageModel.from_model(model, kernel=kernel, dtype=dtype)
    report = run_self_test(loaded, record)
    assert report.ok, report
    expected = record["tolerance"][dtype if dtype != "float64" else "float32"]
    if loaded.engine == "native":
        # Activations have 16 bits, not 24.
        expected *= 2**7
    assert report.max_difference <= report.tolerance == expected
    assert [(part.sequence, part.mode) for part in report.sequences] == [(0, "prefill"), (1, "prefill"), (0, "decode")]
    report.raise_if_failed()


def test_what_the_native_engine_refuses_passes_in_torch() -> None:
    model = clustered_model(small_config(), stages=2, row_scale=True, column_scale=True, outliers=20)
    record = make_self_test(model, tokens=12)
    with pytest.warns(RuntimeWarning, match="runs in torch, which is slower .* has a column scale"):
        loaded = LanguageModel.from_model(model)
    assert run_self_test(loaded, record).ok


def test_the_tolerance_is_the_documented_formula(model: Model, record: dict[str, Any]) -> None:
    exact = LanguageModel.from_model(model, kernel="reference", dtype="float64")
    single = LanguageModel.from_model(model, kernel="reference", dtype="float32")
    worst = largest = 0.0
    for sequence in record["sequences"]:
        ids, top_ids = torch.tensor([sequence["input_ids"]]), torch.tensor(sequence["top_ids"])
        double, narrow = exact.forward(ids)[0].gather(-1, top_ids), single.forward(ids)[0].gather(-1, top_ids)
        np.testing.assert_allclose(sequence["top_logits"], double.numpy(), rtol=1e-8)
        assert (double[:, :-1] >= double[:, 1:]).all()
        worst = max(worst, (narrow.double() - double).abs().max().item())
        largest = max(largest, double.abs().max().item())
    amplification = max(worst / 2**-23, largest)
    # Another batch shape may round differently in float32, but the formula determines the order of magnitude.
    assert record["tolerance"]["float32"] == pytest.approx(32 * amplification * 2**-23, rel=0.7)
    assert record["tolerance"]["bfloat16"] / record["tolerance"]["float32"] == pytest.approx(2**16, rel=1e-3)
    assert record["tolerance"]["float16"] / record["tolerance"]["float32"] == pytest.approx(2**13, rel=1e-3)
    assert record["tolerance"]["float32"] < 4e-4 * largest, "a tolerance this wide would prove nothing"


def test_a_record_is_json_and_the_same_every_time(model: Model, record: dict[str, Any]) -> None:
    assert json.loads(json.dumps(record)) == record
    assert make_self_test(model, tokens=12) == record


def test_a_tokenizer_adds_a_sentence() -> None:
    config = small_config(vocab_size=258, num_hidden_layers=1, tie_word_embeddings=True)
    model = clustered_model(config, byte_tokenizer_files())
    record = make_self_test(model, tokens=5, top_k=3)
    lengths = [len(sequence["input_ids"]) for sequence in record["sequences"]]
    assert lengths == [5, 5, 32]
    assert bytes(record["sequences"][2]["input_ids"]).startswith(b"The quick brown fox")
    assert {len(row) for sequence in record["sequences"] for row in sequence["top_ids"]} == {3}
    # Sequences of unequal length: padding must not affect the shorter ones.
    assert run_self_test(LanguageModel.from_model(model), record).ok


def test_sequences_of_ones_own(model: Model) -> None:
    record = make_self_test(model, sequences=[[5], [1, 2, 3]])
    assert [sequence["input_ids"] for sequence in record["sequences"]] == [[5], [1, 2, 3]]
    assert run_self_test(LanguageModel.from_model(model), record).ok
    for unusable in ([], [[]], [[97]], [[-1]], [[1] * 2000]):
        with pytest.raises(InvalidRequestError):
            make_self_test(model, sequences=unusable)


def with_codebook(model: Model, name: str, values: np.ndarray) -> Model:
    """Return the model with the first codebook of one weight replaced."""
    weight = model.tensors[name]
    assert isinstance(weight, ClusteredWeight)
    first, *others = weight.stages
    stage = Stage(Codebook(first.codebook.name, Array.of(values)), first.codes)
    changed = ClusteredWeight(
        name, weight.shape, (stage, *others), weight.group_axis, weight.row_scale, weight.column_scale, weight.outliers
    )
    return Model(model.config, {**model.tensors, name: changed}, model.files, model.provenance, model.self_test)


@pytest.mark.parametrize(
    "name", ["model.layers.0.self_attn.q_proj.weight", "model.layers.2.mlp.down_proj.weight", "lm_head.weight"]
)
def test_one_corrupt_codebook_entry_is_caught(model: Model, record: dict[str, Any], name: str) -> None:
    weight = model.tensors[name]
    assert isinstance(weight, ClusteredWeight)
    values = weight.stages[0].codebook.values.read().copy()
    used = int(np.bincount(weight.stages[0].codes.read().reshape(-1)).argmax())
    values[used, 1] += np.float16(0.5)
    report = run_self_test(LanguageModel.from_model(with_codebook(model, name, values)), record)
    assert not report.ok
    assert report.max_difference > report.tolerance
    with pytest.raises(SelfTestError, match=r"sequence \d \((prefill|decode)\), position \d+, logit of token \d+") as error:
        report.raise_if_failed()
    problem = error.value.problems[0]
    assert math.isfinite(float(problem.found or "nan"))
    assert " within " in (problem.expected or "")


def test_a_logit_that_should_not_be_large_is_caught(model: Model, record: dict[str, Any]) -> None:
    recorded = {token for sequence in record["sequences"] for row in sequence["top_ids"] for token in row}
    absent = next(token for token in range(97) if token not in recorded)
    head = model.tensors["lm_head.weight"].decode().copy()
    head[absent] = head[recorded.pop()] * 50
    tensors = {**model.tensors, "lm_head.weight": DenseTensor("lm_head.weight", Array.of(head))}
    report = run_self_test(LanguageModel.from_model(Model(model.config, tensors)), record)
    assert not report.ok
    assert max(report.sequences, key=lambda part: part.difference).token_id == absent


def test_a_long_record_is_computed_in_parts(model: Model, record: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = LanguageModel.from_model(model)
    computed: list[int] = []
    forward = loaded.forward
    monkeypatch.setattr(loaded, "forward", lambda ids: computed.append(ids.size) or forward(ids))
    monkeypatch.setattr(selftest, "MAX_TOKENS", 30)
    report = run_self_test(loaded, {**record, "sequences": record["sequences"] * 3})
    assert report.ok
    assert computed == [24, 24, 24]
    assert [part.sequence for part in report.sequences] == [0, 1, 2, 3, 4, 5, 0]


def test_nan_is_a_failure(model: Model, record: dict[str, Any]) -> None:
    name = "model.norm.weight"
    tensors = {**model.tensors, name: DenseTensor(name, Array.of(np.full(32, np.nan, np.float32)))}
    report = run_self_test(LanguageModel.from_model(Model(model.config, tensors)), record)
    assert not report.ok
    assert report.max_difference == math.inf
    with pytest.raises(SelfTestError, match="not finite"):
        make_self_test(Model(model.config, tensors))


def test_a_fault_of_the_decode_path_alone_is_caught(
    model: Model, record: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    language_model = LanguageModel.from_model(model, kernel="dense")
    attention = language_model.decoder.layers[1].branches[0].part
    attend = attention._attend_one
    monkeypatch.setattr(attention, "_attend_one", lambda *arguments: attend(*arguments) * 1.01)
    report = run_self_test(language_model, record)
    assert not report.ok
    assert {part.mode for part in report.sequences if part.difference > report.tolerance} == {"decode"}


def corrupted(record: dict[str, Any], path: list[Any], value: Any) -> dict[str, Any]:
    changed = copy.deepcopy(record)
    target = changed
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = value
    return changed


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["version"], 2),
        (["version"], None),
        (["tolerance"], None),
        (["tolerance"], [1]),
        (["tolerance", "float32"], -1.0),
        (["tolerance", "float32"], math.inf),
        (["tolerance", "bfloat16"], "1"),
        (["tolerance", "float16"], True),
        (["sequences"], []),
        (["sequences"], {}),
        (["sequences", 0], 7),
        (["sequences", 0, "input_ids"], []),
        (["sequences", 0, "input_ids"], [97]),
        (["sequences", 0, "input_ids"], [-1]),
        (["sequences", 0, "input_ids"], [1.0]),
        (["sequences", 0, "input_ids"], [True]),
        (["sequences", 0, "input_ids"], [1] * 129),
        (["sequences", 0, "top_ids"], None),
        (["sequences", 0, "top_ids", 0], []),
        (["sequences", 0, "top_ids", 0], 3),
        (["sequences", 0, "top_ids", 1], [1]),
        (["sequences", 0, "top_ids", 1, 0], 97),
        (["sequences", 1, "top_logits"], [[1.0]]),
        (["sequences", 1, "top_logits", 0], [1.0]),
        (["sequences", 1, "top_logits", 0, 0], math.nan),
        (["sequences", 1, "top_logits", 0, 0], 10**400),
        (["sequences", 1, "top_logits", 0, 0], "1"),
    ],
)
def test_a_malformed_record_is_an_invalid_file(model: Model, record: dict[str, Any], path: list[Any], value: Any) -> None:
    check_record(record, 97, 128)
    with pytest.raises(InvalidFileError) as error:
        check_record(corrupted(record, path, value), 97, 128)
    assert error.value.problems[0].kind == "bad_self_test"


@pytest.mark.parametrize("record", [None, [], "x", 1, {}])
def test_a_record_that_is_none(record: Any) -> None:
    with pytest.raises(InvalidFileError):
        check_record(record, 97, 128)


def test_every_fault_of_a_record_is_named(record: dict[str, Any]) -> None:
    broken = corrupted(corrupted(record, ["tolerance", "float32"], 0), ["sequences", 1, "top_ids"], 0)
    with pytest.raises(InvalidFileError) as error:
        check_record(broken, 97, 128)
    assert len(error.value.problems) == 2
