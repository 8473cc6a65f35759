"""What the benchmarks share: times, ratios with their spread, and the memory a process took."""

from __future__ import annotations

import os
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

__all__ = ["copy_and_sync", "forget_peak", "peak_resident_bytes", "resident_bytes", "spread", "summary", "timed"]


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
    """Memory this process has resident now, mapped files included. Linux only."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.split("VmRSS:")[1].split()[0]) * 1024


def forget_peak() -> None:
    """Start `peak_resident_bytes` anew, from what is resident now. Linux only."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
