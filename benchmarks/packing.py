"""How fast a model is packed and loaded, and in how much memory: `python benchmarks/packing.py [--json]`.

A synthetic clustered model lies in `.npy` files, one per array, and is packed from there at 16, 14 and 12 bits per code.

- packing: `write_packed`, which reads, checks, packs, sums, hashes, writes and syncs, against `cp` of the file it makes and
  an fsync.
- mapping: `open_packed`, `check_payloads` (checksums and ranges) and the tiled codes of every weight, as an engine uses them,
  against `safetensors.numpy.load_file` of the same arrays (codes as uint16), which checks nothing.
- loading: `open_packed` and reading every payload, checks and unpacking of codes included, against the same.
- memory: the peak resident size of a process that packs, less what it had before, against the largest payload.

Correctness comes first: digest and arrays of what was written are compared with the source. The peers take turns within
each repetition; medians and ranges of the paired ratios are given. Sizes are in MB = 10^6 bytes, times in seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from measuring import copy_and_sync, peak_resident_bytes, summary, timed
from safetensors.numpy import load_file, save_file

from cluscomp_formats import check_payloads, tiled_codes
from cluscomp_formats.ir import Array, ClusteredWeight, Codebook, DenseTensor, Model, Stage, Tensor
from cluscomp_formats.packed import open_packed, write_packed

NUM_WEIGHTS = 12
CLUSTER_DIM = 4
IN_FEATURES = 4096
BAR = 0.5
"""Packing is to reach at least this share of the throughput of cp."""


def make_source(folder: Path, bits: int, megabytes: int) -> None:
    """Write the arrays of a model whose packed codes take about `megabytes`."""
    rng = np.random.default_rng(bits)
    num_clusters = 2**bits
    groups = megabytes * 1_000_000 * 8 // bits // (NUM_WEIGHTS * IN_FEATURES)
    for number in range(NUM_WEIGHTS):
        codes = rng.integers(0, num_clusters, (IN_FEATURES, groups), dtype=np.uint16)
        np.save(folder / f"codes.{number}.npy", codes)
        np.save(folder / f"codebook.{number}.npy", rng.standard_normal((num_clusters, CLUSTER_DIM)).astype(np.float16))
        np.save(folder / f"norm.{number}.npy", rng.standard_normal(IN_FEATURES).astype(np.float16))
    np.save(folder / "embedding.npy", rng.standard_normal((4096, 1024)).astype(np.float16))


def lazy_array(path: Path) -> Array:
    """An array that is mapped when read, and unmapped when no longer used."""
    header = np.load(path, mmap_mode="r")
    return Array(header.shape, header.dtype.name, lambda: np.load(path, mmap_mode="r"))


def source_model(folder: Path) -> Model:
    tensors: dict[str, Tensor] = {"embedding": DenseTensor("embedding", lazy_array(folder / "embedding.npy"))}
    for number in range(NUM_WEIGHTS):
        codebook = Codebook(f"codebook.{number}", lazy_array(folder / f"codebook.{number}.npy"))
        codes = lazy_array(folder / f"codes.{number}.npy")
        shape = (codes.shape[1] * CLUSTER_DIM, IN_FEATURES)
        tensors[f"weight.{number}"] = ClusteredWeight(f"weight.{number}", shape, (Stage(codebook, codes),))
        tensors[f"norm.{number}"] = DenseTensor(f"norm.{number}", lazy_array(folder / f"norm.{number}.npy"))
    return Model({"model_type": "synthetic"}, tensors)


def payload_name(description: Any) -> str:
    return f"{description.get('tensor', description.get('codebook'))}.{description.get('part', 'centroids')}"


def read_all(model: Model) -> dict[str, Any]:
    return {payload_name(description): array.read() for description, array in model.payloads()}


def map_all(packed: Path) -> int:
    """Open and check a file, and take its codes where they lie; return their bytes."""
    model = open_packed(packed)
    check_payloads(model)
    return sum(tiled_codes(stage).nbytes for weight in model.clustered.values() for stage in weight.stages)


def check(source: Model, packed: Path, peer: Path) -> None:
    """What was written is the source, and the peer of the loading benchmark holds the same arrays."""
    opened = open_packed(packed, check=True)
    assert opened.digest() == source.digest(), "the digests differ"
    arrays, peers = read_all(source), load_file(peer)
    found = read_all(opened)
    assert arrays.keys() == peers.keys() == found.keys()
    for name, values in arrays.items():
        assert np.array_equal(found[name], values), f"{name} differs"
        assert np.array_equal(peers[name], values), f"{name} differs in the peer"


def measure(folder: Path, bits: int, megabytes: int, repetitions: int) -> dict[str, Any]:
    source_folder = folder / f"source-{bits}"
    source_folder.mkdir()
    make_source(source_folder, bits, megabytes)
    source = source_model(source_folder)
    packed, copied, peer = folder / "model.clus", folder / "copy.clus", folder / "model.safetensors"
    write_packed(source, packed, force=True)
    save_file(read_all(source), peer)
    check(source, packed, peer)
    times: dict[str, list[float]] = {"pack": [], "cp": [], "map": [], "load": [], "safetensors": []}
    for _ in range(repetitions):
        for path in (packed, copied):
            path.unlink(missing_ok=True)
        # What others left unwritten must not be charged to whoever comes first.
        os.sync()
        times["pack"].append(timed(lambda: write_packed(source, packed)))
        times["cp"].append(timed(lambda: copy_and_sync(packed, copied)))
        times["map"].append(timed(lambda: map_all(packed)))
        times["load"].append(timed(lambda: read_all(open_packed(packed))))
        times["safetensors"].append(timed(lambda: load_file(peer)))
    memory = subprocess.run(
        [sys.executable, __file__, "--peak-of", source_folder, "--folder", folder], check=True, capture_output=True, text=True
    )
    largest = max(array.nbytes for _, array in source.payloads())
    peak = json.loads(memory.stdout)["bytes"]
    return {
        "bits": bits,
        "file_megabytes": packed.stat().st_size / 1e6,
        "packing_against_cp": summary(times["pack"], times["cp"]),
        "mapping_against_safetensors": summary(times["map"], times["safetensors"]),
        "loading_against_safetensors": summary(times["load"], times["safetensors"]),
        "memory": {"peak_megabytes": peak / 1e6, "largest_payload_megabytes": largest / 1e6, "ratio": peak / largest},
    }


def peak_of(source_folder: Path, folder: Path) -> int:
    """Bytes by which packing raises this process's peak resident size; mapped pages of the source count. Linux only."""
    source = source_model(source_folder)
    before = peak_resident_bytes()
    write_packed(source, folder / "peak.clus", force=True)
    return peak_resident_bytes() - before


