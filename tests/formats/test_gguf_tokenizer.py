"""Tokenizers written as GGUF keys and rebuilt from them, by our own source reader and by transformers, give the same ids."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from model_builders import tiny_llama
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer

from cluscomp_export.sources import open_source
from cluscomp_formats.errors import UnsupportedError
from cluscomp_formats.gguf import open_gguf, write_dense_gguf, write_gguf
from cluscomp_formats.ir import Array, Model
from cluscomp_formats.tokens.chat_templates import find_chat_templates
from cluscomp_formats.tokens.word_schemes import SCHEMES

TEXT = "Once upon a time, there were 1234 apples; naïve café 日本 <|end|> isn't it?\n\n  Yes   indeed.\t"
CORPUS = [TEXT, "the quick brown fox jumps over the lazy dog " * 3, "0123456789 aren't we'll they've " * 3]


def bytes_of(value: Any) -> Array:
    return Array.of(np.frombuffer(json.dumps(value).encode(), np.uint8))


def with_tokenizer(tokenizer: dict[str, Any], config: dict[str, Any], vocab_size: int) -> Model:
    files = {"tokenizer.json": bytes_of(tokenizer), "tokenizer_config.json": bytes_of(config)}
    return replace(tiny_llama(vocabulary=vocab_size), files=files)


def byte_level(steps: list[Any], *, use_regex: bool, ignore_merges: bool = False) -> dict[str, Any]:
    """Train a byte-level BPE that splits text by `steps`, then `ByteLevel`."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*steps, last])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|begin|>", "<|end|>"]
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken("apples", normalized=False)])
    value: dict[str, Any] = json.loads(tokenizer.to_str())
    return value


def split(pattern: str) -> Any:
    return pre_tokenizers.Split(Regex(pattern), "isolated")


SPECIAL = {"bos_token": "<|begin|>", "eos_token": {"content": "<|end|>"}, "chat_template": "{{ messages }}"}


def ids(tokenizer: dict[str, Any], text: str) -> list[int]:
    return list(Tokenizer.from_str(json.dumps(tokenizer)).encode(text).ids)


def rebuilt(model: Model, path: Path) -> dict[str, Any]:
    write_dense_gguf(model, path)
    value: dict[str, Any] = json.loads(open_source(path).files["tokenizer.json"].read().tobytes())
    return value


SCHEME_CASES = [
    ("gpt-2", [], True, False),
    ("smollm", [pre_tokenizers.Digits(individual_digits=True)], True, False),
    *(
        (name, [split(SCHEMES[name].patterns[0])], False, name in ("llama-bpe", "tekken"))
        for name in ("llama-bpe", "dbrx", "tekken")
    ),
    ("qwen2", [split(SCHEMES["qwen2"].patterns[0])], False, False),
    ("default", [split(pattern) for pattern in SCHEMES["default"].patterns], False, False),
]


@pytest.mark.parametrize(("name", "steps", "use_regex", "ignore_merges"), SCHEME_CASES, ids=lambda value: str(value)[:9])
def test_byte_level_schemes(tmp_path: Path, name: str, steps: list[Any], use_regex: bool, ignore_merges: bool) -> None:
    tokenizer = byte_level(steps, use_regex=use_regex, ignore_merges=ignore_merges)
    if name == "qwen2":
        tokenizer["normalizer"] = {"type": "NFC"}
    size = len(tokenizer["model"]["vocab"]) + 10
    found = rebuilt(with_tokenizer(tokenizer, SPECIAL, size), tmp_path / "m.gguf")
    for text in (TEXT, "", " ", "x  1 2\n"):
        assert ids(found, text) == ids(tokenizer, text)
    keys = {key: field.contents() for key, field in gguf.GGUFReader(tmp_path / "m.gguf").fields.items()}
    assert (keys["tokenizer.ggml.model"], keys["tokenizer.ggml.pre"]) == ("gpt2", name)
    assert keys["tokenizer.ggml.bos_token_id"] == 0
    assert keys["tokenizer.ggml.eos_token_id"] == 1
    assert keys["tokenizer.chat_template"] == "{{ messages }}"
    types = keys["tokenizer.ggml.token_type"]
    assert (types[0], types[1], types[2]) == (3, 3, 1)
    assert types[keys["tokenizer.ggml.tokens"].index("apples")] == 4
    assert (types[-1], keys["tokenizer.ggml.tokens"][-1]) == (5, f"[PAD{size - 1}]")
    assert (keys["tokenizer.ggml.add_bos_token"], keys["tokenizer.ggml.add_eos_token"]) == (False, False)


