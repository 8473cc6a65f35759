"""The tables of docs/sources.md name what the code knows, no more and no less."""

from __future__ import annotations

import re
from pathlib import Path

from cluscomp_export.sources.checkpoint import PICKLED_SUFFIXES
from cluscomp_export.sources.side_files import SIDE_FILES
from cluscomp_formats.gguf.hyperparameters import ARCHITECTURES
from cluscomp_formats.tokens.word_schemes import SCHEMES

TEXT = (Path(__file__).parents[2] / "docs" / "sources.md").read_text(encoding="utf-8")


def first_cells(heading: str) -> set[str]:
    """The code words in the first column of the table with that heading."""
    table = TEXT.split(heading, 1)[1].split("\n\n", 1)[0]
    cells = [line.strip().strip("|").split("|", 1)[0] for line in table.splitlines()[2:]]
    return {word for cell in cells for word in re.findall(r"`([^`]+)`", cell)}


def test_pre_tokenizer_schemes() -> None:
    assert first_cells("| scheme | cut |") == set(SCHEMES)


def test_architectures() -> None:
    assert first_cells("| `general.architecture` | becomes |") == set(ARCHITECTURES)


def test_side_files_and_pickles() -> None:
    listed = TEXT.split("Side files kept in `Model.files`", 1)[1].split("\n\n", 1)[0]
    assert set(re.findall(r"`([^`]+)`", listed)) == set(SIDE_FILES)
    pickles = TEXT.split("- **Pickles**", 1)[1].split("\n", 1)[0]
    assert all(suffix in pickles for suffix in PICKLED_SUFFIXES)
