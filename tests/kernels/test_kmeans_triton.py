"""The Triton search: results in interpreter mode, and registers of the compiled code."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from triton_aot import compile_kernel

pytest.importorskip("triton")

from cluscomp_kernels.kmeans.triton_nearest import BLOCK_CENTROIDS, BLOCK_POINTS, WARPS, nearest_kernel

INTERPRETED = """
import numpy as np, torch
from cluscomp_kernels.kmeans.engine import run_lloyd
from cluscomp_kernels.kmeans.reference import nearest
from cluscomp_kernels.kmeans.torch_engine import TorchEngine
from cluscomp_kernels.kmeans.triton_nearest import nearest_triton
for count, clusters, dim in ((1, 1, 1), (65, 130, 3), (129, 63, 8), (100, 64, 16)):
    rng = np.random.default_rng(count)
    for points, centroids in (
        (rng.standard_normal((count, dim), dtype=np.float32), rng.standard_normal((clusters, dim), dtype=np.float32)),
        (rng.integers(-1, 2, (count, dim)).astype(np.float32), rng.integers(-1, 2, (clusters, dim)).astype(np.float32)),
    ):
        for weights in (), (rng.exponential(size=(count, dim)).astype(np.float32),):
            codes, distances = nearest_triton(*map(torch.from_numpy, (points, centroids, *weights)))
            expected, least = nearest(points, centroids, *weights)
            assert np.array_equal(codes.numpy(), expected), (count, clusters, dim)
            assert np.array_equal(distances.numpy(), least), (count, clusters, dim)
points = rng.standard_normal((300, 4), dtype=np.float32)
engine = TorchEngine(points, np.ones(300, dtype=np.float32), torch.device("cpu"), nearest_triton, lambda: None)
centroids, error, _ = run_lloyd(engine, points[:20].copy(), 3, plain=False, after_iteration=lambda done: None)
expected, least = nearest(points, centroids)
assert np.array_equal(engine.codes, expected)
assert abs(error - least.sum(dtype=np.float64)) < 1e-9 * error
print("fine")
"""


def test_interpreted_equals_reference() -> None:
    """Runs in a separate process, because `@triton.jit` fixes the mode at import."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", INTERPRETED]
    finished = subprocess.run(command, env=environment, capture_output=True, encoding="utf-8", timeout=300)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.strip() == "fine"


@pytest.mark.parametrize("capability", [80, 86, 87, 89, 90])
@pytest.mark.usefixtures("triton_cache")
def test_compiles_without_spills(capability: int) -> None:
    """Register spills would need stack or local memory; fused multiply-adds would give different codes than the CPU."""
    for dim, weighted in ((4, False), (4, True), (16, False), (16, True)):
        constants = {"DIM": dim, "POINTS": BLOCK_POINTS, "CENTROIDS": BLOCK_CENTROIDS, "WEIGHTED": weighted}
        types = {"points": "*fp32", "centroids": "*fp32", "importance": "*fp32", "codes": "*i32", "distances": "*fp32"}
        signature = {**types, "num_points": "i32", "num_centroids": "i32"}
        usage, ptx = compile_kernel(
            nearest_kernel, signature, constants, capability, num_warps=WARPS, fusion=False, aligned=False
        )
        assert usage.stack == usage.local == 0
        assert usage.registers <= 255
        assert "fma.rn.f32" not in ptx
