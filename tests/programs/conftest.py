"""Fixtures for running our files in other people's programs. Where one is absent its tests are skipped; with the environment
variable CLUSCOMP_REQUIRE_PROGRAMS=1, which CI sets, they fail."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import node_programs
import pytest
from browser import CHROMIUM

from cluscomp_export.conversion.convert import ConversionOptions, convert


def absent(reason: str) -> None:
    if os.environ.get("CLUSCOMP_REQUIRE_PROGRAMS") == "1":
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="session")
def node() -> Callable[..., Any]:
    """`node_programs.run`."""
    reason = node_programs.missing()
    if reason is not None:
        absent(reason)
    return node_programs.run


@pytest.fixture(scope="session")
def chromium() -> str:
    """Path of the browser."""
    found = next(filter(None, map(shutil.which, CHROMIUM)), None)
    if found is None:
        absent("needs a Chromium: apt-get install chromium")
    return str(found)


@pytest.fixture(scope="session")
def packed(stories_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """stories260K at 4 bits, a codebook for each matrix, its embedding clustered too."""
    output = tmp_path_factory.mktemp("packed") / "stories.clus"
    convert(stories_folder, output, ConversionOptions(bits=4, share="none", embedding_bits=8))
    return output
