"""Speed of this machine: time per weight of a product, and memory bandwidth."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from cluscomp_kernels.engine.program import Pool
from cluscomp_kernels.engine.weights import Codebook, EngineLinear, Stage, best_variant, tiled_bytes

__all__ = ["memory_bandwidth", "time_per_weight"]


def time_per_weight(
    cluster_dim: int,
    num_clusters: int,
    *,
    wide: bool = False,
    tokens: int = 1,
    threads: int = 1,
    shape: tuple[int, int] = (2048, 2048),
    seconds: float = 0.03,
) -> float:
    """Nanoseconds per weight and token of `x W^T` with a random codebook, the least of what `seconds` have time for.

    `wide` codebooks have values of 16 bits, others int8. `shape` is `(out_features, in_features)`. Several matrices take turns,
    so that codes do not come from the first caches.
    """
    out_features, in_features = shape
    random = np.random.default_rng(0)
    values = random.integers(-128, 128, (num_clusters, cluster_dim)).astype(np.float32 if wide else np.int8)
    codebook = Codebook(values, best_variant())
    length = tiled_bytes(in_features, out_features, cluster_dim, codebook.bits)
    copies = -(-(16 << 20) // length)
    # Every code of a codebook whose size is no power of two must be below it: its highest bit is left out.
    mask = 0xFF if num_clusters == 1 << codebook.bits else 0
    streams = random.integers(0, 256, (copies, length), dtype=np.uint8) & mask
    linears = [EngineLinear(shape, stages=[Stage(stream, codebook, None)]) for stream in streams]
    pool = Pool(threads=threads)
    x = random.standard_normal((tokens, in_features)).astype(np.float32)
    turn = iter(range(1 << 62))
    least = _least(lambda: pool.apply(linears[next(turn) % copies], x), seconds)
    return least * 1e9 / (out_features * in_features * tokens)


def memory_bandwidth(*, threads: int = 1, size: int = 256 << 20, seconds: float = 0.2) -> float:
    """Bytes per second that the threads read from an array of `size` bytes, larger than most caches."""
    data = np.ones(size, dtype=np.uint8)
    pool = Pool(threads=threads)
    return size / _least(lambda: pool.read(data), seconds)


def _least(run: Callable[[], object], seconds: float) -> float:
    """The least time of a run, in seconds."""
    run()
    end, least = time.perf_counter() + seconds, float("inf")
    while True:
        start = time.perf_counter()
        run()
        now = time.perf_counter()
        least = min(least, now - start)
        if now >= end:
            return least
