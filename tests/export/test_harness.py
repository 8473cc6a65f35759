"""lm-evaluation-harness on our models: the answers its own class for transformers gives to the same requests."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cluscomp_export.conversion.convert import ConversionOptions, convert
from cluscomp_export.sources import open_source
from cluscomp_formats.errors import InvalidFileError
from cluscomp_runtime import make_self_test
from cluscomp_runtime.tokenizer import Tokenizer

SCRIPT = Path(__file__).parents[1] / "support" / "harness_comparison.py"

# The harness brings forty packages, which other tests should not depend on: it is installed by whoever works on this.
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None,
    reason="lm-evaluation-harness is not installed: pip install -c constraints.txt '.[lm-eval]'",
)


@pytest.fixture(scope="module")
def answers(stories_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tasks")
    convert(stories_folder, folder / "stories.clus", ConversionOptions(bits=4, effort="fast"))
    command = [sys.executable, str(SCRIPT), str(stories_folder), str(folder / "stories.clus"), str(folder)]
    cache = {"HF_HOME": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **cache}, timeout=3600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def per_token(stories_folder: Path) -> float:
    """What float32 may change in a token's log probability: twice what the self-test allows a logit, one up and one down."""
    return 2 * float(make_self_test(open_source(stories_folder))["tolerance"]["float32"])


@pytest.fixture(scope="module")
def tokens(stories_folder: Path) -> Callable[[str], int]:
    """At most how many tokens a text has as a part of another."""
    tokenizer = Tokenizer.from_files(open_source(stories_folder).files)
    assert tokenizer is not None
    return lambda text: len(tokenizer.encode(text)) + 1


def test_log_likelihoods_are_those_of_the_harnesss_own_class(
    answers: Any, per_token: float, tokens: Callable[[str], int]
) -> None:
    ours, theirs = (answers[name]["samples"]["local_choices"] for name in ("ours", "theirs"))
    compared = 0
    for row, our_row, their_row in zip(answers["rows"], ours, theirs, strict=True):
        for ending, [[score, greedy]], [[expected, expected_greedy]] in zip(row["endings"], our_row, their_row, strict=True):
            assert score == pytest.approx(expected, abs=per_token * tokens(ending))
            assert greedy == expected_greedy
            compared += 1
    assert compared == 11
    assert per_token < 1e-3
    assert answers["ours"]["results"]["local_choices"] == answers["theirs"]["results"]["local_choices"]


def test_rolling_log_likelihoods_are_those_of_the_harnesss_own_class(
    answers: Any, per_token: float, tokens: Callable[[str], int]
) -> None:
    ours, theirs = (answers[name]["samples"]["local_perplexity"] for name in ("ours", "theirs"))
    lengths = [tokens(row["story"] * 3 + row["endings"][0]) for row in answers["rows"]]
    assert max(lengths) > 2 * 512, "more than one window"
    for length, [[score]], [[expected]] in zip(lengths, ours, theirs, strict=True):
        assert score == pytest.approx(expected, abs=per_token * length)


def test_generated_texts_are_those_of_the_harnesss_own_class(answers: Any) -> None:
    ours, theirs = (answers[name]["samples"]["local_text"] for name in ("ours", "theirs"))
    assert ours == theirs
    assert all(text and "." not in text for [[text]] in ours)


def test_tasks_on_a_codebook_model(answers: Any) -> None:
    found = answers["codebook"]
    assert 0 <= found["results"]["local_choices"]["acc,none"] <= 1
    assert found["record"]["samples"]["local_choices"]["effective"] == 2
    assert found["record"]["model"]["digest"].startswith("sha256:")
    assert found["record"]["versions"]["lm_eval"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_task_file_that_is_a_pipe_is_not_waited_for(stories_folder: Path, tmp_path: Path) -> None:
    from cluscomp_export.evaluation.harness import evaluate_tasks

    os.mkfifo(tmp_path / "task.yaml")
    with pytest.raises(InvalidFileError, match="a device or pipe"):
        evaluate_tasks(stories_folder, [str(tmp_path / "task.yaml")])
