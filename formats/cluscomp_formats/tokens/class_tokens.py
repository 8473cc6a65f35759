"""Special tokens that a tokenizer's class has where no file names them, as in transformers 5."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

__all__ = ["CLASSES", "tokenizer_class", "with_class_tokens"]

_TEXT_END = "<|endoftext|>"
_SENTENCE = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
CLASSES: dict[str, dict[str, str]] = {
    "LlamaTokenizer": _SENTENCE,
    "CodeLlamaTokenizer": _SENTENCE,
    "GemmaTokenizer": {
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "unk_token": "<unk>",
        "pad_token": "<pad>",
        "mask_token": "<mask>",
    },
    "T5Tokenizer": {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"},
    "GPT2Tokenizer": dict.fromkeys(("bos_token", "eos_token", "unk_token"), _TEXT_END),
    "GPTNeoXTokenizer": {
        **dict.fromkeys(("bos_token", "eos_token", "unk_token"), _TEXT_END),
        "pad_token": "<|padding|>",
    },
    "Qwen2Tokenizer": dict.fromkeys(("eos_token", "unk_token", "pad_token"), _TEXT_END),
    "CohereTokenizer": {
        "bos_token": "<BOS_TOKEN>",
        "eos_token": "<|END_OF_TURN_TOKEN|>",
        "unk_token": "<UNK>",
        "sep_token": "<SEP>",
        "pad_token": "<PAD>",
        "cls_token": "<CLS>",
        "mask_token": "<MASK_TOKEN>",
    },
}
"""Texts by name of a token, by class."""


def tokenizer_class(config: Mapping[str, Any]) -> str:
    """The class that `tokenizer_config.json` names, without `Fast`; empty if none."""
    found = config.get("tokenizer_class")
    return found.removesuffix("Fast") if isinstance(found, str) else ""


def with_class_tokens(config: Mapping[str, Any], class_name: str, known: Collection[str]) -> dict[str, Any]:
    """`tokenizer_config.json` with the special tokens of that class it does not name, those that are among the `known` texts.

    A name that is given as null stays without a token.
    """
    named = {name: text for name, text in CLASSES.get(class_name, {}).items() if text in known}
    return {**named, **config}
