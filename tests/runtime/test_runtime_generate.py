"""Generation: stopping, sampling, streaming, and rejected inputs."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from runtime_models import byte_tokenizer_files, clustered_model, dense_model, small_config

from cluscomp_formats.errors import ClusCompError, InvalidRequestError
from cluscomp_formats.ir import Array, DenseTensor, Model
from cluscomp_runtime import LanguageModel
from cluscomp_runtime.sampling import Sampler, probabilities


def successor_model(next_token: dict[int, int], **options: Any) -> Model:
    """Make a model that follows each token by `next_token[token]`: one-hot embeddings and a layer that adds nothing."""
    size = 300
    config = small_config(vocab_size=size, hidden_size=size, num_hidden_layers=1, num_attention_heads=2, **options)
    shapes = {
        "self_attn.q_proj": (size, size),
        "self_attn.k_proj": (size, size),
        "self_attn.v_proj": (size, size),
        "self_attn.o_proj": (size, size),
        "mlp.gate_proj": (48, size),
        "mlp.up_proj": (48, size),
        "mlp.down_proj": (size, 48),
    }
    tensors = {f"model.layers.0.{name}.weight": np.zeros(shape, np.float32) for name, shape in shapes.items()}
    for name in ("model.layers.0.input_layernorm", "model.layers.0.post_attention_layernorm", "model.norm"):
        tensors[f"{name}.weight"] = np.ones(size, np.float32)
    head = np.zeros((size, size), np.float32)
    for token, follower in next_token.items():
        head[follower, token] = 1.0
    tensors["model.embed_tokens.weight"] = np.eye(size, dtype=np.float32)
    tensors["lm_head.weight"] = head
    return dense_model(config, tensors, byte_tokenizer_files())


def chain(*tokens: int) -> dict[int, int]:
    return dict(itertools.pairwise(tokens))


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return LanguageModel.from_model(clustered_model(small_config(eos_token_id=None, num_hidden_layers=1)))


def test_an_end_token_stops_and_is_reported_but_not_spoken() -> None:
    language_model = LanguageModel.from_model(
        successor_model(chain(ord("a"), ord("b"), ord("c"), 257, ord("d")), eos_token_id=257)
    )
    result = language_model.generate("a")
    assert (result.text, result.token_ids) == ("bc", (ord("b"), ord("c"), 257))
    assert result.stop_reason == "end_token"
    assert result.prompt_tokens == 1
    assert result.seconds > 0
    assert result.tokens_per_second == pytest.approx(2 / result.decode_seconds)


def test_one_of_several_end_tokens_stops() -> None:
    language_model = LanguageModel.from_model(successor_model(chain(97, 98, 99), eos_token_id=[257, 99]))
    assert language_model.generate("a").token_ids == (98, 99)


def test_max_new_tokens_stops() -> None:
    language_model = LanguageModel.from_model(successor_model({97: 97}))
    result = language_model.generate("a", max_new_tokens=3)
    assert (result.text, result.stop_reason) == ("aaa", "max_new_tokens")
    single = language_model.generate("a", max_new_tokens=1)
    assert (single.new_tokens, single.tokens_per_second) == (1, 0.0)


def test_a_full_context_stops() -> None:
    language_model = LanguageModel.from_model(successor_model({97: 97}), context=5)
    # The last token is not fed back: after 3 prompt tokens there is room to feed 2 tokens, which gives one more.
    result = language_model.generate("aaa")
    assert (result.new_tokens, result.stop_reason) == (3, "context")
    assert language_model.generate("aaaaa").new_tokens == 1


@pytest.mark.parametrize("word", ["é", "語", "😀", "a😀语b"])
def test_streaming_never_splits_a_character(word: str) -> None:
    encoded = list(word.encode())
    assert len(set(encoded)) == len(encoded)
    language_model = LanguageModel.from_model(successor_model(chain(ord("z"), *encoded, 257), eos_token_id=257))
    stream = language_model.stream("z", max_new_tokens=20)
    assert list(stream) == list(word)
    assert stream.result is not None
    assert stream.result.text == word


def test_an_unfinished_character_is_flushed_at_the_end() -> None:
    first, second = "é".encode()
    language_model = LanguageModel.from_model(successor_model(chain(97, first, 257), eos_token_id=257))
    assert list(language_model.stream("a")) == ["\ufffd"]
    assert list(LanguageModel.from_model(successor_model({first: second, second: 257}, eos_token_id=257)).stream([first])) == [
        "é"
    ]


def test_endless_invalid_bytes_come_out_anyway() -> None:
    language_model = LanguageModel.from_model(successor_model({97: 200, 200: 200}))
    pieces = list(language_model.stream("a", max_new_tokens=30))
    assert len(pieces) > 2
    assert set("".join(pieces)) == {"\ufffd"}


def test_callback_sees_every_token_and_inference_mode_does_not_leak() -> None:
    language_model = LanguageModel.from_model(successor_model(chain(97, 98, 99, 257), eos_token_id=257))
    in_torch = LanguageModel.from_model(successor_model(chain(97, 98, 99, 257), eos_token_id=257), kernel="dense")
    for each in (language_model, in_torch):
        seen: list[int] = []
        for _ in each.stream("a", on_token=seen.append):
            assert not torch.is_inference_mode_enabled()
        assert seen == [98, 99, 257]


def test_a_stream_broken_off_has_no_result() -> None:
    language_model = LanguageModel.from_model(successor_model({97: 97}))
    stream = language_model.stream("a")
    next(iter(stream))
    assert stream.result is None
    stream.finish()
    assert stream.result is not None
    assert stream.result.new_tokens == 128


@pytest.mark.parametrize(
    "prompt",
    [
        [5, 6, 7],
        (5, 6, 7),
        range(5, 8),
        [[5, 6, 7]],
        torch.tensor([5, 6, 7]),
        torch.tensor([[5, 6, 7]], dtype=torch.uint8),
        list(torch.tensor([5, 6, 7])),
        np.array([5, 6, 7]),
        np.array([[5, 6, 7]], np.uint64),
        [np.int32(5), np.uint64(6), 7],
    ],
)
def test_prompts_of_token_ids(model: LanguageModel, prompt: Any) -> None:
    assert model.generate(prompt, max_new_tokens=6).token_ids == model.generate([5, 6, 7], max_new_tokens=6).token_ids
    assert model.generate(prompt, max_new_tokens=6).text == ""


def test_sampling_is_seeded_and_independent_of_the_global_generator(model: LanguageModel) -> None:
    options: dict[str, Any] = {"temperature": 1.5, "max_new_tokens": 30}
    torch.manual_seed(1)
    first = model.generate([5], seed=4, **options).token_ids
    torch.manual_seed(2)
    assert model.generate([5], seed=4, **options).token_ids == first
    assert model.generate([5], seed=5, **options).token_ids != first


def test_greedy_is_deterministic(model: LanguageModel) -> None:
    assert model.generate([5, 6], max_new_tokens=20).token_ids == model.generate([5, 6], max_new_tokens=20).token_ids


@pytest.mark.parametrize(
    ("prompt", "kind"),
    [
        ([], "empty_prompt"),
        ([97], "token_out_of_range"),
        ([1, -1], "token_out_of_range"),
        ([1] * 129, "prompt_too_long"),
        ("text", "no_tokenizer"),
        ([10**30], "token_out_of_range"),
        (np.array([2**64 - 1], np.uint64), "token_out_of_range"),
        (np.array([], np.int64), "empty_prompt"),
        ([[]], "empty_prompt"),
        (torch.tensor([1.0]), "bad_prompt"),
        (torch.tensor([[1], [2]]), "bad_prompt"),
        (torch.tensor([[[1]]]), "bad_prompt"),
        (torch.empty(2, dtype=torch.int64, device="meta"), "bad_prompt"),
        (np.array(5), "bad_prompt"),
        (np.array([1.0]), "bad_prompt"),
        (np.array([1, 0], bool), "bad_prompt"),
        (np.array([None]), "bad_prompt"),
        ([1.0], "bad_prompt"),
        ([True, False], "bad_prompt"),
        (["a"], "bad_prompt"),
        ([1, [2]], "bad_prompt"),
        (b"bytes", "bad_prompt"),
        ({"input_ids": [1]}, "bad_prompt"),
        ({1, 2}, "bad_prompt"),
        (5, "bad_prompt"),
        (None, "bad_prompt"),
    ],
)
def test_prompts_that_are_refused(model: LanguageModel, prompt: Any, kind: str) -> None:
    with pytest.raises(InvalidRequestError) as error:
        model.stream(prompt)
    assert error.value.problems[0].kind == kind


def test_inputs_that_forward_refuses(model: LanguageModel) -> None:
    for ids in ([[]], [[97]], [[0] * 129], [1, 2], []):
        with pytest.raises(InvalidRequestError):
            model.forward(torch.tensor(ids, dtype=torch.int64))


@pytest.mark.parametrize("batch", [[[5, 6], [7, 8]], np.array([[5, 6], [7, 8]]), [torch.tensor([5, 6]), np.array([7, 8])]])
def test_batches_that_forward_takes(model: LanguageModel, batch: Any) -> None:
    np.testing.assert_array_equal(model(batch), model(torch.tensor([[5, 6], [7, 8]])).numpy())


@pytest.mark.parametrize(("kernel", "engine"), [("auto", "native"), ("dense", "torch")])
def test_forward_gives_what_it_is_given(kernel: str, engine: str) -> None:
    """A tensor for a tensor, a numpy array for anything else."""
    language_model = LanguageModel.from_model(clustered_model(small_config()), kernel=kernel)
    assert language_model.engine == engine
    ids = [[1, 2, 3], [4, 5, 6]]
    array, tensor = language_model(np.array(ids)), language_model(torch.tensor(ids))
    assert isinstance(array, np.ndarray)
    assert isinstance(tensor, torch.Tensor)
    assert (array.dtype, tensor.dtype) == (np.float32, torch.float32)
    np.testing.assert_array_equal(array, tensor.numpy())


@pytest.mark.parametrize(
    ("batch", "kind"),
    [
        ([[1, 43], [1]], "ragged_batch"),
        ([[1], []], "ragged_batch"),
        ([[1.5]], "bad_prompt"),
        ([[True]], "bad_prompt"),
        (torch.tensor([[1.0]]), "bad_prompt"),
        ([[[1]]], "bad_prompt"),
        (np.array([1, 2]), "bad_input"),
        ([1, 2], "bad_input"),
        ([[2**70]], "token_out_of_range"),
        ("text", "bad_prompt"),
    ],
)
def test_batches_that_forward_refuses(model: LanguageModel, batch: Any, kind: str) -> None:
    with pytest.raises(InvalidRequestError) as error:
        model(batch)
    assert error.value.problems[0].kind == kind


@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": 0},
        {"max_new_tokens": 2.5},
        {"max_new_tokens": None},
        {"max_new_tokens": True},
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"top_k": 0},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"seed": -1},
    ],
)
def test_settings_out_of_range(model: LanguageModel, options: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError, match=next(iter(options))):
        model.stream([1], **options)


def test_every_setting_out_of_range_is_named() -> None:
    with pytest.raises(InvalidRequestError) as error:
        Sampler(temperature=-1, top_k=0, top_p=2, seed=-1)
    assert len(error.value.problems) == 4


def test_logits_that_are_not_finite_are_an_error() -> None:
    model = clustered_model(small_config(num_hidden_layers=1))
    name = "model.norm.weight"
    broken = Model(model.config, {**model.tensors, name: DenseTensor(name, Array.of(np.full(32, np.nan, np.float32)))})
    with pytest.raises(ClusCompError, match="not finite"):
        LanguageModel.from_model(broken).generate([1])


LOGITS = np.array([0.0, math.log(3), math.log(2), -math.inf], dtype=np.float32)  # log of 1, 3, 2, 0


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"temperature": 1.0}, [1 / 6, 3 / 6, 2 / 6, 0]),
        ({"temperature": 0.5}, [1 / 14, 9 / 14, 4 / 14, 0]),
        ({"temperature": 1.0, "top_k": 2}, [0, 0.6, 0.4, 0]),
        ({"temperature": 1.0, "top_k": 1}, [0, 1, 0, 0]),
        ({"temperature": 1.0, "top_k": 99}, [1 / 6, 3 / 6, 2 / 6, 0]),
        ({"temperature": 1.0, "top_p": 0.45}, [0, 1, 0, 0]),
        ({"temperature": 1.0, "top_p": 0.6}, [0, 0.6, 0.4, 0]),
        ({"temperature": 1.0, "top_p": 0.9}, [1 / 6, 3 / 6, 2 / 6, 0]),
        # After top_k, the remaining two have 0.6 and 0.4, so the first reaches 0.55.
        ({"temperature": 1.0, "top_k": 2, "top_p": 0.55}, [0, 1, 0, 0]),
        ({"temperature": 1e-6}, [0, 1, 0, 0]),
        ({"temperature": 1.0, "top_p": 1e-9}, [0, 1, 0, 0]),
    ],
)
def test_probabilities_by_hand(options: dict[str, Any], expected: list[float]) -> None:
    assert probabilities(LOGITS, **options).tolist() == pytest.approx(expected, abs=1e-6)


def test_sampled_frequencies_follow_the_probabilities() -> None:
    sampler = Sampler(temperature=1.0, seed=7)
    draws = 6000
    counts = np.bincount([sampler.choose(LOGITS) for _ in range(draws)], minlength=4)
    expected = np.array([1 / 6, 3 / 6, 2 / 6, 0.0])
    # Five standard deviations of a binomial count.
    assert (np.abs(counts - draws * expected) <= 5 * np.sqrt(draws * expected * (1 - expected))).all()


@pytest.mark.parametrize("top_k", [None, 1, 7, 300, 1000])
@pytest.mark.parametrize("top_p", [None, 1e-300, 0.3, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("logits", ["random", "with ties", "all equal"])
def test_probabilities_by_their_definition(top_k: int | None, top_p: float | None, logits: str) -> None:
    """All tokens sorted, then cut: slower, and the same."""
    random = np.random.default_rng(0)
    values = {
        "random": random.standard_normal(1000) * 3,
        "with ties": random.integers(0, 9, 1000).astype(np.float64),
        "all equal": np.zeros(1000),
    }[logits].astype(np.float32)
    order = np.argsort(-values, kind="stable")[:top_k]
    wide = values[order].astype(np.float64)
    ranked = np.exp((wide - wide[0]) / 0.8)
    ranked /= ranked.sum()
    kept = np.cumsum(ranked) - ranked < (1.0 if top_p is None else top_p)
    expected = np.zeros(1000)
    expected[order[kept]] = ranked[kept] / ranked[kept].sum()
    found = probabilities(values, temperature=0.8, top_k=top_k, top_p=top_p)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-15)


def test_a_seed_gives_the_same_tokens_everywhere() -> None:
    """PCG64 is the same on every machine, and so are these."""
    logits = np.log(np.arange(1, 101, dtype=np.float32))
    sampler = Sampler(temperature=1.0, seed=3)
    assert [sampler.choose(logits) for _ in range(8)] == [28, 48, 89, 76, 30, 65, 69, 39]


def test_greedy_takes_the_first_of_equals() -> None:
    assert Sampler().choose(np.array([0.0, 2.0, 2.0])) == 1
