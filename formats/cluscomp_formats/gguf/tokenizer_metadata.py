"""Convert a `tokenizer.json` to the `tokenizer.ggml.*` keys that llama.cpp reads.

Two of llama.cpp's tokenizer models can be written: `gpt2` (byte-level BPE that splits text by one of `word_schemes`) and
`llama` (SentencePiece BPE, whose ranked merges are converted to scores). Unicode normalisation (NFC, in Qwen) is left to
llama.cpp's caller, as usual. Other tokenizers are rejected with the reason: a tokenizer that is almost right gives wrong
answers that nobody notices.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cluscomp_formats.errors import InvalidFileError
from cluscomp_formats.gguf.container_encoding import Value
from cluscomp_formats.gguf.end_of_generation import end_keys
from cluscomp_formats.ir import Array, Model
from cluscomp_formats.sections.payload_stream import read_checked
from cluscomp_formats.sections.payloads import Payload
from cluscomp_formats.tokens import TOKEN_FILES, TokenizerFiles, end_tokens, read_tokenizer
from cluscomp_formats.tokens.chat_templates import DEFAULT, find_chat_templates, is_template_file
from cluscomp_formats.tokens.word_schemes import GPT2_WORDS, SCHEMES

__all__ = ["InexpressibleTokenizer", "TokenizerMetadata", "tokenizer_metadata", "with_tokenizer_read"]

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
"""Values of `tokenizer.ggml.token_type`."""

_SPACE = "\u2581"
_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
_SPECIAL = {
    **{name: name for name in ("bos", "eos", "eot", "eom", "cls", "mask")},
    "unk": "unknown",
    "sep": "seperator",
    "pad": "padding",
}
"""Keys by our names; the specification misspells one."""
_NAMED = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
_DEFAULT_EOS = {"gpt2": 11, "llama": 2}
"""llama.cpp's default end token if a file names none."""
_SHOWN = 5
"""Largest number of tokens named in a note."""

_SCHEME_NAMES = ("gpt-2", "smollm", "llama-bpe", "dbrx", "qwen2", "tekken", "default")
"""One name per scheme, among the names that llama.cpp treats alike."""


class InexpressibleTokenizer(Exception):  # noqa: N818 - not an error of the model: whether it matters is for the writer to say
    """The tokenizer cannot be expressed in GGUF; the message is the reason."""


@dataclass(frozen=True)
class TokenizerMetadata:
    """The keys, and notes on properties of the tokenizer that they cannot express."""

    values: dict[str, Value]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Vocabulary:
    tokens: list[str]
    types: list[int]
    special_ids: dict[str, int]
    notes: list[str]


def with_tokenizer_read(model: Model, path: Path) -> Model:
    """Return `model` with the files of the tokenizer in memory, because a writer needs them twice but reads each once.

    Raises StorageError if a file cannot be read, InvalidRequestError if it is invalid; messages name the output `path`.
    """
    files = dict(model.files)
    for name in [name for name in files if name in TOKEN_FILES or is_template_file(name)]:
        array = files[name]
        files[name] = Array.of(read_checked(Payload(name, "bytes", array.dtype, array.shape), array, path))
    return replace(model, files=files)


def tokenizer_metadata(model: Model, vocab_size: int) -> TokenizerMetadata:
    """Return the `tokenizer.*` keys of a model with `vocab_size` embeddings.

    `tokenizer.ggml.model` is `none` if the model has no tokenizer. Raises InexpressibleTokenizer if GGUF cannot express it.
    """
    try:
        stored = read_tokenizer(model.files)
        if stored is None:
            return TokenizerMetadata({"tokenizer.ggml.model": Value("string", "none")})
        return _metadata(model, stored, vocab_size)
    except InvalidFileError as error:
        problem = error.problems[0]
        raise InexpressibleTokenizer(f"{problem.file}: {problem.message}") from error
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RecursionError) as error:
        raise InexpressibleTokenizer(f"its files have an unusual structure ({type(error).__name__}: {error})") from error


