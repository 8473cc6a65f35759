"""Token ids and special tokens."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from runtime_models import byte_tokenizer_files, side_file

from cluscomp_formats.errors import InvalidFileError, InvalidRequestError
from cluscomp_formats.ir import Array
from cluscomp_runtime.tokenizer import Tokenizer, end_tokens

BOS, EOS = 256, 257


def byte_tokenizer(*, template: bool = False, **settings: Any) -> Tokenizer:
    """Return a byte tokenizer; with `template`, its post-processor adds `<s>` before a text."""
    files = byte_tokenizer_files(**settings)
    if template:
        value = json.loads(files["tokenizer.json"].read().tobytes())
        sequence = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
        value["post_processor"] = {
            "type": "TemplateProcessing",
            "single": sequence,
            "pair": [*sequence, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [BOS], "tokens": ["<s>"]}},
        }
        files["tokenizer.json"] = side_file(json.dumps(value))
    tokenizer = Tokenizer.from_files(files)
    assert tokenizer is not None
    return tokenizer


def test_bytes_and_back() -> None:
    tokenizer = byte_tokenizer()
    text = "Grüße, 世界 😀\n"
    assert tokenizer.encode(text) == list(text.encode())
    assert tokenizer.decode(list(text.encode())) == text
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (BOS, EOS, 258)


def test_special_tokens_are_recognised_and_left_out() -> None:
    tokenizer = byte_tokenizer()
    assert tokenizer.encode("<s>a</s>") == [BOS, 97, EOS]
    assert tokenizer.decode([BOS, 97, EOS]) == "a"
    assert tokenizer.decode([BOS, 97, EOS], skip_special_tokens=False) == "<s>a</s>"


@pytest.mark.parametrize(
    ("template", "settings", "expected"),
    [
        (False, {}, [97]),
        (True, {}, [BOS, 97]),
        # As in transformers 5 (see test_tokens.py), this setting has no effect if there is a tokenizer.json.
        (False, {"add_bos_token": True}, [97]),
        (True, {"add_bos_token": True}, [BOS, 97]),
        (True, {"add_bos_token": False}, [BOS, 97]),
        (True, {"add_bos_token": None}, [BOS, 97]),
        (True, {"bos_token": None}, [BOS, 97]),
    ],
)
def test_who_says_that_a_text_begins_with_bos(template: bool, settings: dict[str, Any], expected: list[int]) -> None:
    tokenizer = byte_tokenizer(template=template, **settings)
    assert tokenizer.encode("a") == expected
    assert tokenizer.encode("a", add_special_tokens=False) == [97]


@pytest.mark.parametrize("template", [False, True])
@pytest.mark.parametrize("add_bos_token", [None, True, False])
def test_a_written_bos_is_not_doubled(template: bool, add_bos_token: bool | None) -> None:
    assert byte_tokenizer(template=template, add_bos_token=add_bos_token).encode("<s>a") == [BOS, 97]


def test_truncation_and_padding_of_training_are_off() -> None:
    files = byte_tokenizer_files()
    value = json.loads(files["tokenizer.json"].read().tobytes())
    value["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    value["padding"] = {
        "strategy": {"Fixed": 9},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "</s>",
    }
    tokenizer = Tokenizer.from_files({"tokenizer.json": side_file(json.dumps(value))})
    assert tokenizer is not None
    assert tokenizer.encode("abcde") == list(b"abcde")


def test_no_tokenizer_is_none() -> None:
    assert Tokenizer.from_files({}) is None


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"model": {"type": "Nonsense"}}', "\x00"])
def test_a_broken_tokenizer_is_an_invalid_file(content: str) -> None:
    with pytest.raises(InvalidFileError) as error:
        Tokenizer.from_files({"tokenizer.json": side_file(content)})
    assert error.value.problems[0].file == "tokenizer.json"


def changed_tokenizer(**members: Any) -> dict[str, Array]:
    files = byte_tokenizer_files()
    content = {**json.loads(files["tokenizer.json"].read().tobytes()), **members}
    return {**files, "tokenizer.json": side_file(json.dumps(content))}


def test_a_panic_of_the_library_is_an_invalid_file() -> None:
    piece = {"SpecialToken": {"id": "not there", "type_id": 0}}
    template = {"type": "TemplateProcessing", "single": [piece], "pair": [], "special_tokens": {}}
    loaded = Tokenizer.from_files(changed_tokenizer(post_processor=template))
    assert loaded is not None
    with pytest.raises(InvalidFileError, match="tokenizers library"):
        loaded.encode("a")


def test_a_tokenizer_that_cannot_encode_is_an_invalid_file() -> None:
    model = {"type": "WordPiece", "unk_token": "?", "continuing_subword_prefix": "", "max_input_chars_per_word": 9}
    loaded = Tokenizer.from_files(changed_tokenizer(model={**model, "vocab": {"a": 0}}))
    assert loaded is not None
    with pytest.raises(InvalidFileError, match="cannot encode"):
        loaded.encode("b")


def test_a_special_token_that_is_no_unicode_is_an_invalid_file() -> None:
    files = {**byte_tokenizer_files(), "tokenizer_config.json": side_file('{"bos_token": "\\ud800"}')}
    with pytest.raises(InvalidFileError, match="special token"):
        Tokenizer.from_files(files)


def test_a_text_that_is_no_unicode_is_refused() -> None:
    loaded = Tokenizer.from_files(byte_tokenizer_files())
    assert loaded is not None
    with pytest.raises(InvalidRequestError, match="not valid Unicode"):
        loaded.encode("a\udcff")


@pytest.mark.parametrize("content", ["{", "[1]", "[" * 100000, '"text"'])
def test_a_broken_tokenizer_config_is_an_invalid_file(content: str) -> None:
    with pytest.raises(InvalidFileError) as error:
        Tokenizer.from_files({**byte_tokenizer_files(), "tokenizer_config.json": side_file(content)})
    assert error.value.problems[0].file == "tokenizer_config.json"


@pytest.mark.parametrize("ids", [[-1], [2**32], [1.5], [True], ["a"], "text", 5, None])
def test_ids_that_are_none_are_refused(ids: Any) -> None:
    with pytest.raises(InvalidRequestError):
        byte_tokenizer().decode(ids)


@pytest.mark.parametrize("ids", [np.array([97, 98], np.uint16), (97, np.int64(98)), torch.tensor([97, 98])])
def test_ids_of_arrays_are_decoded(ids: Any) -> None:
    assert byte_tokenizer().decode(ids) == "ab"


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({"eos_token_id": [5, 6]}, {"eos_token_id": 7}, {5, 6}),
        ({"eos_token_id": 5}, {}, {5}),
        (None, {"eos_token_id": 7}, {7}),
        ({}, {"eos_token_id": [7, 8]}, {7, 8}),
        (None, {}, {EOS}),
        (None, {"eos_token_id": None}, {EOS}),
    ],
)
def test_where_end_tokens_come_from(generation: dict[str, Any] | None, config: dict[str, Any], expected: set[int]) -> None:
    files = {} if generation is None else {"generation_config.json": side_file(json.dumps(generation))}
    assert end_tokens(config, files, byte_tokenizer()) == expected


def test_without_anything_there_is_no_end_token() -> None:
    assert end_tokens({}, {}, None) == frozenset()


@pytest.mark.parametrize("value", ["</s>", [1, "2"], True, {"id": 1}])
def test_malformed_end_tokens(value: Any) -> None:
    with pytest.raises(InvalidFileError, match="eos_token_id"):
        end_tokens({"eos_token_id": value}, {}, None)
