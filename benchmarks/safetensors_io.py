"""Our safetensors reader and writer beside the library: `python benchmarks/safetensors_io.py [--megabytes 200] [--json]`.

- writing: one array after the other, each made when its turn comes, against `safetensors.numpy.save_file` of all of them; both
  end with an fsync.
- reading: every array once, through windows of the file, against `safetensors.safe_open` with each of its backends.

Each run is a process of its own. Given are the time, and how much the peaks of resident memory and of address space exceed
what the process had before. Correctness comes first: all ways read the same values. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from measuring import spread, timed
from safetensors import safe_open
from safetensors.numpy import save_file

from cluscomp_formats.safetensors.mapped_shards import open_shard
from cluscomp_formats.safetensors.writer import header_bytes, lay_out

ITEMS = 5_000_000
"""Of uint16 in an array: 10 MB."""
WRITERS = ("write_ours", "write_library")
READERS = ("read_ours", "read_mmap", "read_pread")


def arrays(count: int) -> Iterator[tuple[str, npt.NDArray[np.uint16]]]:
    rng = np.random.default_rng(0)
    for number in range(count):
        yield f"array.{number:04}", rng.integers(0, 1 << 16, ITEMS, dtype=np.uint16)


def write_ours(path: Path, count: int) -> None:
    with path.open("wb") as stream:
        stream.write(header_bytes(lay_out({f"array.{number:04}": ("uint16", (ITEMS,)) for number in range(count)})))
        for _, values in arrays(count):
            stream.write(values.data)
        stream.flush()
        os.fsync(stream.fileno())


def write_library(path: Path, count: int) -> None:
    save_file(dict(arrays(count)), path, {"format": "pt"})
    with path.open("rb+") as stream:
        os.fsync(stream.fileno())


def read_ours(path: Path, count: int) -> int:
    shard = open_shard(path)
    return sum(int(shard.read(name).view(np.uint16).sum()) for name in sorted(shard.entries))


def read_mmap(path: Path, count: int, backend: str = "mmap") -> int:
    with safe_open(path, "np", backend=backend) as file:
        return sum(int(file.get_tensor(name).sum()) for name in sorted(file.keys()))


def read_pread(path: Path, count: int) -> int:
    return read_mmap(path, count, "pread")


def peaks() -> tuple[int, int]:
    """Peak of resident memory and of address space so far, in bytes."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    resident, space = (int(status.split(f"{key}:")[1].split()[0]) * 1024 for key in ("VmHWM", "VmPeak"))
    return resident, space


def measure_here(way: str, path: Path, count: int) -> dict[str, Any]:
    for _ in arrays(1):
        pass
    before, result = peaks(), []
    seconds = timed(lambda: result.append(globals()[way](path, count)))
    resident, space = (after - earlier for after, earlier in zip(peaks(), before, strict=True))
    return {"seconds": seconds, "resident": resident, "space": space, "result": result[0]}


def measure(way: str, path: Path, megabytes: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--megabytes", str(megabytes), "--way", way, "--path", path]
    answer: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True, encoding="utf-8").stdout)
    return answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=200)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print the figures for machines")
    parser.add_argument("--way", choices=(*WRITERS, *READERS), help=argparse.SUPPRESS)
    parser.add_argument("--path", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    count = max(1, options.megabytes * 1_000_000 // (2 * ITEMS))
    if options.way:
        print(json.dumps(measure_here(options.way, options.path, count)))
        return
    rows: dict[str, list[dict[str, Any]]] = {way: [] for way in (*WRITERS, *READERS)}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        for _ in range(options.repetitions):
            for way, runs in rows.items():
                runs.append(measure(way, path, options.megabytes))
    if len({run["result"] for way in READERS for run in rows[way]}) != 1:
        raise SystemExit("the readers disagree")
    figures = {
        way: {"seconds": spread([run["seconds"] for run in runs])}
        | {f"{kind}_mb": spread([run[kind] / 1e6 for run in runs])["median"] for kind in ("resident", "space")}
        for way, runs in rows.items()
    }
    if options.json:
        print(json.dumps(figures))
        return
    for way, row in figures.items():
        times = row["seconds"]
        print(
            f"{way:13} {times['median']:.3f} s ({times['min']:.3f} to {times['max']:.3f}), "
            f"resident +{row['resident_mb']:.0f} MB, address space +{row['space_mb']:.0f} MB"
        )


if __name__ == "__main__":
    main()
