"""What the benchmarks share: times, ratios with their spread, the memory a process took, and how quality is asked for."""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

__all__ = [
    "copy_and_sync",
    "forget_peak",
    "peak_resident_bytes",
    "quality_cells",
    "quality_parser",
    "resident_bytes",
    "spread",
    "summary",
    "timed",
]


def timed(action: Callable[[], object]) -> float:
    """Seconds an action takes."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def copy_and_sync(source: Path, target: Path) -> None:
    """`cp -r`, and everything it wrote on the disk: what a converter that does nothing would take."""
    subprocess.run(["cp", "-r", source, target], check=True)
    for file in target.rglob("*") if target.is_dir() else [target]:
        if file.is_file():
            with file.open("rb+") as stream:
                os.fsync(stream.fileno())


def summary(ours: Sequence[float], peer: Sequence[float]) -> dict[str, float]:
    """Median times in seconds, and how many times as fast as the peer we are, measured in pairs."""
    ratios = [b / a for a, b in zip(ours, peer, strict=True)]
    return {
        "seconds": statistics.median(ours),
        "peer_seconds": statistics.median(peer),
        "ratio": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and range."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def peak_resident_bytes() -> int:
    """The most memory this process has had resident, mapped files included. Linux only."""
    # Not getrusage: its ru_maxrss starts at what the parent process had.
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def resident_bytes() -> int:
    """Memory this process has resident now, mapped files included."""
    return int(psutil.Process().memory_info().rss)


def forget_peak() -> None:
    """Start `peak_resident_bytes` anew, from what is resident now. Linux only."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def quality_parser(description: str | None) -> argparse.ArgumentParser:
    """What every benchmark of quality takes: a model, a text to evaluate with, one to calibrate on, threads, `--json`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True, help="to evaluate with")
    parser.add_argument("--windows", type=int, default=20, help="windows of 512 tokens")
    parser.add_argument("--calibration", type=Path, help="[default: the text the package ships]")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", action="store_true", help="print the figures for machines")
    return parser


def quality_cells(quality: Mapping[str, Any]) -> tuple[str, str, str]:
    """Perplexity, KL divergence and top-1 agreement in percent of an evaluation, for a table."""
    return f"{quality['perplexity']:.2f}", f"{quality['kl']:.4f}", f"{100 * quality['top1']:.1f}"