def _metadata(model: Model, stored: TokenizerFiles, vocab_size: int) -> TokenizerMetadata:
    tokenizer = stored.tokenizer
    bpe = tokenizer["model"]
    if bpe["type"] != "BPE":
        raise InexpressibleTokenizer(f"its model is {bpe['type']!a}, not BPE")
    unusual = [key for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix") if bpe.get(key)]
    if unusual:
        raise InexpressibleTokenizer(f"its model has a {unusual[0]}")
    known = len(bpe["vocab"]) + len(tokenizer.get("added_tokens") or ())
    rows = max((tensor.shape[0] for tensor in model.tensors.values() if tensor.shape), default=0)
    if vocab_size > max(known, rows):
        # Checked because a list of this many tokens is created.
        raise InexpressibleTokenizer(f"the configuration has vocab_size {vocab_size}, but no tensor has as many rows")
    byte_fallback = bool(bpe.get("byte_fallback"))
    vocabulary = _vocabulary(stored, model.config, vocab_size, sentencepiece=byte_fallback)
    merges = [tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge) for merge in bpe["merges"]]
    parts = _sentencepiece(tokenizer, vocabulary, merges) if byte_fallback else _byte_level(tokenizer, merges)
    add_bos, add_eos = _framing(tokenizer.get("post_processor"), vocabulary)
    special_ids, notes = _with_end_tokens(model, vocabulary, parts["model"].content, add_eos=add_eos)
    values = {
        **parts,
        "tokens": Value("string", vocabulary.tokens),
        "token_type": Value("int32", vocabulary.types),
        **{f"{_SPECIAL[name]}_token_id": Value("uint32", number) for name, number in special_ids.items()},
        "add_bos_token": Value("bool", add_bos),
        "add_eos_token": Value("bool", add_eos),
    }
    metadata = {f"tokenizer.ggml.{key}": value for key, value in values.items()}
    metadata |= _chat_templates(model)
    return TokenizerMetadata(metadata, (*vocabulary.notes, *notes))


def _vocabulary(
    stored: TokenizerFiles, model_config: Mapping[str, Any], vocab_size: int, *, sentencepiece: bool
) -> _Vocabulary:
    """Return tokens by id. Ids without a token get a name as in llama.cpp's converter; tokens without embedding are omitted."""
    bpe = stored.tokenizer["model"]
    by_id = {number: token for token, number in bpe["vocab"].items()}
    types = dict.fromkeys(by_id, _NORMAL)
    for number, token in by_id.items():
        if sentencepiece and _BYTE_TOKEN.fullmatch(token):
            types[number] = _BYTE
    if not all(type(number) is int and 0 <= number < vocab_size for number in by_id):
        raise InexpressibleTokenizer(f"it has ids beyond the {vocab_size} embeddings")
    left_out, stripping = [], []
    for added in stored.tokenizer.get("added_tokens") or ():
        if added["lstrip"] or added["rstrip"] or added["single_word"]:
            stripping.append(added["content"])
        if added["id"] >= vocab_size:
            left_out.append(added["content"])
        else:
            by_id[added["id"]] = added["content"]
            types[added["id"]] = _CONTROL if added["special"] else _USER_DEFINED
    tokens = [by_id.get(number, f"[PAD{number}]") for number in range(vocab_size)]
    ids = {token: number for number, token in enumerate(tokens)}
    if len(ids) != len(tokens):
        raise InexpressibleTokenizer("two ids have the same token")
    special_ids = {}
    for name in _NAMED:
        number = ids.get(stored.special_tokens.get(f"{name}_token", ""))
        if number is None:
            number = model_config.get(f"{name}_token_id")
            number = number[0] if isinstance(number, list) and number else number
        if type(number) is int and 0 <= number < vocab_size:
            special_ids[name] = number
    if sentencepiece:
        unknown = ids.get(bpe.get("unk_token") or "<unk>")
        if unknown is not None:
            types[unknown] = _UNKNOWN
            special_ids.setdefault("unk", unknown)
    notes = []
    if left_out:
        notes.append(f"added tokens beyond the {vocab_size} embeddings are omitted: {_listed(left_out)}")
    if stripping:
        notes.append(
            f"llama.cpp ignores that added tokens strip spaces around them, or match whole words only: {_listed(stripping)}"
        )
    return _Vocabulary(tokens, [types.get(number, _UNUSED) for number in range(vocab_size)], special_ids, notes)


