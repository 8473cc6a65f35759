"""Conversions killed outright, again and again: no wrong model at any time, the same bytes in the end, little done twice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

KILL_LOOP = Path(__file__).parents[1] / "support" / "kill_loop.py"

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks, to import torch once only")


@pytest.mark.parametrize("to", ["packed", "hf", "gguf", "onnx"])
def test_killed_anywhere_it_goes_on_and_makes_the_same_bytes(to: str, stories_folder: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(KILL_LOOP), str(stories_folder), str(tmp_path), to]
    done = subprocess.run(command, env=environment, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    resumed = report["resumed"]
    assert resumed["killed"] == 6
    assert resumed["same"]
    # A kill costs the codebook being made, and nothing else.
    assert 35 == resumed["fits"] <= resumed["refits"] <= resumed["fits"] + resumed["killed"]
    assert report["same"]
    assert report["left"] == ["model"]
    survived = [kind for kind, killed in report["changes"].items() if not killed]
    assert survived == []
    assert {"open .model.cluscomp-PID.part", "os.mkdir .model.cluscomp-PID.part"} & report["changes"].keys()
    assert {"os.rename unit", "os.remove unit", "os.rename .model.cluscomp-PID.part"} <= report["changes"].keys()
    assert "os.rmdir .model.work" in report["changes"]
    # Only a folder has to step aside before another can take its name.
    assert set(report["places"]) == ({"in place", "aside"} if to in ("hf", "onnx") else {"in place"})
