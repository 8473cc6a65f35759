"""Default special tokens of tokenizer classes, which apply if no file names others, as in transformers 5."""

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
"""Texts of special tokens by name, for each class."""


def tokenizer_class(config: Mapping[str, Any]) -> str:
    """Return the class that `tokenizer_config.json` names, without `Fast`; empty if there is none."""
    found = config.get("tokenizer_class")
    return found.removesuffix("Fast") if isinstance(found, str) else ""


def with_class_tokens(config: Mapping[str, Any], class_name: str, known: Collection[str]) -> dict[str, Any]:
    """Return `tokenizer_config.json` with the default special tokens of the class, if it does not name others.

    Only tokens among the `known` texts are added. A name whose value is null stays without a token.
    """
    named = {name: text for name, text in CLASSES.get(class_name, {}).items() if text in known}
    return {**named, **config}
