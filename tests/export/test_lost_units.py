"""A unit of work that is lost or damaged costs time, and never gives another model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tamper_loop import options_for, tamper

from cluscomp_export.compression.unit_order import UnitOrder, discard_void
from cluscomp_export.conversion.options import Effort
from cluscomp_export.store import ArraySpecs
from cluscomp_export.work_folder import WorkFolder, fingerprint, work_folder
from cluscomp_formats.errors import StorageError

ARRAYS = {"values": np.arange(4, dtype=np.float32)}
FORMS: ArraySpecs = {"values": ("float32", (4,))}
BOOKS = ("codebook a", "codebook b", "codebook e")
UNITS = (*BOOKS, "q", "k", "o", "block 0", "q1", "block 1", "embedding", "training", "recovery")
ORDER = UnitOrder(
    codebooks=dict.fromkeys(BOOKS, FORMS),
    alone={"embedding": FORMS},
    steps=[{"q": FORMS, "k": FORMS}, {"o": FORMS}, {"block 0": FORMS}, {"q1": FORMS}, {"block 1": FORMS}],
    codebook_of={"q": "codebook a", "k": "codebook b", "o": "codebook a", "q1": "codebook a", "embedding": "codebook e"},
)


@pytest.fixture(scope="module")
def two_blocks(stories_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first two blocks of a trained model."""
    folder = tmp_path_factory.mktemp("source") / "stories"
    shutil.copytree(stories_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2}))
    tensors = load_file(folder / "model.safetensors")
    dropped = tuple(f".layers.{index}." for index in range(2, config["num_hidden_layers"]))
    kept = {name: values for name, values in tensors.items() if not any(part in name for part in dropped)}
    save_file(kept, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(("effort", "every"), [("fast", 20), ("balanced", 9), ("best", 20)])
def test_a_unit_lost_or_damaged_gives_the_same_bytes(effort: Effort, every: int, two_blocks: Path, tmp_path: Path) -> None:
    last = ("recovery",) if effort == "best" else ()
    found = tamper(two_blocks, tmp_path, options_for(effort, windows=2, context=64), every, names=("energies", *last))
    assert found.units > 28
    assert len(found.tried) >= 3
    assert found.wrong == ()


@pytest.mark.parametrize(
    ("lost", "void"),
    [
        ((), ()),
        (("q",), ("o", "block 0", "q1", "block 1", "training", "recovery")),
        (("block 0",), ("q1", "block 1", "training", "recovery")),
        (("codebook b",), ("k", "o", "block 0", "q1", "block 1", "training", "recovery")),
        (("block 1",), ("training", "recovery")),
        (("embedding",), ("training", "recovery")),
        (("codebook e",), ("embedding", "training", "recovery")),
        (("training",), ()),
        (("recovery",), ()),
    ],
)
def test_what_was_computed_from_a_missing_unit_is_void(lost: tuple[str, ...], void: tuple[str, ...], tmp_path: Path) -> None:
    with work_folder(tmp_path / "m") as work:
        work.begin(fingerprint({}))
        for name in UNITS:
            work.save(name, ARRAYS)
        for name in lost:
            work._file(name).unlink()
        again = WorkFolder(work.path)
        again.conversion = work.conversion
        assert discard_void(again, ORDER, from_scratch=False) == len(void)
        assert {name for name in UNITS if again.load(name, FORMS) is None} == {*lost, *void}
        assert discard_void(again, ORDER, from_scratch=True) == len(UNITS) - len(lost) - len(void)


def test_a_unit_that_was_sound_and_is_not_any_more_ends_the_work(tmp_path: Path) -> None:
    """What was kept because of it would not be what it was computed from."""
    with work_folder(tmp_path / "m") as work:
        work.begin(fingerprint({}))
        work.save("unit", ARRAYS)
        work._file("unit").write_bytes(b"damaged")
        with pytest.raises(StorageError, match="changed while it was needed"):
            work.load("unit", FORMS)
