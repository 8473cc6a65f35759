"""Tokenizers with unbounded time or memory: properties that are detected in the file, and processes that are stopped."""

from __future__ import annotations

import base64
import copy
import json
import os
import pickle
import struct
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from runtime_models import byte_tokenizer_files, side_file

from cluscomp_formats.errors import ClusCompError, InvalidFileError, UnsupportedError
from cluscomp_runtime.tokenizer import Tokenizer, backend
from cluscomp_runtime.tokenizer.backend import IsolatedTokenizer
from cluscomp_runtime.tokenizer.bounds import reason_to_isolate

STORIES = Path(__file__).parents[1] / "data" / "stories260K" / "tokenizer.json"
WORDS = {"type": "WordLevel", "vocab": {"a": 0, "[UNK]": 1}, "unk_token": "[UNK]"}
WORD_PIECE = {
    "type": "WordPiece",
    "vocab": {"a": 0, "[UNK]": 1},
    "unk_token": "[UNK]",
    "continuing_subword_prefix": "",
    "max_input_chars_per_word": 100,
}


def document(**parts: Any) -> dict[str, Any]:
    return {"added_tokens": [], "normalizer": None, "pre_tokenizer": None, "post_processor": None, "decoder": None} | {
        "model": WORDS,
        **parts,
    }


def reason(**parts: Any) -> str | None:
    return reason_to_isolate(json.dumps(document(**parts)).encode())


def load(**parts: Any) -> Tokenizer:
    tokenizer = Tokenizer.from_files({"tokenizer.json": side_file(json.dumps(document(**parts)))})
    assert tokenizer is not None
    return tokenizer


def replace(content: str, **pattern: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern or {"String": "e"}, "content": content}


def chain(members: str, *parts: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", members: list(parts)}


def split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def character_map(*, value: int = 0, child: int = 256, texts: bytes = b"b\0") -> dict[str, Any]:
    """Return a map of `a` to the text at `value`: a trie of three blocks of 256 units."""
    units = [0] * 768
    units[0] = child << 10
    units[256 ^ ord("a")] = ord("a") | 256 | ((256 ^ ord("a") ^ 512) << 10)
    units[512] = (1 << 31) | value
    content = struct.pack("<I768I", 4 * 768, *units) + texts
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(content).decode()}


def template(pieces: list[Any], ids: int = 1) -> dict[str, Any]:
    special = {"x": {"id": "x", "ids": [0] * ids, "tokens": ["a"] * ids}}
    return {"type": "TemplateProcessing", "single": pieces, "pair": [], "special_tokens": special}


SPECIAL, TEXT = {"SpecialToken": {"id": "x", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
BYTES = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}

ORDINARY: dict[str, dict[str, Any]] = {
    "llama 2": {
        "normalizer": chain("normalizers", {"type": "Prepend", "prepend": "▁"}, replace("▁", String=" ")),
        "decoder": chain(
            "decoders",
            replace(" ", String="▁"),
            {"type": "ByteFallback"},
            {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ),
        "post_processor": template([SPECIAL, TEXT]),
    },
    "t5": {"pre_tokenizer": METASPACE, "decoder": METASPACE},
    "nfkc and bytes": {"normalizer": {"type": "NFKC"}, "pre_tokenizer": BYTES, "decoder": BYTES},
    "bert": {
        "normalizer": {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True, "lowercase": True},
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": template([SPECIAL, TEXT, SPECIAL]),
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "model": WORD_PIECE,
    },
    "a sound character map": {"normalizer": character_map()},
    "a model without a type": {"model": {"vocab": {"a": 0}, "merges": [], "unk_token": None, "end_of_word_suffix": ""}},
}

SUSPECT: dict[str, dict[str, Any]] = {
    "replacements": {"normalizer": chain("normalizers", *[replace("ee")] * 40)},
    "a long replacement": {"normalizer": replace("e" * 100)},
    "nested sequences": {"normalizer": chain("normalizers", chain("normalizers", replace("e" * 9)), replace("e" * 9))},
    "an empty text replaced": {"normalizer": replace("e" * 100, String="")},
    "many normalizers": {"normalizer": chain("normalizers", *[{"type": "Lowercase"}] * 100)},
    "prepended texts": {"normalizer": chain("normalizers", *[{"type": "Prepend", "prepend": "aaa"}] * 10)},
    "normal forms in turn": {"normalizer": chain("normalizers", *[replace("\ufdfa", String="("), {"type": "NFKC"}] * 3)},
    "bytes of bytes": {"pre_tokenizer": chain("pretokenizers", *[BYTES] * 14)},
    "words of words": {"pre_tokenizer": chain("pretokenizers", *[METASPACE, split(".")] * 4)},
    "a pattern": {"pre_tokenizer": split("(a|a)*b")},
    "a pattern in a decoder": {"decoder": replace("", Regex="(a|a)*b")},
    "an unknown kind": {"pre_tokenizer": {"type": "Later"}},
    "a part without a type": {"normalizer": {"normalizers": [replace("ee")] * 40}},
    "replacements in a decoder": {"decoder": chain("decoders", *[replace("ee")] * 40)},
    "empty suffixes": {"decoder": chain("decoders", *[{"type": "BPEDecoder", "suffix": ""}] * 40)},
    "an empty delimiter": {
        "decoder": chain("decoders", *[{"type": "CTC", "pad_token": "", "word_delimiter_token": "", "cleanup": True}] * 4)
    },
    "a template of special tokens": {"post_processor": template([SPECIAL] * 2000 + [TEXT], ids=2000)},
    "a template that repeats the text": {"post_processor": template([TEXT, TEXT])},
    "long words": {"model": WORD_PIECE | {"max_input_chars_per_word": 10**9}},
    "a long prefix": {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [], "continuing_subword_prefix": "x" * 20000}},
    "nested pieces": {"model": {"type": "Unigram", "unk_id": 0, "vocab": [["a" * n, -1.0] for n in range(1, 4000)]}},
    "a character map of nothing": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "BAAAAAAAAAA="}},
    "a character map that leaves itself": {"normalizer": character_map(child=1 << 20)},
    "a character map of a text that is not there": {"normalizer": character_map(value=9)},
    "a character map that cuts a character": {"normalizer": character_map(value=1, texts="é\0".encode())},
    "a character map of long texts": {"normalizer": character_map(texts=b"b" * 1000 + b"\0")},
}


