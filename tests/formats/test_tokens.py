"""The tokens, special tokens and tokens around a text are those of transformers, for all combinations of files."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from runtime_models import side_file
from transformers import AutoTokenizer

from cluscomp_formats.errors import InvalidFileError
from cluscomp_formats.ir import Array
from cluscomp_formats.tokens import read_tokenizer
from cluscomp_runtime.tokenizer import Tokenizer

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
PLAIN = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False, "special": True}
TEXTS = ["<a>Once<b> upon <c> a <a> time", "Once", "", "<b> <a><s>x</s>"]


def entry(content: str, **flags: bool) -> dict[str, Any]:
    return {"content": content, **PLAIN, **flags}


def as_files(values: Mapping[str, Any]) -> dict[str, Array]:
    return {f"{name}.json": side_file(json.dumps(value)) for name, value in values.items()}


def as_folder(values: Mapping[str, Any], folder: Path) -> Any:
    """Return the tokenizer that transformers loads from these files."""
    for name, value in {**values, "config": {"model_type": "llama"}}.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def stories(stories_folder: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((stories_folder / "tokenizer.json").read_bytes())
    return value


def with_added(tokenizer: dict[str, Any], *entries: tuple[int, dict[str, Any]]) -> dict[str, Any]:
    value = copy.deepcopy(tokenizer)
    value["added_tokens"] += [{"id": number, **flags} for number, flags in entries]
    return value


A, B, C = "<a>", "<b>", "<c>"
DECODER = "added_tokens_decoder"
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], list[tuple[int, dict[str, Any]]]]] = {
    "nothing beside": ({}, {}, []),
    "by id": ({DECODER: {"512": entry(A), "513": entry(B, special=False)}}, {}, []),
    "by id, in another order and with a gap": ({DECODER: {"515": entry(A), "513": entry(B)}}, {}, []),
    "by id, in the vocabulary": ({DECODER: {"5": entry("he"), "6": entry("<0x41>")}}, {}, []),
    "by id, which leaves other files aside": (
        {DECODER: {"512": entry(A)}},
        {"added_tokens": {B: 513}, "special_tokens_map": {"pad_token": C}},
        [],
    ),
    "other flags than in tokenizer.json": ({DECODER: {"512": entry(A, rstrip=True)}}, {}, [(512, entry(A, special=False))]),
    "another text than in tokenizer.json": ({DECODER: {"512": entry(B)}}, {}, [(512, entry(A))]),
    "a gap in tokenizer.json": ({}, {}, [(515, entry(A)), (517, entry(B))]),
    "added_tokens.json": ({}, {"added_tokens": {B: 513, A: 512}}, []),
    "added_tokens.json with named ones": (
        {},
        {"added_tokens": {B: 513, A: 512}, "special_tokens_map": {"pad_token": B, "eos_token": A}},
        [],
    ),
    "added_tokens.json against tokenizer.json": ({}, {"added_tokens": {B: 512, C: 513}}, [(512, entry(A))]),
    "the map overrules": ({}, {"special_tokens_map": {"eos_token": A, "pad_token": entry(B, lstrip=True)}}, []),
    "extra tokens": ({"extra_special_tokens": [B, A]}, {}, []),
    "additional tokens": ({"additional_special_tokens": [B, A]}, {}, []),
    "extra before additional": ({"additional_special_tokens": [A], "extra_special_tokens": [B]}, {}, []),
    "extra tokens with names": ({"extra_special_tokens": {"image_token": A, "x_token": B}}, {}, []),
    "extra tokens of the map": ({"extra_special_tokens": [B]}, {"special_tokens_map": {"extra_special_tokens": [A]}}, []),
    "additional tokens of the map": ({}, {"special_tokens_map": {"additional_special_tokens": [A]}}, []),
    "additional tokens of the map beside extra": (
        {"extra_special_tokens": [B]},
        {"special_tokens_map": {"additional_special_tokens": [A]}},
        [],
    ),
    "names of its own": ({"image_token": A, "add_prefix_space": None}, {"special_tokens_map": {"b_token": entry(B)}}, []),
    "named ones that are nowhere": ({"cls_token": A, "pad_token": C, "extra_special_tokens": [B, A]}, {}, []),
    "a named one that is an added one": ({"pad_token": A}, {}, [(512, entry(A, special=False))]),
}


@pytest.mark.parametrize("name", CASES)
def test_added_tokens_are_those_of_transformers(name: str, stories: dict[str, Any], tmp_path: Path) -> None:
    config, others, listed = CASES[name]
    values = {
        "tokenizer": with_added(stories, *listed),
        "tokenizer_config": {**SPECIAL, "tokenizer_class": "PreTrainedTokenizerFast", **config},
        **others,
    }
    theirs = as_folder(values, tmp_path)
    ours = Tokenizer.from_files(as_files(values))
    assert ours is not None
    assert {number: str(vars_of(token)) for number, token in ours.backend.get_added_tokens_decoder().items()} == {
        number: str(vars_of(token)) for number, token in theirs.added_tokens_decoder.items()
    }
    assert ours.special_tokens == theirs.special_tokens_map
    assert (ours.bos_id, ours.eos_id) == (theirs.bos_token_id, theirs.eos_token_id)
    for text in TEXTS:
        expected = theirs(text).input_ids
        assert ours.encode(text) == (expected[1:] if text.startswith("<s>") else expected), text
        assert ours.decode(expected, skip_special_tokens=True) == theirs.decode(expected, skip_special_tokens=True)
    # Writers of other formats get the result of the library.
    stored = read_tokenizer(as_files(values))
    assert stored is not None
    assert {item["content"]: item["id"] for item in stored.tokenizer["added_tokens"]} == theirs.get_added_vocab()


def vars_of(token: Any) -> dict[str, Any]:
    return {name: getattr(token, name) for name in entry("")}


def test_ids_that_files_claim_in_vain_are_told(stories: dict[str, Any]) -> None:
    config = {DECODER: {"515": entry(A), "513": entry(B)}}
    stored = read_tokenizer(as_files({"tokenizer": stories, "tokenizer_config": config}))
    assert stored is not None
    assert stored.moved == {A: (515, 513), B: (513, 512)}


CLASSES = ["LlamaTokenizer", "GemmaTokenizer", "Qwen2Tokenizer", "GPT2Tokenizer", "PreTrainedTokenizerFast"]


@pytest.mark.parametrize("tokenizer_class", CLASSES)
@pytest.mark.parametrize("template", [True, False])
@pytest.mark.parametrize("settings", [{}, {"add_bos_token": True, "add_eos_token": True}, {"add_bos_token": False}])
def test_the_post_processor_alone_says_what_goes_around_a_text(
    tokenizer_class: str, template: bool, settings: dict[str, bool], stories: dict[str, Any], tmp_path: Path
) -> None:
    tokenizer = stories if template else {**stories, "post_processor": None}
    values = {
        "tokenizer": tokenizer,
        "tokenizer_config": {**SPECIAL, "pad_token": "<unk>", "tokenizer_class": tokenizer_class, **settings},
    }
    theirs = as_folder(values, tmp_path)
    ours = Tokenizer.from_files(as_files(values))
    assert ours is not None
    assert ours.encode("Once")[:1] == ([1] if template else ours.encode("Once", add_special_tokens=False)[:1])
    assert (ours.encode("Once")[:1] == [1]) == (theirs("Once").input_ids[:1] == [1]) == template
    assert (ours.encode("Once")[-1:] == [2]) == (theirs("Once").input_ids[-1:] == [2])


@pytest.mark.parametrize("tokenizer_class", [*CLASSES, "GPTNeoXTokenizer", "CohereTokenizer", "GPT2TokenizerFast"])
@pytest.mark.parametrize("settings", [{}, {"eos_token": None, "unk_token": "<s>"}])
def test_special_tokens_of_a_class_that_no_file_names(
    tokenizer_class: str, settings: dict[str, Any], stories: dict[str, Any], tmp_path: Path
) -> None:
    texts = ["<bos>", "<eos>", "<pad>", "<mask>", "<|endoftext|>", "<|padding|>", "<BOS_TOKEN>", "<|END_OF_TURN_TOKEN|>"]
    texts += ["<UNK>", "<SEP>", "<PAD>", "<CLS>", "<MASK_TOKEN>"]
    tokenizer = copy.deepcopy(stories)
    tokenizer["model"]["vocab"] |= {text: 512 + number for number, text in enumerate(texts)}
    values = {"tokenizer": tokenizer, "tokenizer_config": {"tokenizer_class": tokenizer_class, **settings}}
    theirs = as_folder(values, tmp_path)
    ours = Tokenizer.from_files(as_files(values))
    assert ours is not None
    assert ours.special_tokens == theirs.special_tokens_map
    for token in theirs.special_tokens_map.values():
        assert ours.encode(f"{token}a", add_special_tokens=False)[0] == theirs.convert_tokens_to_ids(token)


MALFORMED = [
    ("tokenizer_config", {DECODER: [1]}),
    ("tokenizer_config", {DECODER: {"x": entry(A)}}),
    ("tokenizer_config", {DECODER: {"-1": entry(A)}}),
    ("tokenizer_config", {DECODER: {"9" * 5000: entry(A)}}),
    ("tokenizer_config", {DECODER: {"512": A}}),
    ("tokenizer_config", {DECODER: {"512": entry("\ud800")}}),
    ("tokenizer_config", {"pad_token": "\ud800"}),
    ("added_tokens", {A: "512"}),
    ("added_tokens", {A: -1}),
    ("added_tokens", {A: 1 << 70}),
    ("added_tokens", {"\ud800": 512}),
    ("special_tokens_map", {"pad_token": {"content": "\ud800"}}),
]


@pytest.mark.parametrize(("file", "content"), MALFORMED)
def test_malformed_tokens_are_an_invalid_file(file: str, content: dict[str, Any], stories: dict[str, Any]) -> None:
    with pytest.raises(InvalidFileError) as error:
        Tokenizer.from_files(as_files({"tokenizer": stories, file: content}))
    assert error.value.problems[0].file == f"{file}.json"


def test_a_vocabulary_that_is_no_unicode_is_an_invalid_file_with_added_tokens_too(stories: dict[str, Any]) -> None:
    tokenizer = copy.deepcopy(stories)
    tokenizer["model"]["vocab"]["\ud800"] = 512
    for config in ({}, {"extra_special_tokens": [A]}):
        with pytest.raises(InvalidFileError):
            Tokenizer.from_files(as_files({"tokenizer": tokenizer, "tokenizer_config": config}))


@pytest.mark.parametrize("value", [False, 3, [], {}, {"content": 3}, None])
def test_what_is_merely_no_token_counts_as_absent(value: Any, stories: dict[str, Any]) -> None:
    config = {"bos_token": value, "own_token": value, "extra_special_tokens": [value]}
    tokenizer = Tokenizer.from_files(as_files({"tokenizer": stories, "tokenizer_config": config}))
    assert tokenizer is not None
    assert tokenizer.special_tokens == {}
    assert tokenizer.vocab_size == 512
