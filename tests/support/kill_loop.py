"""Converts a model over and over, killed at one point after the other: `kill_loop.py SOURCE FOLDER FORMAT`.

A point is a report of progress, or a change of the file system just before it happens (Python's audit events). The process
imports once and forks for every attempt. Prints what happened as JSON; `test_interrupted.py` judges it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from folder_contents import contents

from cluscomp_export.compression import fit_encode as jobs
from cluscomp_export.conversion.convert import ConversionOptions, convert
from cluscomp_formats.gguf import open_gguf
from cluscomp_formats.hf import open_hf
from cluscomp_formats.onnx import open_onnx
from cluscomp_formats.packed import open_packed

OPEN = {"packed": open_packed, "hf": open_hf, "gguf": open_gguf, "onnx": open_onnx}
CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir")


class Points:
    """Counts points by kind, and kills this process at the `number`th of one kind."""

    def __init__(self, folder: Path, kill_at: tuple[str, int] | None) -> None:
        self.folder, self.kill_at = str(folder), kill_at
        self.passed: Counter[str] = Counter()

    def point(self, kind: str) -> None:
        self.passed[kind] += 1
        if (kind, self.passed[kind]) == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event not in CHANGES and not (event == "open" and set(str(arguments[1])) & set("wxa+")):
            return
        path = os.fspath(arguments[0]) if not isinstance(arguments[0], int) else ""
        name = re.sub(r"-[0-9]+-[0-9a-f]{16}\.", "-PID.", os.path.relpath(path, self.folder))
        if ".work/" in name:
            self.point(f"{event} unit")
        elif not Path(path).is_absolute():
            # rmtree names files relative to an open folder.
            self.point(f"{event} inside")
        elif path.startswith(self.folder):
            self.point(f"{event} {name}")


def attempt(source: Path, output: Path, to: str, kill_at: tuple[str, int] | None, clusters: int = 16) -> dict[str, Any]:
    """Convert in a process of its own: whether it survived, which points it passed, how many codebooks it fitted."""
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        points = Points(output.parent, kill_at)
        kmeans = jobs.kmeans

        def counted(*arguments: Any, **options: Any) -> Any:
            os.write(send, b"fit\n")
            return kmeans(*arguments, **options)

        jobs.kmeans = counted
        sys.addaudithook(points.audit)
        options = ConversionOptions(dim=4, clusters=clusters, to=to, threads=1)
        try:
            convert(source, output, options, force=True, on_progress=lambda *_: points.point("progress"))
            os.write(send, json.dumps(points.passed).encode())
        finally:
            os._exit(sys.exc_info()[0] is not None)
    os.close(send)
    with os.fdopen(receive) as stream:
        lines = stream.read().splitlines()
    _, status = os.waitpid(child, 0)
    survived = not os.WIFSIGNALED(status)
    if survived and os.WEXITSTATUS(status) != 0:
        raise RuntimeError(f"the conversion failed in the attempt to be killed at {kill_at}")
    return {"survived": survived, "points": json.loads(lines[-1]) if survived else {}, "fits": lines.count("fit")}


def check(output: Path, to: str, digests: set[str]) -> str:
    """Where a model is after a kill; it must be sound, and the old or the new one."""
    place = output if output.exists() else next(output.parent.glob(".model.cluscomp-*.old"))
    if OPEN[to](place, check=True).digest() not in digests:
        raise RuntimeError(f"another model is at {place}")
    return "in place" if place == output else "aside"


def main(source: Path, folder: Path, to: str) -> None:
    # A model that was there before is to be replaced, here and below.
    output, whole = folder / "made" / "model", folder / "whole" / "model"
    output.parent.mkdir()
    whole.parent.mkdir()
    attempt(source, output, to, None, clusters=8)
    (shutil.copytree if output.is_dir() else shutil.copy)(output, whole)
    uninterrupted = attempt(source, whole, to, None)
    points, wanted = uninterrupted["points"], contents(whole)
    digests = {OPEN[to](path, check=True).digest() for path in (output, whole)}

    generator = np.random.default_rng(list(to.encode()))
    # Each attempt starts where the last one was killed, so all six come before the end.
    kills = [("progress", int(number)) for number in generator.integers(1, points["progress"] // 4, 4)]
    kills += [("os.rename unit", int(number)) for number in generator.integers(1, 12, 2)]
    results = [attempt(source, output, to, kill_at) for kill_at in kills]
    places = [check(output, to, digests)]
    results.append(attempt(source, output, to, None))
    resumed = {
        "fits": uninterrupted["fits"],
        "killed": sum(not result["survived"] for result in results),
        "refits": sum(result["fits"] for result in results),
        "same": contents(output) == wanted,
    }

    # Once more, with a kill at every kind of change of the file system.
    changes = [kind for kind in points if kind != "progress"]
    killed = []
    for kind in changes:
        result = attempt(source, output, to, (kind, int(generator.integers(1, max(2, points[kind] // 4)))))
        killed.append(not result["survived"])
        places.append(check(output, to, digests))
    final = attempt(source, output, to, None)
    report = {
        "resumed": resumed,
        "changes": dict(zip(changes, killed, strict=True)),
        "places": Counter(places),
        "same": contents(output) == wanted and final["survived"],
        "left": sorted(path.name for path in output.parent.iterdir()),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