def _with_end_tokens(model: Model, vocabulary: _Vocabulary, kind: Any, *, add_eos: bool) -> tuple[dict[str, int], list[str]]:
    """Return the special ids including the model's end tokens, and notes on end tokens for which there is no key."""
    special_ids = dict(vocabulary.special_ids)
    size = len(vocabulary.tokens)
    wanted = [number for number in end_tokens(model.config, model.files, special_ids.get("eos")) if 0 <= number < size]
    named = special_ids.pop("eos", None)
    keep = add_eos or named in wanted or not wanted
    keys, left = end_keys(vocabulary.tokens, wanted, named if keep else None)
    notes = []
    if left:
        texts = _listed([vocabulary.tokens[number] for number in left])
        notes.append(f"GGUF has keys for three end tokens: llama.cpp does not end at {texts}")
    default = _DEFAULT_EOS[kind]
    if not keys and default < size:
        text = ascii(vocabulary.tokens[default])
        notes.append(f"the model has no end token, and llama.cpp then ends at token {default}, {text}")
    return special_ids | keys, notes


def _listed(texts: Sequence[str]) -> str:
    more = f" and {len(texts) - _SHOWN} more" if len(texts) > _SHOWN else ""
    return ", ".join(map(ascii, texts[:_SHOWN])) + more


def _byte_level(tokenizer: Mapping[str, Any], merges: Sequence[tuple[str, ...]]) -> dict[str, Value]:
    normalizer = tokenizer.get("normalizer")
    if normalizer is not None and normalizer["type"] != "NFC":
        raise InexpressibleTokenizer(f"it normalises text with {normalizer['type']}")
    patterns = _word_patterns(tokenizer["pre_tokenizer"])
    ignore_merges = bool(tokenizer["model"].get("ignore_merges"))
    for name in _SCHEME_NAMES:
        scheme = SCHEMES[name]
        if (scheme.patterns, scheme.ignore_merges) == (patterns, ignore_merges):
            return {
                "model": Value("string", "gpt2"),
                "pre": Value("string", name),
                "merges": Value("string", [" ".join(merge) for merge in merges]),
            }
    raise InexpressibleTokenizer(f"llama.cpp has no scheme that splits words by {patterns} with ignore_merges {ignore_merges}")


