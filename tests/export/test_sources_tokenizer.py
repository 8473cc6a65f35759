"""Tokenizers rebuilt from GGUF metadata give the ids of the tokenizers they were written from.

Byte-level ones are held against tokenizers trained here, with the pre-tokenizers the models' own `tokenizer.json` have;
SentencePiece ones against a plain implementation of its algorithm. Both also against transformers' GGUF loader.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import gguf
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sources_gguf_writer import add_tensors, finish, start_writer, tiny_model
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from cluscomp_export.sources import open_source
from cluscomp_export.sources.gguf.tokenizer import UnsupportedTokenizer, build_generation_config, build_tokenizer
from cluscomp_formats.gguf.end_of_generation import end_keys

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = (
    int(gguf.TokenType[name]) for name in ("NORMAL", "UNKNOWN", "CONTROL", "USER_DEFINED", "BYTE")
)

CORPUS = [
    "The 12345 quick brown foxes' tails don't jump over 3.14159 lazy dogs, they'll walk!",
    "Grüße aus Köln: naïve façade, Ελληνικά, русский текст, 日本語のテキスト, 한국어 😀😀.",
    "def f(x):\n    return x ** 2  # comment\n\n\tif (a<=b) { c += 1; }\r\n",
    "IT'S WE'VE I'm you're HELLO world    many   spaces \n\n\n lines",
] * 4

TEXTS = [
    *CORPUS[:4],
    "",
    " ",
    "  leading and trailing  ",
    "1234567890 1 22 333 4444",
    "½ ² Ⅳ ٣ 一二三",
    "e\u0301 vs \u00e9, \ufb01ligature, \u200bzero width, a\u00a0b",
    "<|begin|>user\nhi<|end|>\n<tool> x <tool>y",
    "tabs\t\tand\r\nnewlines\n \n  x",
    "=== $$$ +++ ~~~ ||| `code` \"quoted\" 'single'",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 family \x00\x7f",
]

SPLITTERS = {
    # As in HuggingFaceTB/SmolLM2's tokenizer.json.
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]),
    "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    **{
        name: pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(GGUF_PRE_TOKENIZER_SPLITS[name]), "isolated"),
                pre_tokenizers.ByteLevel(False, use_regex=False),
            ]
        )
        for name in ("llama-bpe", "qwen2", "tekken")
    },
}


def train_byte_level(scheme: str) -> Tokenizer:
    """A byte-level BPE with its scheme's pre-tokenizer and three added tokens."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=scheme in {"llama-bpe", "tekken"}))
    tokenizer.pre_tokenizer = SPLITTERS[scheme]
    tokenizer.decoder = decoders.ByteLevel()
    if scheme == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    alphabet = sorted(bytes_to_unicode().values())
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in ("<|begin|>", "<|end|>")])
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False)])
    return tokenizer


def byte_level_metadata(tokenizer: Tokenizer, scheme: str) -> dict[str, Any]:
    """What llama.cpp's converter stores of it."""
    vocab = tokenizer.get_vocab()
    tokens = sorted(vocab, key=vocab.__getitem__)
    special = {"<|begin|>": CONTROL, "<|end|>": CONTROL, "<tool>": USER_DEFINED}
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": scheme,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [special.get(token, NORMAL) for token in tokens],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in merges],
        "tokenizer.ggml.bos_token_id": vocab["<|begin|>"],
        "tokenizer.ggml.eos_token_id": vocab["<|end|>"],
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": "{{ messages }}",
    }


def rebuilt(metadata: dict[str, Any]) -> Tokenizer:
    return Tokenizer.from_str(build_tokenizer(metadata)["tokenizer.json"].decode())


def write_tokenizer_gguf(path: Path, metadata: dict[str, Any]) -> Path:
    model = tiny_model("llama", vocab_size=len(metadata["tokenizer.ggml.tokens"]))
    writer = start_writer(path, "llama", model.config)
    for key, value in metadata.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        else:
            writer.add_string(key, value)
    add_tensors(writer, model, "llama", "F32")
    finish(writer)
    return path


