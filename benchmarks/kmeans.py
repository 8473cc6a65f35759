"""k-means of 65536 clusters beside faiss flat k-means (20 iterations, all points), same threads, same run.

Checks that our codes are the exact nearest centroids on a sample, then reports time and error ratios. The error of both sides
is computed by the same exact assignment. `--faiss-iterations` below 20 extrapolates faiss's time (it is proportional) and
compares with the error it has reached by then; the report says so.

    PYTHONPATH=.:formats:kernels:runtime python benchmarks/kmeans.py --dims 4,8 --json result.json
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt

from cluscomp_kernels.kmeans import assign, kmeans
from cluscomp_kernels.kmeans.reference import nearest

Floats = npt.NDArray[np.float32]

CLUSTERS = 65536
SIDE = 4096
BARS = {4: (20.0, 1.0), 6: (15.0, 1.0), 8: (15.0, 1.0), 16: (4.0, 1.01)}
"""Least speed-up and greatest error ratio by dimension."""


def gaussian(dim: int) -> Floats:
    """A 4096 x 4096 matrix of N(0, 1) * 0.02, its rows padded to a multiple of dim and cut into vectors."""
    matrix = np.random.default_rng(0).standard_normal((SIDE, SIDE), dtype=np.float32) * np.float32(0.02)
    return np.pad(matrix, ((0, 0), (0, -SIDE % dim))).reshape(-1, dim)


def from_safetensors(path: Path, dim: int, most: int) -> Floats:
    """The first `most` 2-D weights of a safetensors file, transposed to [in, out] and cut along out."""
    from safetensors.numpy import load_file

    matrices = [values for values in load_file(path).values() if values.ndim == 2][:most]
    vectors = [np.pad(m.T.astype(np.float32), ((0, 0), (0, -len(m) % dim))).reshape(-1, dim) for m in matrices]
    return np.concatenate(vectors)


def from_gguf(path: Path, dim: int, most: int) -> Floats:
    """The first `most` ffn_down weights of a GGUF file, transposed to [in, out] and cut along out."""
    from gguf import GGUFReader
    from gguf.quants import dequantize

    tensors = [tensor for tensor in GGUFReader(path).tensors if "ffn_down.weight" in tensor.name][:most]
    matrices = [np.asarray(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32) for tensor in tensors]
    return np.concatenate([np.pad(m.T, ((0, 0), (0, -len(m) % dim))).reshape(-1, dim) for m in matrices])


def mean_squared_error(points: Floats, centroids: Floats, threads: int) -> float:
    """Per weight, with exact codes."""
    codes = assign(points, centroids, threads=threads)
    return float(np.square(points - centroids[codes]).mean(dtype=np.float64))


def compare(points: Floats, clusters: int, threads: int, faiss_iterations: int, seed: int) -> dict[str, Any]:
    """Cluster the same points with both; times in seconds, errors per weight."""
    dim = points.shape[1]
    began = time.perf_counter()
    ours = kmeans(points, clusters, threads=threads, seed=seed)
    our_time = time.perf_counter() - began
    sample = np.random.default_rng(1).choice(len(points), min(1000, len(points)), replace=False)
    if not np.array_equal(ours.codes[sample], nearest(points[sample], ours.centroids)[0]):
        raise SystemExit(f"dim {dim}: codes are not the nearest centroids; nothing was timed")
    peer = faiss.Kmeans(
        dim, clusters, niter=faiss_iterations, max_points_per_centroid=10**9, min_points_per_centroid=1, seed=seed + 1
    )
    began = time.perf_counter()
    peer.train(points)
    faiss_time = (time.perf_counter() - began) * 20 / faiss_iterations
    our_error = mean_squared_error(points, ours.centroids, threads)
    faiss_error = mean_squared_error(points, peer.centroids, threads)
    return {
        "dim": dim,
        "points": len(points),
        "clusters": clusters,
        "iterations": ours.iterations,
        "seconds": our_time,
        "faiss_seconds": faiss_time,
        "faiss_iterations": faiss_iterations,
        "speedup": faiss_time / our_time,
        "mse": our_error,
        "faiss_mse": faiss_error,
        "mse_ratio": our_error / faiss_error,
        "path": ours.path,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dims", default="4,6,8,16")
    parser.add_argument("--clusters", type=int, default=CLUSTERS)
    parser.add_argument("--faiss-iterations", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--weights", type=Path, help="real weights, .gguf or .safetensors, instead of the Gaussian matrix")
    parser.add_argument("--matrices", type=int, default=8, help="how many of them")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    faiss.omp_set_num_threads(options.threads)
    rows, met = [], True
    for dim in map(int, options.dims.split(",")):
        if options.weights is None:
            points = gaussian(dim)
        else:
            points = (from_gguf if options.weights.suffix == ".gguf" else from_safetensors)(
                options.weights, dim, options.matrices
            )
        row = compare(points, options.clusters, options.threads, options.faiss_iterations, options.seed)
        rows.append(row)
        note = "" if options.faiss_iterations == 20 else f" (time extrapolated from {options.faiss_iterations} iterations)"
        print(
            f"dim {dim}: {row['points']} points, ours {row['seconds']:.1f} s, faiss {row['faiss_seconds']:.1f} s{note}, "
            f"{row['speedup']:.1f}x faster at {row['mse_ratio']:.4f}x its error",
            flush=True,
        )
        if options.weights is None and options.clusters == CLUSTERS and options.faiss_iterations == 20 and dim in BARS:
            speed, error = BARS[dim]
            met &= row["speedup"] >= speed and row["mse_ratio"] <= error
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
