"""The tokens at which llama.cpp ends a generation, and those it treats as control tokens because of their text.

A file can name up to three end tokens (`tokenizer.ggml.eos_token_id`, `eot_token_id`, `eom_token_id`). llama.cpp ends a
generation at these, at every token whose text it knows, and at some of the fill-in-the-middle tokens. The texts are from its
`llama-vocab.cpp`.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

__all__ = ["END_TEXTS", "KEYS", "end_keys", "ends_generation", "types_in_use"]

KEYS = ("eos", "eot", "eom")
"""`tokenizer.ggml.<key>_token_id` names an end token."""

END_TEXTS = frozenset(
    (
        "<|eot_id|>",
        "<|im_end|>",
        "<|end|>",
        "<|return|>",
        "<|call|>",
        "<|flush|>",
        "<|calls|>",
        "<end_of_turn>",
        "<|endoftext|>",
        "</s>",
        "<|eom_id|>",
        "<EOT>",
        "_<EOT>",
        "[EOT]",
        "[EOS]",
        "<|end_of_text|>",
        "<end_of_utterance>",
        "<eos>",
        "<turn|>",
        "<|tool_response>",
        "<\uff5cend\u2581of\u2581sentence\uff5c>",
        "[e~[",
    )
)

_FILLING_ENDS = {
    "fim_pad": ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
    "fim_rep": ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
    "fim_sep": ("<|file_sep|>",),
}
"""Fill-in-the-middle tokens that also end a generation: by key or, if the file does not have the key, by these texts."""

_FILLING_OTHERS = (
    *(
        "<|fim_prefix|>",
        "<fim-prefix>",
        "<fim_prefix>",
        "<\uff5cfim\u2581begin\uff5c>",
        "<PRE>",
        "\u2581<PRE>",
        "<|code_prefix|>",
    ),
    *(
        "<|fim_suffix|>",
        "<fim-suffix>",
        "<fim_suffix>",
        "<\uff5cfim\u2581hole\uff5c>",
        "<SUF>",
        "\u2581<SUF>",
        "<|code_suffix|>",
    ),
    *(
        "<|fim_middle|>",
        "<fim-middle>",
        "<fim_middle>",
        "<\uff5cfim\u2581end\uff5c>",
        "<MID>",
        "\u2581<MID>",
        "<|code_middle|>",
    ),
    *("<|prefix|>", "<|suffix|>", "<|middle|>"),
)
_CONTROL_TEXTS = frozenset((*END_TEXTS, *itertools.chain(*_FILLING_ENDS.values()), *_FILLING_OTHERS))
_TURN_PARTS = ("<|channel|>", "<|message|>", "<|start|>", "<|constrain|>")
"""Tokens that are never control tokens, so that llama.cpp prints them."""

_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4
"""Values of `tokenizer.ggml.token_type`."""


def ends_generation(tokens: Sequence[str], special_ids: Mapping[str, int]) -> set[int]:
    """Return the ids at which llama.cpp ends a generation. `special_ids` are those in the file, by key without `_token_id`."""
    numbers = {text: number for number, text in enumerate(tokens)}
    ends = {numbers[text] for text in END_TEXTS if text in numbers}
    ends |= {special_ids[key] for key in KEYS if key in special_ids}
    for key, texts in _FILLING_ENDS.items():
        # If a file has several of the known texts, llama.cpp uses an arbitrary one.
        found = special_ids.get(key, min((numbers[text] for text in texts if text in numbers), default=None))
        if found is not None:
            ends.add(found)
    there = {tokens[number] for number in ends}
    # If a file has these other tokens, <|end|> ends only a part of the answer, and </s> is an ordinary token.
    if "<|end|>" in there and there & {"<|call|>", "<|calls|>"} and there & {"<|return|>", "<|flush|>"}:
        ends.discard(numbers["<|end|>"])
    if "</s>" in there and there & {"<|tool_response>", "<|plamo:eos|>"}:
        ends.discard(numbers["</s>"])
    return ends


def types_in_use(tokens: Sequence[str], types: Sequence[int], ends: set[int]) -> list[int]:
    """Return the types of tokens in llama.cpp, which overrides those of the file for texts it knows."""
    overruled = dict.fromkeys(_CONTROL_TEXTS, _CONTROL) | dict.fromkeys(_TURN_PARTS, _USER_DEFINED)
    for text, kind in (("<|end|>", _USER_DEFINED), ("</s>", _NORMAL)):
        if text in tokens and tokens.index(text) not in ends:
            overruled[text] = kind
    return [overruled.get(text, kind) for text, kind in zip(tokens, types, strict=True)]


def end_keys(tokens: Sequence[str], wanted: Sequence[int], eos_id: int | None) -> tuple[dict[str, int], list[int]]:
    """Return the keys that make llama.cpp end at the ids `wanted`, and the ids for which no key is left: there are three keys.

    `eos_id` is the preferred value of `eos_token_id`, None if there is no preference.
    """
    eos = eos_id if eos_id is not None else wanted[0] if wanted else None
    found = {} if eos is None else {"eos": eos}
    # llama.cpp needs no key for tokens whose text it knows.
    known = ends_generation(tokens, found)
    found |= dict(zip(("eot", "eom"), (number for number in wanted if number not in known), strict=False))
    return found, [number for number in wanted if number not in ends_generation(tokens, found)]