BYTE_LEVEL = {scheme: (original := train_byte_level(scheme), byte_level_metadata(original, scheme)) for scheme in SPLITTERS}


@pytest.mark.parametrize("scheme", SPLITTERS)
def test_byte_level_ids_are_those_of_the_original(scheme: str) -> None:
    original, metadata = BYTE_LEVEL[scheme]
    ours = rebuilt(metadata)
    assert ours.get_vocab() == original.get_vocab()
    for text in TEXTS:
        ids = ours.encode(text).ids
        assert ids == original.encode(text).ids, text
        if scheme != "qwen2":
            assert ours.decode(ids, skip_special_tokens=False) == text


@pytest.mark.parametrize("scheme", SPLITTERS)
@settings(max_examples=60, deadline=None)
@given(text=st.text(st.sampled_from("abtehDS'\u2019 \t\n\r019٣½².,!<|>_-Éé\u0301日本語\U0001f600 sdmtlrv"), max_size=40))
def test_byte_level_ids_on_any_text(scheme: str, text: str) -> None:
    original, metadata = BYTE_LEVEL[scheme]
    ours = _REBUILT.setdefault(scheme, rebuilt(metadata))
    assert ours.encode(text).ids == original.encode(text).ids


_REBUILT: dict[str, Tokenizer] = {}


def words(scheme: str, text: str) -> list[str]:
    tokenizer = rebuilt({**BYTE_LEVEL["gpt-2"][1], "tokenizer.ggml.pre": scheme})
    return [word.replace("Ġ", " ") for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)]


def test_words_by_hand() -> None:
    text = "a== 1234567 it's"
    assert words("gpt-2", text) == ["a", "==", " 1234567", " it", "'s"]
    assert words("smollm", text) == ["a", "==", " ", "1", "2", "3", "4", "5", "6", "7", " it", "'s"]
    assert words("llama-bpe", text) == ["a", "==", " ", "123", "456", "7", " it", "'s"]
    assert words("qwen2", text) == ["a", "==", " ", "1", "2", "3", "4", "5", "6", "7", " it", "'s"]
    # llama.cpp's default: punctuation first, then GPT-2's words, then digits in threes.
    assert words("default", text) == ["a", "==", " ", "123", "456", "7", " it", "'", "s"]


@pytest.mark.parametrize(("scheme", "whole"), [("llama-bpe", True), ("tekken", True), ("gpt-2", False), ("qwen2", False)])
def test_a_word_that_is_a_token_needs_no_merges_in_some_schemes(scheme: str, whole: bool) -> None:
    metadata = dict(BYTE_LEVEL[scheme][1])
    metadata["tokenizer.ggml.tokens"] = [*metadata["tokenizer.ggml.tokens"], "xqzj"]
    metadata["tokenizer.ggml.token_type"] = [*metadata["tokenizer.ggml.token_type"], NORMAL]
    assert rebuilt(metadata).encode("xqzj").tokens == (["xqzj"] if whole else ["x", "q", "z", "j"])


def test_a_file_without_a_scheme_is_cut_by_the_default() -> None:
    metadata = {key: value for key, value in BYTE_LEVEL["gpt-2"][1].items() if key != "tokenizer.ggml.pre"}
    assert build_tokenizer(metadata) == build_tokenizer({**metadata, "tokenizer.ggml.pre": "default"})


# SentencePiece