@pytest.mark.parametrize(("before", "after"), [(True, False), (False, True), (True, True)])
def test_begin_and_end_tokens(tmp_path: Path, before: bool, after: bool) -> None:
    tokenizer = byte_level([], use_regex=True)
    template = f"{'<|begin|> ' if before else ''}$A{' <|end|>' if after else ''}"
    pieces = [("<|begin|>", 0), ("<|end|>", 1)]
    with_template = Tokenizer.from_str(json.dumps(tokenizer))
    with_template.post_processor = processors.Sequence(
        [processors.ByteLevel(trim_offsets=False), processors.TemplateProcessing(single=template, special_tokens=pieces)]
    )
    tokenizer = json.loads(with_template.to_str())
    found = rebuilt(with_tokenizer(tokenizer, SPECIAL, 410), tmp_path / "m.gguf")
    assert ids(found, TEXT) == ids(tokenizer, TEXT)


def test_a_sentencepiece_tokenizer(tmp_path: Path, stories_folder: Path, stories_text: Path) -> None:
    model = open_source(stories_folder)
    found = rebuilt(model, tmp_path / "m.gguf")
    original = json.loads(model.files["tokenizer.json"].read().tobytes())
    for text in (stories_text.read_text(encoding="utf-8").strip(), TEXT, "", "日本"):
        assert ids(found, text) == ids(original, text)
    # The library's Metaspace adds no space to a text that begins with one; SentencePiece and llama.cpp do.
    assert ids(found, " time") == ids(original, "  time")
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    text = stories_text.read_text(encoding="utf-8").strip()
    assert theirs(text).input_ids == ids(original, text)
    types = gguf.GGUFReader(tmp_path / "m.gguf").fields["tokenizer.ggml.token_type"].contents()
    assert types[:4] == [2, 3, 3, 6]


def test_spaces_replaced_by_the_normalizer(tmp_path: Path, stories_folder: Path) -> None:
    model = open_source(stories_folder)
    original = json.loads(model.files["tokenizer.json"].read().tobytes())
    replace_spaces = normalizers.Replace(" ", "\u2581")
    gemma = pre_tokenizers.Split(" ", "merged_with_previous")
    cases = [([normalizers.Prepend("\u2581"), replace_spaces], None), ([replace_spaces], None), ([replace_spaces], gemma)]
    for number, (steps, pre_tokenizer) in enumerate(cases):
        tokenizer = Tokenizer.from_str(json.dumps(original))
        tokenizer.normalizer = normalizers.Sequence(steps)
        tokenizer.pre_tokenizer = pre_tokenizer
        value = json.loads(tokenizer.to_str())
        files = {**model.files, "tokenizer.json": bytes_of(value)}
        found = rebuilt(replace(model, files=files), tmp_path / f"{number}.gguf")
        assert ids(found, "Once upon a time") == ids(value, "Once upon a time")


def drop_merge(tokenizer: dict[str, Any]) -> None:
    del tokenizer["model"]["merges"][5]


def repeat_late(tokenizer: dict[str, Any]) -> None:
    """A second merge to the token of the first merge, ranked last."""
    left, right = tokenizer["model"]["merges"][0]
    tokenizer["model"]["merges"].append([left + right, ""])


@pytest.mark.parametrize("damage", [drop_merge, repeat_late])
def test_merges_scores_cannot_say(tmp_path: Path, stories_folder: Path, damage: Callable[[dict[str, Any]], None]) -> None:
    model = open_source(stories_folder)
    value = json.loads(model.files["tokenizer.json"].read().tobytes())
    damage(value)
    assert_refused(replace(model, files={**model.files, "tokenizer.json": bytes_of(value)}), tmp_path)


def assert_refused(model: Model, folder: Path) -> None:
    """A dense file is refused; a native one omits the keys, gives the reason, and keeps the files."""
    with pytest.raises(UnsupportedError) as caught:
        write_dense_gguf(model, folder / "dense.gguf")
    assert [problem.kind for problem in caught.value.problems] == ["tokenizer"]
    assert not (folder / "dense.gguf").exists()
    write_gguf(model, folder / "native.gguf")
    keys = gguf.GGUFReader(folder / "native.gguf").fields
    assert not [key for key in keys if key.startswith("tokenizer.")]
    assert "not expressed" in keys["cluscomp.tokenizer_note"].contents()
    found = open_gguf(folder / "native.gguf", check=True)
    assert found.files["tokenizer.json"].read().tobytes() == model.files["tokenizer.json"].read().tobytes()