def _word_patterns(pre_tokenizer: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the regular expressions that split the text, in order."""
    *steps, last = pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]
    if last["type"] != "ByteLevel" or last["add_prefix_space"]:
        raise InexpressibleTokenizer("its pre-tokenizer does not end with ByteLevel, or prefixes a space")
    patterns = []
    for step in steps:
        if step["type"] == "Digits" and step["individual_digits"]:
            patterns.append(r"\p{N}")
        elif step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
            patterns.append(step["pattern"]["Regex"])
        else:
            raise InexpressibleTokenizer(f"its pre-tokenizer has a step {step['type']} that llama.cpp does not support")
    return (*patterns, GPT2_WORDS) if last.get("use_regex", True) else tuple(patterns)


def _sentencepiece(
    tokenizer: Mapping[str, Any], vocabulary: _Vocabulary, merges: Sequence[tuple[str, ...]]
) -> dict[str, Value]:
    """Convert ranked merges to scores. llama.cpp merges the neighbours whose union has the best score, so the order is kept."""
    normal = {token for token, kind in zip(vocabulary.tokens, vocabulary.types, strict=True) if kind == _NORMAL}
    ranked = [result for result, _ in itertools.groupby("".join(merge) for merge in merges)]
    rank = {result: number for number, result in enumerate(ranked)}
    if len(rank) != len(ranked):
        raise InexpressibleTokenizer("its merges are not ranked by the token they make")
    known = set(merges)
    for token in normal:
        for at in range(1, len(token)):
            left, right = token[:at], token[at:]
            if left in normal and right in normal and (left, right) not in known:
                raise InexpressibleTokenizer(f"llama.cpp would merge {left!a} and {right!a}, which the tokenizer does not")
    worst = float(len(rank))
    scores = [
        -float(rank.get(token, worst)) if kind == _NORMAL else 0.0
        for token, kind in zip(vocabulary.tokens, vocabulary.types, strict=True)
    ]
    return {
        "model": Value("string", "llama"),
        "pre": Value("string", "default"),
        "scores": Value("float32", scores),
        "add_space_prefix": Value("bool", _prefixes_space(tokenizer)),
    }


def _prefixes_space(tokenizer: Mapping[str, Any]) -> bool:
    """Return whether a space is inserted before the text, after checking that spaces become U+2581."""
    normalizer, pre_tokenizer = tokenizer.get("normalizer"), tokenizer.get("pre_tokenizer")
    if normalizer is None and pre_tokenizer is not None:
        if pre_tokenizer["type"] == "Metaspace" and pre_tokenizer["replacement"] == _SPACE and not pre_tokenizer["split"]:
            return bool(pre_tokenizer["prepend_scheme"] != "never")
    elif normalizer is not None and (pre_tokenizer is None or _splits_at_spaces(pre_tokenizer)):
        # Gemma's pre-tokenizer finds no spaces, because the normalizer has replaced them.
        *first, last = normalizer["normalizers"] if normalizer["type"] == "Sequence" else [normalizer]
        replaces = last["type"] == "Replace" and last["pattern"] == {"String": " "} and last["content"] == _SPACE
        if replaces and first in ([], [{"type": "Prepend", "prepend": _SPACE}]):
            return bool(first)
    raise InexpressibleTokenizer("it does not treat spaces as SentencePiece does")


def _splits_at_spaces(pre_tokenizer: Mapping[str, Any]) -> bool:
    return bool(
        pre_tokenizer["type"] == "Split" and pre_tokenizer["pattern"] == {"String": " "} and not pre_tokenizer["invert"]
    )


def _framing(post_processor: Mapping[str, Any] | None, vocabulary: _Vocabulary) -> tuple[bool, bool]:
    """Return whether the begin and end tokens are added around a text."""
    steps: Sequence[Any] = ()
    if post_processor is not None:
        steps = post_processor["processors"] if post_processor["type"] == "Sequence" else [post_processor]
    steps = [step for step in steps if step["type"] != "ByteLevel"]
    if not steps:
        return False, False
    if len(steps) > 1 or steps[0]["type"] != "TemplateProcessing":
        raise InexpressibleTokenizer(f"its post-processor has {len(steps)} steps, {steps[0]['type']} first")
    ids = [
        steps[0]["special_tokens"][piece["SpecialToken"]["id"]]["ids"] if "SpecialToken" in piece else None
        for piece in steps[0]["single"]
    ]
    for add_bos, add_eos in itertools.product((False, True), repeat=2):
        before = [[vocabulary.special_ids.get("bos")]] if add_bos else []
        after = [[vocabulary.special_ids.get("eos")]] if add_eos else []
        if ids == [*before, None, *after]:
            return add_bos, add_eos
    raise InexpressibleTokenizer("its post-processor adds tokens other than the begin and end tokens")


def _chat_templates(model: Model) -> dict[str, Value]:
    """Return the keys of the chat templates as gguf-py writes them: characters other than letters and digits become `_`."""
    templates = find_chat_templates(model.files)
    named = {re.sub("[^A-Za-z0-9]", "_", name): text for name, text in templates.items() if name not in ("", DEFAULT)}
    values = {f"tokenizer.chat_template.{name}": Value("string", text) for name, text in named.items()}
    if named:
        values["tokenizer.chat_templates"] = Value("string", list(named))
    if DEFAULT in templates:
        values["tokenizer.chat_template"] = Value("string", templates[DEFAULT])
    return values