def sentencepiece_metadata(add_space_prefix: bool = True) -> dict[str, Any]:
    """A vocabulary with scores, as SentencePiece trains it: specials, 256 bytes, merges best first, then characters."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=500, show_progress=False))
    vocab = trained.get_vocab()
    # Without these characters, and the pieces they are in, the fall-back to bytes is reached too.
    kept = [token for token in vocab if not set(token) & set("日本語😀")]
    learned = sorted((token for token in kept if len(token) > 1), key=vocab.__getitem__)
    characters = sorted(token for token in kept if len(token) == 1)
    pieces = [*learned, *characters, "<tool>"]
    specials = ["<unk>", "<s>", "</s>"]
    tokens = [*specials, *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    types = [UNKNOWN, CONTROL, CONTROL, *([BYTE] * 256), *([NORMAL] * (len(pieces) - 1)), USER_DEFINED]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * 259 + [-float(rank) for rank in range(len(pieces))],
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_space_prefix": add_space_prefix,
    }


def sentencepiece_ids(metadata: dict[str, Any], text: str) -> list[int]:
    """SentencePiece BPE as its paper has it: merge the neighbours of best score, leftmost first, until none is a piece."""
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    scores = metadata["tokenizer.ggml.scores"]
    ids = {token: number for number, token in enumerate(tokens)}
    normal = {token: scores[number] for token, number in ids.items() if types[number] == NORMAL}
    prefix = "\u2581" if text and metadata["tokenizer.ggml.add_space_prefix"] else ""
    symbols = list(prefix + text.replace(" ", "\u2581"))
    while True:
        unions = [(normal[a + b], -at) for at, (a, b) in enumerate(itertools.pairwise(symbols)) if a + b in normal]
        if not unions:
            break
        at = -max(unions)[1]
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
    found: list[int] = [metadata["tokenizer.ggml.bos_token_id"]]
    for symbol in symbols:
        found += [ids[symbol]] if symbol in normal else [ids[f"<0x{byte:02X}>"] for byte in symbol.encode()]
    return found


SENTENCEPIECE = {prefix: sentencepiece_metadata(prefix) for prefix in (True, False)}
SENTENCEPIECE_REBUILT = {prefix: rebuilt(metadata) for prefix, metadata in SENTENCEPIECE.items()}


@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("text", [text for text in TEXTS if "<tool>" not in text])
def test_sentencepiece_ids_are_those_of_the_algorithm(prefix: bool, text: str) -> None:
    ours = SENTENCEPIECE_REBUILT[prefix]
    ids = ours.encode(text).ids
    assert ids == sentencepiece_ids(SENTENCEPIECE[prefix], text)
    assert ours.decode(ids) == text


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.sampled_from("aethoxsn wkl'., \n012日é\U0001f600\u2581"), max_size=40), prefix=st.booleans())
def test_sentencepiece_ids_on_any_text(text: str, prefix: bool) -> None:
    assert SENTENCEPIECE_REBUILT[prefix].encode(text).ids == sentencepiece_ids(SENTENCEPIECE[prefix], text)


def test_sentencepiece_special_tokens_in_the_text_are_found_whole() -> None:
    ours, tokens = SENTENCEPIECE_REBUILT[True], SENTENCEPIECE[True]["tokenizer.ggml.tokens"]
    ids = ours.encode("<s>the</s> <tool>").ids
    assert ids[:2] == [1, 1]
    assert 2 in ids
    assert ids[-1] == tokens.index("<tool>")


def test_a_space_is_put_in_front_after_every_added_token_as_in_llama_cpp() -> None:
    metadata = SENTENCEPIECE[True]
    tool, bos = metadata["tokenizer.ggml.tokens"].index("<tool>"), 1
    the = sentencepiece_ids(metadata, "the")[1:]
    assert SENTENCEPIECE_REBUILT[True].encode("the<tool>the<s>the").ids == [bos, *the, tool, *the, bos, *the]


def test_merges_by_hand() -> None:
    tokens = ["<unk>", "a", "b", "c", "ab", "bc", "abc"]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0, -9.0, -9.0, -9.0, -2.0, -1.0, -3.0],
        "tokenizer.ggml.token_type": [UNKNOWN] + [NORMAL] * 6,
    }
    built = json.loads(build_tokenizer(metadata)["tokenizer.json"])
    # bc scores best; abc is made of ab + c or a + bc.
    assert built["model"]["merges"] == [["b", "c"], ["a", "b"], ["ab", "c"], ["a", "bc"]]


def test_text_that_spells_a_byte_or_control_token_is_not_merged_into_it() -> None:
    tokens = ["<unk>", "</s>", "<0x41>", "<", "/", "s", ">", "</", "s>", "0", "x", "4", "1", "<0x4", "1>"]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * len(tokens),
        "tokenizer.ggml.token_type": [UNKNOWN, CONTROL, BYTE, *([NORMAL] * (len(tokens) - 3))],
    }
    merges = json.loads(build_tokenizer(metadata)["tokenizer.json"])["model"]["merges"]
    assert sorted(merges) == [["1", ">"], ["<", "/"], ["s", ">"]]


# Files


@pytest.mark.parametrize("scheme", ["gpt-2", "llama-bpe", "tekken"])
def test_byte_level_files_read_like_transformers_reads_them(tmp_path: Path, scheme: str) -> None:
    path = write_tokenizer_gguf(tmp_path / "model.gguf", BYTE_LEVEL[scheme][1])
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    ours = save_and_load(path, tmp_path / "ours")
    for text in TEXTS:
        assert ours(text).input_ids == theirs(text, add_special_tokens=False).input_ids, text
    assert (ours.bos_token, ours.eos_token, ours.chat_template) == ("<|begin|>", "<|end|>", "{{ messages }}")


def test_sentencepiece_files_read_like_transformers_reads_them(tmp_path: Path) -> None:
    path = write_tokenizer_gguf(tmp_path / "model.gguf", SENTENCEPIECE[True])
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    ours = save_and_load(path, tmp_path / "ours")
    # transformers puts no second space in front of a text that begins with one, and none after an added token; llama.cpp does.
    for text in [text for text in TEXTS if not text.startswith(" ") and "<tool>" not in text]:
        assert ours(text).input_ids == theirs(text).input_ids, text


def save_and_load(path: Path, folder: Path) -> Any:
    """The tokenizer as a user of `transformers` gets it from the model's side files."""
    folder.mkdir()
    for name, content in open_source(path).files.items():
        (folder / name).write_bytes(content.read().tobytes())
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize(("add_bos", "add_eos"), [(True, False), (False, True), (True, True), (None, None)])
def test_begin_and_end_are_added_as_the_file_says(add_bos: bool | None, add_eos: bool | None) -> None:
    metadata = dict(BYTE_LEVEL["llama-bpe"][1])
    del metadata["tokenizer.ggml.add_bos_token"]
    if add_bos is not None:
        metadata |= {"tokenizer.ggml.add_bos_token": add_bos, "tokenizer.ggml.add_eos_token": add_eos}
    plain = BYTE_LEVEL["llama-bpe"][0].encode("some text").ids
    bos, eos = metadata["tokenizer.ggml.bos_token_id"], metadata["tokenizer.ggml.eos_token_id"]
    # Where the file is silent llama.cpp adds a begin token for Llama 3's scheme.
    expected = [*([bos] if add_bos in {True, None} else []), *plain, *([eos] if add_eos else [])]
    assert rebuilt(metadata).encode("some text").ids == expected
    config = json.loads(build_tokenizer(metadata)["tokenizer_config.json"])
    assert (config["add_bos_token"], config["add_eos_token"]) == (add_bos in {True, None}, bool(add_eos))