@pytest.mark.parametrize("name", ORDINARY)
def test_ordinary_tokenizers_run_in_this_process(name: str) -> None:
    assert reason(**ORDINARY[name]) is None
    assert isinstance(load(**ORDINARY[name]).backend, tokenizers.Tokenizer)


@pytest.mark.parametrize("content", [STORIES.read_bytes(), byte_tokenizer_files()["tokenizer.json"].read().tobytes()])
def test_tokenizers_of_models_run_in_this_process(content: bytes) -> None:
    assert reason_to_isolate(content) is None


@pytest.mark.parametrize("name", SUSPECT)
def test_suspect_tokenizers_are_noticed(name: str) -> None:
    assert reason(**SUSPECT[name])


def test_a_name_given_twice_is_noticed() -> None:
    """Parsers differ in which of the two they use."""
    bomb = json.dumps(document(normalizer=chain("normalizers", *[replace("ee")] * 40)))
    assert reason_to_isolate((bomb[:-1] + ', "normalizer": null}').encode())


def test_very_many_added_tokens_are_noticed() -> None:
    assert reason(added_tokens=[{"id": 2, "content": "x"}] * 20000)


@pytest.mark.parametrize(
    ("name", "text"), [("replacements", "e"), ("a template of special tokens", "a"), ("long words", "a" * 20000)]
)
def test_a_bomb_is_stopped(name: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "SECONDS", 2)
    monkeypatch.setattr(backend, "MEMORY_BYTES", 1 << 28)
    tokenizer = load(**SUSPECT[name])
    with pytest.raises(UnsupportedError, match="the tokenizer takes too much") as error:
        tokenizer.encode(text)
    assert error.value.problems[0].file == "tokenizer.json"


@pytest.mark.parametrize("name", ["replacements in a decoder", "empty suffixes"])
def test_a_bomb_in_a_decoder_is_stopped(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "SECONDS", 2)
    monkeypatch.setattr(backend, "MEMORY_BYTES", 1 << 28)
    tokenizer = load(**SUSPECT[name], model=WORDS | {"vocab": {"e": 0, "[UNK]": 1}})
    with pytest.raises(UnsupportedError, match="the tokenizer takes too much"):
        tokenizer.decode([0, 1, 0])


def test_a_pattern_without_end_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "SECONDS", 1)
    tokenizer = load(pre_tokenizer=split(r"(?:a|a){0,19}(?=\b\B)"))
    with pytest.raises(ClusCompError):
        tokenizer.encode("a" * 2000 + "!")


@pytest.mark.parametrize("name", ["a character map of nothing", "a character map of a text that is not there"])
def test_a_character_map_that_aborts_the_library_is_an_error(name: str) -> None:
    with pytest.raises((InvalidFileError, UnsupportedError)):
        load(**SUSPECT[name]).encode("a b")


def test_an_isolated_tokenizer_gives_what_the_library_gives() -> None:
    """A file that is not accepted may still be harmless."""
    parts = {"pre_tokenizer": split(r"\s+$"), "decoder": {"type": "WordPiece", "prefix": "", "cleanup": False}}
    isolated = load(**parts)
    assert isinstance(isolated.backend, IsolatedTokenizer)
    peer = tokenizers.Tokenizer.from_str(json.dumps(document(**parts)))
    for text in ("a", "a b", "", "é \n"):
        assert isolated.encode(text) == peer.encode(text).ids
        assert isolated.encode_with_spans(text) == (peer.encode(text).ids, peer.encode(text).offsets)
    assert isolated.decode([0, 1, 0]) == peer.decode([0, 1, 0])
    assert isolated.vocab_size == 2
    assert isolated.backend.token_to_id("a") == 0
    assert isolated.backend.id_to_token(9) is None
    with pytest.raises(InvalidFileError, match="tokenizers library"):
        load(model={"vocab": [["a", "b"]]})


def test_an_isolated_tokenizer_goes_on_after_it_was_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = load(**SUSPECT["replacements"])
    monkeypatch.setattr(backend, "SECONDS", 0)
    monkeypatch.setattr(backend, "SECONDS_PER_MEGABYTE", 1)
    with pytest.raises(UnsupportedError):
        tokenizer.encode("e")
    monkeypatch.undo()
    assert tokenizer.encode("a") == [0]


def test_an_isolated_tokenizer_survives_copies_and_forks() -> None:
    tokenizer = load(**SUSPECT["replacements"])
    for twin in (copy.deepcopy(tokenizer), pickle.loads(pickle.dumps(tokenizer))):  # noqa: S301
        assert twin.encode("a") == [0]
    if hasattr(os, "fork"):
        child = os.fork()
        if child == 0:
            os._exit(tokenizer.encode("a") != [0])
        assert os.waitpid(child, 0)[1] == 0
    assert tokenizer.encode("a") == [0]


def test_a_process_that_does_not_start_is_an_error_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", "/nowhere/python")
    with pytest.raises(UnsupportedError, match="does not start"):
        load(**SUSPECT["replacements"])
