"""Patterns that are accepted as taking time proportional to the text, and others."""

from __future__ import annotations

import json

import pytest
import tokenizers

from cluscomp_runtime.tokenizer.pattern_cost import is_linear

LETTERS = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}"
SMALL = r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
SHORT_FORMS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
OF_MODELS = {
    "gpt2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "cl100k": rf"{SHORT_FORMS}|[^\r\n\p{{L}}\p{{N}}]?+\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]++[\r\n]*|{SPACES}",
    "llama3": rf"{SHORT_FORMS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{SPACES}",
    "qwen2": rf"{SHORT_FORMS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{SPACES}",
    "o200k": (
        rf"[^\r\n\p{{L}}\p{{N}}]?[{LETTERS}]*[{SMALL}]+{SHORT_FORMS}?|[^\r\n\p{{L}}\p{{N}}]?[{LETTERS}]+[{SMALL}]*"
        rf"{SHORT_FORMS}?|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{SPACES}"
    ),
    "tekken": (
        rf"[^\r\n\p{{L}}\p{{N}}]?[{LETTERS}]*[{SMALL}]+|[^\r\n\p{{L}}\p{{N}}]?[{LETTERS}]+[{SMALL}]*|\p{{N}}|"
        rf" ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{SPACES}"
    ),
    "deepseek-v3": (
        r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|"""
        + SPACES
    ),
    "kimi": (
        rf"[\p{{Han}}]+|[^\r\n\p{{L}}\p{{N}}]?[{LETTERS}&&[^\p{{Han}}]]*[{SMALL}&&[^\p{{Han}}]]+{SHORT_FORMS}?|"
        rf"[^\r\n\p{{L}}\p{{N}}]?[{LETTERS}&&[^\p{{Han}}]]+[{SMALL}&&[^\p{{Han}}]]*{SHORT_FORMS}?|\p{{N}}{{1,3}}|{SPACES}"
    ),
    "bloom": r" ?[^(\s|[.,!?…。，、।۔،])]+",  # noqa: RUF001
    "falcon": r"[0-9][0-9][0-9]",
    "clip": r"<\|startoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+",
    "spaces": r" {2,}",
    "group": r"(\s+|\d)",
    "camel case": r"(?<=[a-z])(?=[A-Z])",
}
HOSTILE_TEXTS = (
    " " * 50000 + "x",
    "\n " * 25000 + "x",
    "A" * 50000 + "1",
    "a" * 50000 + "'",
    "'" * 50000,
    "1" * 50000,
    "漢" * 50000,
)


@pytest.mark.parametrize("name", OF_MODELS)
def test_patterns_of_models_are_linear(name: str) -> None:
    assert is_linear(OF_MODELS[name])


@pytest.mark.parametrize("name", OF_MODELS)
def test_a_linear_pattern_takes_a_hostile_text(name: str) -> None:
    """Quadratic work would be 10^9 steps, half a minute for each text."""
    split = {"type": "Split", "pattern": {"Regex": OF_MODELS[name]}, "behavior": "Isolated", "invert": False}
    model = {"type": "WordLevel", "vocab": {"?": 0}, "unk_token": "?"}
    backend = tokenizers.Tokenizer.from_str(json.dumps({"pre_tokenizer": split, "model": model}))
    for text in HOSTILE_TEXTS:
        assert backend.encode(text).offsets[-1][1] == len(text)


@pytest.mark.parametrize(
    "pattern",
    [
        # Exponential.
        "(a|a)*b",
        "(?:a+)+",
        "(?:a|a){0,19}b",
        # Quadratic and worse: a run is scanned from each of its characters.
        r"\s+$",
        r"\[[^\]]+]|C",
        r"[\s\S]*\x00",
        r".*?x",
        r"\w*\w*x",
        "a{0,50}a{0,50}b",
        "(?:a*|b)c",
        # The branch that would match the whole run comes too late, matches too little, or has an unbounded look-ahead.
        r"\s*x|\s|\s+",
        r"\s*x|\s{5,}",
        r"\s+(?=\s*x)|\s+",
        r"x\s*y|z\s+",
        r"\d{1,3}(?=(?:\d{3})*\b)",
        # Unsupported syntax.
        r"(a)\1",
        "(?x) a",
        r"\X",
        "a{2}+",
        "(?=a)*",
        "(?<name>a)",
        "(?#a)",
        "(" * 20 + "a" + ")" * 20,
        # Invalid patterns.
        "(",
        "[a",
        "[[a]",
        "*a",
        "{2}",
        "a\\",
        "a)",
        "",
        "[]a]",
        "a{3,2}",
        "a{,}",
    ],
)
def test_patterns_that_are_not_known_to_be_linear(pattern: str) -> None:
    assert is_linear(pattern) is (pattern == "")