GPT2 = BYTE_LEVEL["gpt-2"][1]

UNSUPPORTED: dict[str, tuple[dict[str, Any], str]] = {
    "no tokenizer": ({"tokenizer.ggml.model": None}, "no tokenizer"),
    "another model": ({"tokenizer.ggml.model": "t5"}, "tokenizer model 't5'"),
    "unknown scheme": ({"tokenizer.ggml.pre": "klingon"}, "unknown pre-tokenizer 'klingon'"),
    "scheme of another type": ({"tokenizer.ggml.pre": ["gpt-2"]}, "unknown pre-tokenizer"),
    "no tokens": ({"tokenizer.ggml.tokens": None}, "tokens is missing"),
    "tokens of another type": ({"tokenizer.ggml.tokens": [1, 2]}, "not a list of str"),
    "a token twice": ({"tokenizer.ggml.tokens": ["a", "a"]}, "same text"),
    "a token no text": ({"tokenizer.ggml.tokens": ["a", "\udcff"]}, "not valid UTF-8"),
    "types short": ({"tokenizer.ggml.token_type": [1]}, "1 items for"),
    "no merges": ({"tokenizer.ggml.merges": None}, "merges is missing"),
    "merge of one": ({"tokenizer.ggml.merges": ["a"]}, "the merge 'a'"),
    "merge unknown": ({"tokenizer.ggml.merges": ["\u2581 \u2581"]}, "does not combine two tokens"),
    "special past the end": ({"tokenizer.ggml.bos_token_id": 10**6}, "bos_token_id is 1000000"),
    "special of another type": ({"tokenizer.ggml.eos_token_id": "x"}, "eos_token_id is 'x'"),
    "no scores": ({"tokenizer.ggml.model": "llama"}, "scores is missing"),
    "chat template no text": ({"tokenizer.chat_template": "\udcff"}, "chat template is not valid UTF-8"),
}


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_tokenizers_that_cannot_be_rebuilt_say_why(case: str) -> None:
    change, reason = UNSUPPORTED[case]
    metadata = {key: value for key, value in {**GPT2, **change}.items() if value is not None}
    with pytest.raises(UnsupportedTokenizer, match=reason):
        build_tokenizer(metadata)