@pytest.mark.parametrize(
    "change",
    [
        lambda value: value["model"].update(type="WordPiece"),
        lambda value: value["model"].update(dropout=0.1),
        lambda value: value["model"].update(end_of_word_suffix="</w>"),
        lambda value: value.update(normalizer={"type": "Lowercase"}),
        lambda value: value.update(pre_tokenizer=None),
        lambda value: value["pre_tokenizer"]["pretokenizers"].insert(0, {"type": "Whitespace"}),
        lambda value: value["pre_tokenizer"]["pretokenizers"].insert(0, {"type": "Digits", "individual_digits": False}),
        lambda value: value["model"].update(ignore_merges=True),
        lambda value: value["pre_tokenizer"]["pretokenizers"][-1].update(add_prefix_space=True),
        lambda value: value.update(post_processor={"type": "RobertaProcessing"}),
        lambda value: value["added_tokens"].append({"id": 999, "content": "far", "special": False}),
        lambda value: value["added_tokens"].append({"id": 405, "content": "a", "special": False}),
        lambda value: value.pop("model"),
        lambda value: value["model"].update(vocab=[1, 2]),
    ],
)  # fmt: skip
def test_tokenizers_that_cannot_be_expressed(tmp_path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    value = byte_level([], use_regex=True)
    change(value)
    assert_refused(with_tokenizer(value, SPECIAL, 410), tmp_path)


def test_a_tokenizer_json_that_is_no_json(tmp_path: Path) -> None:
    files = {"tokenizer.json": Array.of(np.frombuffer(b"\xff{", np.uint8))}
    assert_refused(replace(tiny_llama(), files=files), tmp_path)


def test_a_chat_template_in_a_file_of_its_own(tmp_path: Path) -> None:
    model = with_tokenizer(byte_level([], use_regex=True), SPECIAL, 410)
    template = Array.of(np.frombuffer(b"{{ from_the_file }}", np.uint8))
    write_dense_gguf(replace(model, files={**model.files, "chat_template.jinja": template}), tmp_path / "m.gguf")
    assert gguf.GGUFReader(tmp_path / "m.gguf").fields["tokenizer.chat_template"].contents() == "{{ from_the_file }}"


def test_named_chat_templates(tmp_path: Path) -> None:
    named = [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}, {"name": "r-1", "template": "R"}]
    model = with_tokenizer(byte_level([], use_regex=True), {**SPECIAL, "chat_template": named}, 410)
    write_dense_gguf(model, tmp_path / "m.gguf")
    writer = gguf.GGUFWriter(tmp_path / "peer.gguf", "llama")
    writer.add_chat_template(named)
    ours = {key: field.contents() for key, field in gguf.GGUFReader(tmp_path / "m.gguf").fields.items()}
    theirs = {key: value.value for key, value in writer.kv_data[0].items() if "chat_template" in key}
    assert {key: value for key, value in ours.items() if "chat_template" in key} == {
        **theirs,
        # gguf-py iterates over a set, so the order is arbitrary.
        "tokenizer.chat_templates": ["tool_use", "r_1"],
    }
    assert set(theirs["tokenizer.chat_templates"]) == {"tool_use", "r_1"}
    found = find_chat_templates(open_source(tmp_path / "m.gguf").files)
    assert found == {"default": "D", "tool_use": "T", "r_1": "R"}


@pytest.mark.smollm2
def test_the_keys_of_smollm2_are_those_it_came_with(tmp_path: Path, smollm2_gguf: Path) -> None:
    source = open_source(smollm2_gguf)
    write_gguf(Model(source.config, {}, source.files), tmp_path / "m.gguf")
    found, original = (gguf.GGUFReader(path).fields for path in (tmp_path / "m.gguf", smollm2_gguf))
    keys = [key for key in original if key.startswith("tokenizer.") and key != "tokenizer.ggml.add_space_prefix"]
    assert len(keys) >= 8
    for key in keys:
        assert found[key].contents() == original[key].contents(), key
