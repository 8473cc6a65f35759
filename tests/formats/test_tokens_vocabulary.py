"""Tokenizers built from SentencePiece models and from `vocab.json` with `merges.txt` split texts like the originals."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from runtime_models import side_file
from tokenizers import AddedToken, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer

from cluscomp_export.conversion.tokenizer_warnings import tokenizer_warnings
from cluscomp_export.sources import open_source
from cluscomp_formats.errors import ClusCompError
from cluscomp_formats.gguf import write_dense_gguf
from cluscomp_formats.ir import Array, Model
from cluscomp_formats.tokens import UnsupportedTokenizer, no_tokenizer
from cluscomp_formats.tokens.from_vocabulary import build_tokenizer_files
from cluscomp_runtime.tokenizer import Tokenizer
from cluscomp_runtime.tokenizer.bounds import reason_to_isolate

TEXTS = ["Once upon a time", "", "a\n\nb\tc ", "Grüße, 日本 é 😀", "it's 1234567 x", "over  and   over", "<tool>x <tool> y"]


def blob(content: bytes) -> Array:
    return Array.of(np.frombuffer(content, np.uint8))


def tokenizer_of(files: Mapping[str, Array]) -> Tokenizer:
    found = Tokenizer.from_files(files)
    assert found is not None
    return found


# SentencePiece


@pytest.fixture(scope="module")
def stories_model(stories_folder: Path) -> bytes:
    return (stories_folder / "tokenizer.model").read_bytes()


def test_a_model_gives_the_ids_of_its_tokenizer_json(stories_folder: Path, stories_model: bytes, stories_text: Path) -> None:
    built = build_tokenizer_files({"tokenizer.model": blob(stories_model)})
    ours = tokenizer_of({name: blob(content) for name, content in built.items()})
    original = tokenizer_of({"tokenizer.json": blob((stories_folder / "tokenizer.json").read_bytes())})
    # SentencePiece and the library's Metaspace differ if a text begins with a space.
    for text in (stories_text.read_text(encoding="utf-8"), "x</s>y<s>", *TEXTS):
        assert ours.encode(text) == original.encode(text)
    assert ours.special_tokens == {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    assert reason_to_isolate(built["tokenizer.json"]) is None
    value, stored = json.loads(built["tokenizer.json"]), json.loads((stories_folder / "tokenizer.json").read_bytes())
    for part in ("added_tokens", "post_processor"):
        assert value[part] == stored[part]


def test_the_artefact_carries_what_was_built(stories_folder: Path, tmp_path: Path, stories_text: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(stories_folder, folder)
    (folder / "tokenizer.json").unlink()
    source = open_source(folder)
    assert {"tokenizer.json", "tokenizer.model"} <= source.files.keys()
    assert json.loads(source.files["tokenizer_config.json"].read().tobytes())["tokenizer_class"] == "LlamaTokenizer"
    assert tokenizer_warnings(source) == []
    text = stories_text.read_text(encoding="utf-8")[:2000].strip()
    ids = tokenizer_of(open_source(stories_folder).files).encode(text)
    assert tokenizer_of(source.files).encode(text) == ids
    # An older output, written without it, is read in the same way.
    assert tokenizer_of({name: array for name, array in source.files.items() if name != "tokenizer.json"}).encode(text) == ids
    write_dense_gguf(source, tmp_path / "m.gguf")
    assert tokenizer_of(open_source(tmp_path / "m.gguf").files).encode(text) == ids


@pytest.mark.parametrize(
    ("config", "before", "after"),
    [
        ({}, [1], []),
        ({"add_bos_token": False}, [], []),
        ({"add_bos_token": True, "add_eos_token": True}, [1], [2]),
        ({"bos_token": "</s>", "eos_token": {"content": "<s>"}, "add_eos_token": True}, [2], [1]),
        ({"bos_token": "nowhere"}, [], []),
    ],
)
def test_what_goes_around_a_text(config: dict[str, Any], before: list[int], after: list[int], stories_model: bytes) -> None:
    files = {"tokenizer.model": blob(stories_model), "tokenizer_config.json": side_file(json.dumps(config))}
    tokenizer = tokenizer_of(files)
    plain = tokenizer.encode("Once", add_special_tokens=False)
    assert tokenizer.encode("Once") == [*before, *plain, *after]


def test_a_space_before_the_text_alone_where_the_configuration_is_not_legacy(stories_model: bytes, tmp_path: Path) -> None:
    config = {"tokenizer_class": "LlamaTokenizer", "legacy": False, "add_bos_token": True}
    files = {"tokenizer.model": blob(stories_model), "tokenizer_config.json": side_file(json.dumps(config))}
    for name, content in build_tokenizer_files(files).items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for text in (*TEXTS, "<s>Once</s>upon"):
        assert theirs(text, add_special_tokens=False).input_ids == tokenizer_of(files).encode(text, add_special_tokens=False)


def train(**options: Any) -> tuple[Any, bytes]:
    """Train a SentencePiece model with its own library; return it and its bytes."""
    sentencepiece = pytest.importorskip("sentencepiece")
    from io import BytesIO

    lines = [line for line in Path(__file__).read_text(encoding="utf-8").split("\n") if line.strip()]
    out = BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*lines, "Grüße aus Köln ﬁ ①"]),
        model_writer=out,
        vocab_size=400,
        hard_vocab_limit=False,
        user_defined_symbols=["<tool>"],
        control_symbols=["<control>"],
        minloglevel=2,
        **options,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=out.getvalue()), out.getvalue()


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize("rules", ["identity", "nmt_nfkc"])
@pytest.mark.parametrize("spaces", [True, False])
@pytest.mark.parametrize("fallback", [True, False])
def test_ids_are_those_of_sentencepiece(kind: str, rules: str, spaces: bool, fallback: bool) -> None:
    """`spaces`: a space is inserted before a text, and repeated spaces are kept."""
    theirs, content = train(
        model_type=kind,
        normalization_rule_name=rules,
        add_dummy_prefix=spaces,
        remove_extra_whitespaces=not spaces,
        byte_fallback=fallback,
        num_threads=1,
    )
    ours = tokenizer_of({"tokenizer.model": blob(content)})

    @settings(max_examples=40, deadline=None)
    @given(text=st.text(st.sampled_from("aethoxsn wkl'., \n012日é\U0001f600ﬁ①"), max_size=40))
    def check(text: str) -> None:
        ids = ours.encode(text, add_special_tokens=False)
        assert ids == theirs.encode(text)
        # We skip unknown tokens, they print them.
        if theirs.unk_id() not in ids:
            assert ours.decode(ids) == theirs.decode(ids)

    check()
    for text in ("  a  b  ", " ", "x" * 50, "Grüße aus Köln"):
        assert ours.encode(text, add_special_tokens=False) == theirs.encode(text)


def test_t5_has_its_sentinels_and_ends_a_text(tmp_path: Path) -> None:
    _, content = train(model_type="unigram", unk_id=2, bos_id=-1, eos_id=1, pad_id=0, num_threads=1)
    config = {"tokenizer_class": "T5Tokenizer", "extra_ids": 100}
    (tmp_path / "spiece.model").write_bytes(content)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5"}))
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    ours = tokenizer_of({"spiece.model": blob(content), "tokenizer_config.json": side_file(json.dumps(config))})
    for text in ("the vocabulary of a model", "of <extra_id_0>a<extra_id_99>"):
        assert ours.encode(text) == theirs(text).input_ids
    assert ours.encode("x")[-1] == ours.eos_id == 1


# Invalid files


def field(number: int, content: bytes) -> bytes:
    return bytes([number << 3 | 2, len(content)]) + content


def piece(text: bytes, score: float = 0.0) -> bytes:
    return field(1, field(1, text) + b"\x15" + struct.pack("<f", score))


HOSTILE = [
    b"",
    b"\x00",
    b"\xff" * 40,
    b"\x0a\xff\xff\xff\xff\x0f",
    b"\x0a\x80",
    b"\x0b\x0c",
    field(2, b"\x18\x02"),
    piece(b"a") * 2,
    piece(b""),
    piece(b"\xff"),
    piece(b"a", float("nan")),
    piece(b"a", float("inf")),
    piece(b"a") + field(2, b"\x18\x03"),
    piece(b"a") + field(2, b"\xc0\x01\x01"),
    piece(b"a") + field(3, b"\x28\x00"),
    field(1, field(1, b"a") + b"\x18\x05"),
    b"SGVsbG8= 0\n" * 10,
]


@pytest.mark.parametrize("content", HOSTILE)
def test_what_is_no_model_is_no_tokenizer(content: bytes) -> None:
    with pytest.raises(UnsupportedTokenizer):
        build_tokenizer_files({"tokenizer.model": blob(content)})
    assert Tokenizer.from_files({"tokenizer.model": blob(content)}) is None


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_damaged_model_is_read_or_refused(data: st.DataObject, stories_model: bytes) -> None:
    content = bytearray(stories_model[: data.draw(st.integers(1, len(stories_model)))])
    for at in data.draw(st.lists(st.integers(0, len(content) - 1), max_size=4)):
        content[at] = data.draw(st.integers(0, 255))
    with contextlib.suppress(ClusCompError):
        tokenizer = Tokenizer.from_files({"tokenizer.model": blob(bytes(content))})
        if tokenizer is not None:
            tokenizer.encode("Once upon a time")


# Byte-level


def trained_byte_level(pattern: Any) -> Backend:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pattern
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=["<|endoftext|>"], show_progress=False
    )
    backend.train_from_iterator([Path(__file__).read_text(encoding="utf-8")], trainer)
    backend.add_tokens([AddedToken("<tool>", normalized=False)])
    return backend


@pytest.mark.parametrize(("tokenizer_class", "model_type"), [("GPT2Tokenizer", "gpt2"), ("Qwen2Tokenizer", "qwen2")])
@pytest.mark.parametrize("says", [True, False])
def test_a_vocabulary_with_merges(tokenizer_class: str, model_type: str, says: bool, tmp_path: Path) -> None:
    stored = json.loads(trained_byte_level(pre_tokenizers.ByteLevel(False)).to_str())["model"]
    config = {"tokenizer_class": tokenizer_class} if says else {}
    contents = {
        "vocab.json": json.dumps(stored["vocab"]),
        "merges.txt": "\n".join(["#version: 0.2", *(" ".join(merge) for merge in stored["merges"]), ""]),
        "tokenizer_config.json": json.dumps({**config, "extra_special_tokens": ["<tool>"]}),
    }
    for name, content in {**contents, "config.json": json.dumps({"model_type": model_type})}.items():
        (tmp_path / name).write_text(content, encoding="utf-8")
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    files = {name: side_file(content) for name, content in contents.items()}
    built = build_tokenizer_files(files, model_type)
    assert reason_to_isolate(built["tokenizer.json"]) is None
    ours = tokenizer_of({**files, **{name: blob(content) for name, content in built.items()}})
    for text in [*TEXTS, "isn't it?\n\n  Yes", "cafe\u0301", "x<|endoftext|>y"]:
        assert ours.encode(text) == theirs(text).input_ids, text
    assert ours.special_tokens == theirs.special_tokens_map


# Reasons why there is no tokenizer


BYTE_FILES = {"vocab.json": '{"a": 0, "b": 1, "ab": 2}', "merges.txt": "a b\n"}


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({}, r"there is no tokenizer\.json: put the model's own"),
        ({"tekken.json": "{}"}, r"tekken\.json alone is not read: make a tokenizer"),
        ({"qwen.tiktoken": "IQ== 0"}, r"qwen\.tiktoken alone is not read: make a tokenizer"),
        ({"vocab.txt": "[UNK]\n"}, r"vocab\.txt alone is not read: make a tokenizer"),
        ({"vocab.json": "{}"}, r"vocab\.json alone is not read: make a tokenizer"),
        ({"tokenizer.model": "IQ== 0\nIg== 1\n"}, r"a tiktoken vocabulary.*: make a tokenizer"),
        (BYTE_FILES, r"with no tokenizer_class, it is unknown how"),
        (
            {**BYTE_FILES, "tokenizer_config.json": '{"tokenizer_class": "RobertaTokenizer"}'},
            r"with RobertaTokenizer, it is unknown how",
        ),
        ({**BYTE_FILES, "merges.txt": "a c", "tokenizer_config.json": '{"tokenizer_class": "GPT2Tokenizer"}'}, "'a c' of"),
        ({"tokenizer.model": "", "tokenizer_config.json": '{"tokenizer_class": "XLMRobertaTokenizerFast"}'}, "its own ids"),
    ],
)
def test_a_model_without_a_tokenizer_says_why_and_what_to_do(files: dict[str, str], reason: str) -> None:
    stored = {name: side_file(content) for name, content in files.items()}
    found = no_tokenizer(Model({}, {}, stored))
    assert re.search(reason, f"{found.found}: {found.remedy}")
    assert Tokenizer.from_files(stored) is None
