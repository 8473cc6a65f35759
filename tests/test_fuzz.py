"""Hostile files of every kind against the contract of `fuzzing.contract`: those kept of earlier runs, and new ones.

CLUSCOMP_FUZZ_EXAMPLES sets the number of new files per target; `tools/fuzz.py` looks further.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

import numpy as np
import pytest
from fuzzing import contract
from fuzzing.contract import ViolationError, hold_to_contract
from fuzzing.targets import CORPUS, TARGETS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluscomp_formats.errors import InvalidFileError, Problem

EXAMPLES = int(os.environ.get("CLUSCOMP_FUZZ_EXAMPLES", "40"))
KEPT = [pytest.param(name, path, id=f"{name}-{path.name}") for name, target in TARGETS.items() for path in target.kept()]


@pytest.mark.parametrize(("name", "path"), KEPT)
def test_a_kept_input_keeps_to_the_contract(name: str, path: Path, tmp_path: Path) -> None:
    TARGETS[name].run(path.read_bytes(), tmp_path)


def test_every_target_has_a_corpus_and_every_corpus_a_target() -> None:
    assert {folder.name for folder in CORPUS.iterdir()} == set(TARGETS)
    assert all(list(target.kept()) for target in TARGETS.values())


@pytest.mark.parametrize("name", TARGETS)
def test_seeds_are_sound(name: str, tmp_path: Path) -> None:
    outcomes = [TARGETS[name].run(content, tmp_path) for content in TARGETS[name].seeds(tmp_path)]
    assert outcomes
    assert set(outcomes) == {"sound"}


@pytest.mark.parametrize("name", TARGETS)
def test_mutated_files_keep_to_the_contract(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    target, scratch = TARGETS[name], tmp_path_factory.mktemp(name)
    seeds = list(target.seeds(scratch))

    # A true Random: mutations rely on its IndexError for a choice among nothing, which hypothesis's own does not raise.
    @settings(max_examples=EXAMPLES, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
    @given(st.sampled_from(seeds), st.integers(1, 4), st.randoms(use_true_random=True))
    def run(content: bytes, mutations: int, random: Random) -> None:
        for _ in range(mutations):
            content = target.mutate(content, random)
        target.run(content, scratch)

    run()


# A tokenizer has no checksums, and the library has one kind of error.
@pytest.mark.parametrize("name", sorted(TARGETS.keys() - {"tokenizer"}))
def test_mutations_get_past_the_checksums(name: str, tmp_path: Path) -> None:
    target, random = TARGETS[name], Random(0)  # noqa: S311
    seed = next(target.seeds(tmp_path))
    outcomes = {target.run(target.mutate(seed, random), tmp_path) for _ in range(30)}
    assert len(outcomes - {"checksum_mismatch", "truncated", "bad_magic"}) > 4


def refuse(_: Path) -> None:
    raise InvalidFileError(Problem("bad", "bad"))


def crash(_: Path) -> None:
    raise ValueError("an error of Python")


def steer_the_terminal(path: Path) -> None:
    raise InvalidFileError(type("P", (Problem,), {"__str__": lambda _: "\x1b[2J"})("bad", "bad"))


def take_memory(_: Path) -> None:
    np.ones(contract.SPARE_BYTES + 1_000_000, np.uint8)


def take_native_memory(_: Path) -> None:
    import torch

    # Twice as much: what tests before this one took may be given back meanwhile.
    torch.empty(2 * contract.SPARE_NATIVE_BYTES, dtype=torch.uint8)


def open_a_file_outside(path: Path) -> None:
    (path.parent.parent / "outside").read_bytes()


def list_a_folder_outside(path: Path) -> None:
    list(path.parent.parent.iterdir())


def lead_out(path: Path) -> None:
    (path.parent / ".." / "outside").read_bytes()


def warn(_: Path) -> None:
    np.float32(1) / np.float32(0)


def hang(_: Path) -> None:
    while True:
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("consume", "message"),
    [
        (crash, "ValueError: 'an error of Python'"),
        (steer_the_terminal, "the message holds"),
        (take_memory, "bytes of memory for 5 bytes"),
        (take_native_memory, "RuntimeError"),
        (open_a_file_outside, "files outside the folder"),
        (list_a_folder_outside, "files outside the folder"),
        (lead_out, "files outside the folder"),
        (warn, "RuntimeWarning"),
        (hang, "no end after 1 seconds"),
    ],
)
def test_the_contract_notices(
    consume: Callable[[Path], None], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contract, "SECONDS", 1)
    folder = tmp_path / "input"
    folder.mkdir()
    (folder / "file").write_bytes(b"hello")
    (tmp_path / "outside").write_bytes(b"secret")
    with pytest.raises(ViolationError, match=message):
        hold_to_contract(consume, folder / "file", folder)
    assert hold_to_contract(refuse, folder / "file", folder) == "bad"