@pytest.mark.parametrize(
    ("tokens", "reason"),
    [
        (["a", "b" * 300_000], "300000 characters"),
        (["a" * length for length in range(1, 200)], "more ways than those of any real vocabulary"),
    ],
)
def test_a_vocabulary_made_to_be_split_without_end_is_refused(tokens: list[str], reason: str) -> None:
    scores = [0.0] * len(tokens)
    metadata = {"tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.scores": scores}
    with pytest.raises(UnsupportedTokenizer, match=reason):
        build_tokenizer(metadata)


def test_a_model_is_read_without_a_tokenizer_and_says_so(tmp_path: Path) -> None:
    path = write_tokenizer_gguf(tmp_path / "model.gguf", {**GPT2, "tokenizer.ggml.pre": "klingon"})
    model = open_source(path)
    assert model.files.keys() == {"generation_config.json"}
    assert model.provenance["tokenizer"].startswith("unsupported: unknown pre-tokenizer 'klingon'")
    good = open_source(write_tokenizer_gguf(tmp_path / "good.gguf", GPT2))
    assert set(good.files) == {"generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert good.provenance["tokenizer"] == "gpt2 gpt-2"


def test_empty_tokens_get_a_name_of_their_own() -> None:
    metadata = {**GPT2, "tokenizer.ggml.tokens": [*GPT2["tokenizer.ggml.tokens"], "", ""]}
    metadata["tokenizer.ggml.token_type"] = [*GPT2["tokenizer.ggml.token_type"], NORMAL, NORMAL]
    size = len(metadata["tokenizer.ggml.tokens"])
    assert rebuilt(metadata).id_to_token(size - 1) == f"[EMPTY_{size - 1}]"


# End tokens


def with_tokens(changes: dict[int, tuple[str, int]], **ids: int) -> dict[str, Any]:
    """The SentencePiece vocabulary with other texts and types for some ids, and ids by key."""
    metadata = dict(SENTENCEPIECE[True])
    tokens, types = list(metadata["tokenizer.ggml.tokens"]), list(metadata["tokenizer.ggml.token_type"])
    for number, (text, kind) in changes.items():
        tokens[number], types[number] = text, kind
    metadata |= {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}
    return metadata | {f"tokenizer.ggml.{key}_token_id": number for key, number in ids.items()}


END_CASES: list[tuple[dict[int, tuple[str, int]], dict[str, int], list[int]]] = [
    ({}, {}, [2]),
    ({}, {"eot": 300}, [2, 300]),
    ({}, {"eos": 301, "eot": 300, "eom": 300}, [301, 2, 300]),
    ({400: ("<|im_end|>", CONTROL)}, {}, [2, 400]),
    ({400: ("<|im_end|>", NORMAL)}, {}, [2, 400]),
    ({400: ("[PAD]", CONTROL), 401: ("<reponame>", CONTROL)}, {}, [2, 400, 401]),
    ({400: ("<|fim_pad|>", CONTROL)}, {"fim_pad": 401}, [2, 401]),
    ({400: ("<|end|>", CONTROL), 401: ("<|return|>", CONTROL), 402: ("<|call|>", CONTROL)}, {}, [2, 401, 402]),
    ({400: ("<|end|>", CONTROL), 401: ("<|call|>", CONTROL)}, {}, [2, 400, 401]),
    ({400: ("<|tool_response>", CONTROL)}, {"eos": 300}, [300, 400]),
    ({}, {"eot": 1 << 20}, [2]),
]


@pytest.mark.parametrize(("changes", "ids", "expected"), END_CASES)
def test_a_generation_ends_where_llama_cpp_ends_it(
    changes: dict[int, tuple[str, int]], ids: dict[str, int], expected: list[int]
) -> None:
    config = json.loads(build_generation_config(with_tokens(changes, **ids))["generation_config.json"])
    assert config["eos_token_id"] == expected


@pytest.mark.parametrize(
    ("wanted", "eos", "keys", "left"),
    [
        ([], None, {}, []),
        ([300], None, {"eos": 300}, []),
        ([300, 301], None, {"eos": 300, "eot": 301}, []),
        ([300, 301, 302], 302, {"eos": 302, "eot": 300, "eom": 301}, []),
        ([300, 301, 302, 303], None, {"eos": 300, "eot": 301, "eom": 302}, [303]),
        # Where llama.cpp ends by itself, no key is spent.
        ([300, 2, 400, 301], None, {"eos": 300, "eot": 301}, []),
        ([300], 301, {"eos": 301, "eot": 300}, []),
    ],
)
def test_the_keys_that_name_end_tokens(wanted: list[int], eos: int | None, keys: dict[str, int], left: list[int]) -> None:
    tokens = with_tokens({400: ("<reponame>", CONTROL)})["tokenizer.ggml.tokens"]
    assert end_keys(tokens, wanted, eos) == (keys, left)


def test_texts_that_llama_cpp_knows_are_control_tokens_whatever_their_type() -> None:
    changes = {400: ("<|im_end|>", NORMAL), 401: ("<|message|>", CONTROL), 402: ("<|fim_prefix|>", USER_DEFINED)}
    built = json.loads(build_tokenizer(with_tokens(changes))["tokenizer.json"])
    special = {entry["content"]: entry["special"] for entry in built["added_tokens"]}
    assert (special["<|im_end|>"], special["<|message|>"], special["<|fim_prefix|>"]) == (True, False, True)


def test_tokens_that_no_key_names_are_those_llama_cpp_assumes() -> None:
    metadata = {key: value for key, value in with_tokens({}).items() if not key.endswith("_token_id")}
    config = json.loads(build_tokenizer(metadata)["tokenizer_config.json"])
    assert (config["bos_token"], config["eos_token"], config["unk_token"]) == ("<s>", "</s>", "<unk>")


def test_embeddings_without_a_token_have_none() -> None:
    size = len(SENTENCEPIECE[True]["tokenizer.ggml.tokens"])
    metadata = with_tokens({size - 1: (f"[PAD{size - 1}]", 5), 400: ("[PAD401]", 5), 401: ("[PAD401", NORMAL)})
    vocabulary = json.loads(build_tokenizer(metadata)["tokenizer.json"])["model"]["vocab"]
    assert len(vocabulary) == size - 1
    assert vocabulary["[PAD401]"] == 400