def report(result: dict[str, Any]) -> str:
    lines = [f"{result['bits']} bits, {result['file_megabytes']:.0f} MB"]
    for label, key, peer in (
        ("pack", "packing_against_cp", "cp + fsync"),
        ("map", "mapping_against_safetensors", "safetensors"),
        ("load", "loading_against_safetensors", "safetensors"),
    ):
        row = result[key]
        lines.append(
            f"  {label} {row['seconds']:.3f} s, {peer} {row['peer_seconds']:.3f} s: "
            f"{row['ratio']:.2f} times its speed ({row['ratio_min']:.2f} to {row['ratio_max']:.2f})"
        )
    memory = result["memory"]
    lines.append(f"  peak {memory['peak_megabytes']:.1f} MB, largest payload {memory['largest_payload_megabytes']:.1f} MB")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--megabytes", type=int, default=210, help="packed codes of the model (default 210)")
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument(
        "--folder", type=Path, help="where the files go; on the disk to be measured (default: a temporary folder)"
    )
    parser.add_argument("--peak-of", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak_of:
        print(json.dumps({"bytes": peak_of(options.peak_of, options.folder)}))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        results = [measure(Path(name), bits, options.megabytes, options.repetitions) for bits in (16, 14, 12)]
    if options.json:
        print(json.dumps({"bar": BAR, "results": results}, indent=1))
    else:
        print("\n".join(report(result) for result in results))


if __name__ == "__main__":
    main()
