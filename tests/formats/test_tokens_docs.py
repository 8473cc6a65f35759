"""The tables of docs/tokens.md match the code exactly."""

from __future__ import annotations

import re
from pathlib import Path

from cluscomp_formats.tokens import from_vocabulary
from cluscomp_formats.tokens.added_tokens import NAMES
from cluscomp_formats.tokens.class_tokens import CLASSES

TEXT = (Path(__file__).parents[2] / "docs" / "tokens.md").read_text(encoding="utf-8")


def code_words(text: str) -> set[str]:
    return set(re.findall(r"`([^`]+)`", text))


def test_names_of_special_tokens() -> None:
    line = next(line for line in TEXT.splitlines() if line.startswith("| 4 |"))
    assert {f"{name}_token" for name in code_words(line)} == set(NAMES)


def test_classes() -> None:
    table = TEXT.split("| from | for | how |", 1)[1].split("\n\n", 1)[0]
    built = {word for word in code_words(table) if word.endswith("Tokenizer")}
    assert built == {*from_vocabulary.SENTENCEPIECE_CLASSES, *from_vocabulary.BYTE_LEVEL_CLASSES}
    assert built <= CLASSES.keys()
    mentioned = {word for word in code_words(TEXT) if word.endswith("Tokenizer")}
    assert mentioned <= CLASSES.keys()


def test_files() -> None:
    part = TEXT.split("## Without a `tokenizer.json`", 1)[1]
    assert set(from_vocabulary.VOCABULARY_FILES) <= code_words(part)
