"""The profile of this machine, measured once and kept in the user's cache folder.

Measuring takes about a second; on a busy machine it finds a slower one. To measure again, delete the file.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
from functools import cache
from pathlib import Path

from cluscomp_export.planning.machines import Machine, machine_from
from cluscomp_formats.errors import ClusCompError, Problem, UnsupportedError
from cluscomp_formats.files.atomic import atomic_write
from cluscomp_formats.files.regular_file import read_whole
from cluscomp_formats.strict_json import parse_strict
from cluscomp_formats.version import __version__

__all__ = ["THIS_MACHINE", "cache_file", "this_machine"]

THIS_MACHINE = "this"
"""The name of the profile."""

LAYER_US = 10.0
"""Not measured: as on the machine of the profile `avx512`."""

HELD = (64, 128, 256)
"""Numbers of clusters that registers may hold, measured at dim 4, where few bits come from memory."""

GATHERED = ((1 << 15, 4, 4096, False), (1 << 20, 8, 65536, False), (None, 16, 65536, True))
"""Limits in bytes of a codebook, and the codebook that is measured for each: dim, clusters, whether its values have 16 bits."""


def cache_file() -> Path:
    """Where the profile is kept: one file for each processor and version of this tool."""
    root = os.environ.get("XDG_CACHE_HOME")
    folder = Path(root) if root and Path(root).is_absolute() else Path.home() / ".cache"
    described = repr((platform.machine(), _processor(), os.cpu_count(), os.environ.get("CLUSCOMP_CPU"), __version__))
    return folder / "cluscomp-export" / f"machine-{hashlib.sha256(described.encode()).hexdigest()[:16]}.json"


@cache
def this_machine() -> Machine:
    """The profile of this machine, read from the cache or measured.

    A file that cannot be read is measured again and replaced; where no file can be written, every process measures. Raises
    UnsupportedError if the native engine is missing.
    """
    with contextlib.suppress(RuntimeError, ClusCompError, ValueError):
        return machine_from(THIS_MACHINE, parse_strict(read_whole(cache_file())))
    machine = _measured()
    with contextlib.suppress(RuntimeError, OSError, ClusCompError):
        file = cache_file()
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(file, force=True) as stream:
            stream.write(f"{json.dumps(machine.value(), indent=1)}\n".encode())
    return machine


def _measured() -> Machine:
    from cluscomp_kernels.engine import VARIANTS, best_variant, memory_bandwidth, time_per_weight

    try:
        variant = VARIANTS[best_variant()]
    except RuntimeError as error:
        remedy = "name a profile, or install with a C compiler"
        raise UnsupportedError(Problem("no_engine", f"this machine cannot be measured: {error}", remedy=remedy)) from error
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    registers = []
    if variant in ("avx512", "amx"):
        # Fewer clusters never take longer; what measures otherwise is noise.
        times = [time_per_weight(4, clusters) for clusters in HELD]
        registers = [[clusters, min(times[index:])] for index, clusters in enumerate(HELD)]
    gathers = [[most, dim * time_per_weight(dim, count, wide=wide)] for most, dim, count, wide in GATHERED]
    one, every = (memory_bandwidth(threads=threads, seconds=0.1) / 1e9 for threads in (1, cores))
    value = {
        "measured": True,
        "note": f"{_processor() or platform.machine()}, {variant}",
        "cores": cores,
        "registers": registers,
        "gathers": gathers,
        "bandwidth": [one, max(one, every)],
        "layer_us": LAYER_US,
    }
    return machine_from(THIS_MACHINE, value)


def _processor() -> str:
    """The model of the processor, or what the platform says about it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith(("model name", "CPU part")):
                return line.partition(":")[2].strip()
    return platform.processor()
