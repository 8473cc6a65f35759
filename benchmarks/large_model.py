"""Convert a model several times larger than the memory it may use: `python benchmarks/large_model.py [--json]`. Linux only.

A synthetic Llama of random weights in many shards is converted with `--dim 8 --clusters 256` under `ulimit -v`, which bounds
the address space, file mappings, the interpreter and torch included; then from format to format and back, and verified:

    source -> packed -> Hugging Face folder -> GGUF -> packed

Checked: every digest is the same, and the last file has the bytes of the first. With `--kills N` a conversion is killed N
times (SIGKILL) on the way and must still give those bytes. Reported per step: the peak resident size, the peak address space
and the time. Sizes are in MB = 10^6 bytes.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from synthetic_model import llama_config, write_model

HIDDEN, INNER, HEADS, VOCABULARY = 2048, 5632, 16, 4096
LAYER_BYTES = 2 * (4 * HIDDEN * HIDDEN + 3 * HIDDEN * INNER + 2 * HIDDEN)

CHILD = """
import sys
from pathlib import Path
from cluscomp_export.cli.main import main
report = Path(sys.argv.pop(1))
try:
    main()
finally:
    report.write_text(Path("/proc/self/status").read_text())
"""


def step_line(step: dict[str, Any]) -> str:
    resident, address_space = (f"{step[key] / 1e6:5.0f} MB" for key in ("resident", "address_space"))
    return f"  {step['step']:34} peak {resident} resident, {address_space} of address space, {step['seconds']:5.0f} s"


class Bounded:
    """Runs the command line under the bound and notes what each step took."""

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self.folder, self.limit = folder, limit_bytes
        self.steps: list[dict[str, Any]] = []

    def start(self, *arguments: object) -> subprocess.Popen[str]:
        def bound() -> None:
            resource.setrlimit(resource.RLIMIT_AS, (self.limit, self.limit))

        command = [sys.executable, "-c", CHILD, str(self.folder / "status"), *map(str, arguments)]
        return subprocess.Popen(command, preexec_fn=bound, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)  # noqa: PLW1509

    def run(self, label: str, *arguments: object) -> Any:
        """The JSON a command prints. Exits with its messages if it fails."""
        started = time.perf_counter()
        process = self.start(*arguments, "--json")
        out, err = process.communicate()
        if process.returncode != 0:
            sys.exit(f"{label}: exit code {process.returncode}\n{out}\n{err}")
        status = dict(line.split(":", 1) for line in (self.folder / "status").read_text().splitlines())
        peaks = {key: int(status[name].split()[0]) * 1024 for key, name in (("resident", "VmHWM"), ("address_space", "VmPeak"))}
        self.steps.append({"step": label, "seconds": time.perf_counter() - started, **peaks})
        print(step_line(self.steps[-1]), file=sys.stderr, flush=True)
        return json.loads(out)


def kill_on_the_way(bounded: Bounded, work: Path, kills: int, *arguments: object) -> None:
    """Start a conversion `kills` times and kill it whenever it has finished twenty more units of work."""
    for attempt in range(1, kills + 1):
        process = bounded.start(*arguments)
        while process.poll() is None and (not work.is_dir() or len(list(work.glob("*.safetensors"))) < 20 * attempt):
            time.sleep(0.05)
        if process.poll() is not None:
            sys.exit(f"the conversion ended before kill {attempt}")
        process.send_signal(signal.SIGKILL)
        process.communicate()


def measure(folder: Path, layers: int, limit: int, kills: int, *, verify: bool) -> dict[str, Any]:
    source = folder / "source"
    source.mkdir()
    source_bytes = write_model(source, llama_config(HIDDEN, INNER, layers, HEADS, HEADS, VOCABULARY))
    bounded = Bounded(folder, limit)
    first, hf, gguf, last = (folder / name for name in ("first.clus", "folder", "model.gguf", "last.clus"))
    cluster = ("convert", source, first, "--dim", 8, "--clusters", 256, "--share", "kind", "--embedding-bits", 16)
    report = bounded.run("source to packed", *cluster)
    digests = {
        report["digest"],
        bounded.run("packed to hf", "convert", first, hf, "--to", "hf")["digest"],
        bounded.run("hf to gguf", "convert", hf, gguf, "--to", "gguf")["digest"],
        bounded.run("gguf to packed", "convert", gguf, last)["digest"],
        bounded.run("inspect hf", "inspect", hf)["digest"],
        bounded.run("inspect gguf", "inspect", gguf)["digest"],
        bounded.run("inspect packed", "inspect", last)["digest"],
    }
    assert len(digests) == 1, f"the digests differ: {digests}"
    assert first.read_bytes() == last.read_bytes(), "the last file is not the first"
    if kills:
        again = folder / "again.clus"
        arguments = (*cluster[:2], again, *cluster[3:])
        kill_on_the_way(bounded, folder / ".again.clus.work", kills, *arguments)
        resumed = bounded.run(f"source to packed, after {kills} kills", *arguments)
        assert resumed["reused"] >= 20 * kills, resumed
        assert first.read_bytes() == again.read_bytes(), "the resumed conversion made another file"
    if verify:
        verified = bounded.run("verify source, packed", "verify", source, first)
        assert verified["verdict"] == "derived", verified
    largest = 2 * HIDDEN * INNER
    return {
        "source_bytes": source_bytes,
        "limit_bytes": limit,
        "largest_tensor_bytes": largest,
        "packed_bytes": first.stat().st_size,
        "steps": bounded.steps,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--megabytes", type=int, default=4500, help="size of the source (default 4500)")
    parser.add_argument("--limit", type=int, default=1100, help="address space of each command, in MB (default 1100)")
    parser.add_argument("--kills", type=int, default=1, help="how often a conversion is killed on the way (default 1)")
    parser.add_argument(
        "--verify", action="store_true", help="also verify the packed file against the source, matrix by matrix"
    )
    parser.add_argument("--folder", type=Path, help="where the files go (default: a temporary folder)")
    options = parser.parse_args()
    layers = max(1, -(-options.megabytes * 1_000_000 // LAYER_BYTES))
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        result = measure(Path(name), layers, options.limit * 1_000_000, options.kills, verify=options.verify)
    if options.json:
        print(json.dumps(result, indent=1))
        return
    megabytes = {key: result[f"{key}_bytes"] / 1e6 for key in ("source", "limit", "largest_tensor", "packed")}
    print(
        f"source {megabytes['source']:.0f} MB, {megabytes['source'] / megabytes['limit']:.1f} times the bound of "
        f"{megabytes['limit']:.0f} MB; largest tensor {megabytes['largest_tensor']:.1f} MB; packed {megabytes['packed']:.0f} MB"
    )
    for step in result["steps"]:
        print(step_line(step))


if __name__ == "__main__":
    main()
