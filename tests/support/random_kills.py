"""Kills conversions at random moments and resumes them: `random_kills.py SOURCE --kills 100 --seed 0`, on Linux or macOS.

`test_interrupted.py` kills at every kind of point, always at the same ones; this is for as many other moments as one has time
for. Each attempt is a process of its own, forked from this one, which has imported everything. After each kill the output must
be absent or a sound model, the old or the new one; whatever finishes must be the bytes of a conversion that was left alone,
with nothing beside them. Prints what was found as JSON; exits with 1 if anything was wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from folder_contents import contents
from kill_loop import OPEN

from cluscomp_export.conversion.convert import ConversionOptions, convert

LEVELS = {
    "packed": {"blockwise_epochs": 2},
    "hf": {"effort": "fast"},
    "gguf": {"effort": "best", "recovery_steps": 4},
    "onnx": {"effort": "fast", "share": "none"},
}
"""Formats to write, with work of every kind between them."""


def options(to: str, **changes: object) -> ConversionOptions:
    return ConversionOptions(**{"bits": 4, "to": to, "threads": 1, "calibration_windows": 4, **LEVELS[to], **changes})


def start(source: Path, output: Path, chosen: ConversionOptions) -> int:
    """Convert in a process of its own, and give its id."""
    child = os.fork()
    if child == 0:
        try:
            convert(source, output, chosen, force=True)
        finally:
            os._exit(sys.exc_info()[0] is not None)
    return child


def finish(child: int) -> None:
    _, status = os.waitpid(child, 0)
    if status != 0:
        raise RuntimeError(f"the conversion ended with status {status}")


def kill_after(child: int, seconds: float) -> bool:
    """Kill it unless it ends before; whether it was killed. Raises RuntimeError if it failed by itself."""
    end = time.monotonic() + seconds
    ended, status = 0, 0
    while not ended and time.monotonic() < end:
        time.sleep(0.001)
        ended, status = os.waitpid(child, os.WNOHANG)
    if not ended:
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
    if not os.WIFSIGNALED(status) and os.WEXITSTATUS(status) != 0:
        raise RuntimeError("the conversion failed by itself")
    return os.WIFSIGNALED(status)


def whole(output: Path, to: str, digests: set[str]) -> bool:
    """Whether what is at the output, or aside of it for a moment, is a sound model and one of these."""
    places = [output] if output.exists() else list(output.parent.glob(".model.cluscomp-*.old"))
    return len(places) == 1 and OPEN[to](places[0], check=True).digest() in digests


def main(source: Path, kills: int, seed: int, folder: Path) -> int:
    chance = random.Random(seed)  # noqa: S311
    found: Counter[str] = Counter()
    wanted, old, digests, seconds = {}, {}, {}, {}
    for to in LEVELS:
        output = folder / to / "model"
        output.parent.mkdir()
        finish(start(source, output, options(to, bits=3)))
        old[to] = shutil.move(output, output.parent.with_suffix(".old"))
        begin = time.monotonic()
        finish(start(source, output, options(to)))
        seconds[to] = time.monotonic() - begin
        wanted[to] = contents(output)
        digests[to] = {OPEN[to](path, check=True).digest() for path in (output, old[to])}
    while found["kills"] < kills:
        to = list(LEVELS)[found["conversions"] % len(LEVELS)]
        output = folder / to / "model"
        shutil.rmtree(output.parent)
        output.parent.mkdir()
        (shutil.copytree if old[to].is_dir() else shutil.copy)(old[to], output)
        # Up to five kills, then the rest undisturbed.
        for _ in range(chance.randint(1, 5)):
            killed = kill_after(start(source, output, options(to)), chance.uniform(0, 0.8 * seconds[to]))
            found["kills" if killed else "finished before the kill"] += 1
            found["wrong files"] += not whole(output, to, digests[to])
        finish(start(source, output, options(to)))
        found["conversions"] += 1
        found["other bytes"] += contents(output) != wanted[to]
        found["left beside the output"] += [path.name for path in output.parent.iterdir()] != ["model"]
    print(json.dumps(found))
    return int(any(found[wrong] for wrong in ("wrong files", "other bytes", "left beside the output")))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        sys.exit(main(arguments.source, arguments.kills, arguments.seed, Path(temporary)))
