"""Kernels run on the device of their operands, not on the current device. No GPU is needed: the tensors are fake."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from cluscomp_kernels import kmeans
from cluscomp_kernels.clus_linear import prepare
from cluscomp_kernels.kmeans import clustering

KERNELS = Path(kmeans.__file__).parent.parent


class Device:
    """Simulates the current CUDA device."""

    def __init__(self) -> None:
        self.current = 0

    def exchange(self, device: int) -> int:
        previous = self.current
        if device >= 0:
            self.current = device
        return previous


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    device = Device()
    monkeypatch.setattr(torch.cuda, "_exchange_device", device.exchange)
    monkeypatch.setattr(torch.cuda, "_maybe_exchange_device", device.exchange)
    return device


@pytest.fixture
def on_second_gpu() -> Iterator[Callable[..., torch.Tensor]]:
    """Create tensors on cuda:1 without values."""
    with FakeTensorMode():
        yield lambda *shape, dtype=torch.float32: torch.empty(shape, dtype=dtype, device="cuda:1")


class Recorder:
    """Simulates a Triton kernel and records the device it is launched on."""

    def __init__(self, device: Device, launches: list[int]) -> None:
        self.device, self.launches = device, launches

    def __getitem__(self, grid: object) -> Callable[..., None]:
        return lambda *_, **__: self.launches.append(self.device.current)


@pytest.mark.parametrize(("tokens", "kernels"), [(1, 2), (5, 2), (17, 1)])
def test_the_linear_operator_launches_where_its_weight_is(
    tokens: int, kernels: int, device: Device, on_second_gpu: Callable[..., torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    from cluscomp_kernels.clus_linear import triton_kernel

    launches: list[int] = []
    for name in ("one_token_kernel", "few_tokens_kernel", "finish_kernel", "decode_kernel"):
        monkeypatch.setattr(triton_kernel, name, Recorder(device, launches))
    x, codes, codebook = on_second_gpu(tokens, 30), on_second_gpu(30, 10, dtype=torch.uint16), on_second_gpu(16, 4)
    y = triton_kernel.linear_triton(x, codes, codebook, None, None, 40, 4)
    assert y.device == torch.device("cuda:1")
    assert launches == [1] * kernels
    assert device.current == 0


def test_the_search_launches_where_its_points_are(
    device: Device, on_second_gpu: Callable[..., torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    from cluscomp_kernels.kmeans import triton_nearest

    launches: list[int] = []
    monkeypatch.setattr(triton_nearest, "nearest_kernel", Recorder(device, launches))
    # One centroid, since a change of layout would need a torch built for CUDA.
    triton_nearest.nearest_triton(on_second_gpu(100, 4), on_second_gpu(1, 4))
    assert launches == [1]
    assert device.current == 0


def test_no_launch_is_without_a_guard() -> None:
    """In every module that imports triton, `kernel[grid](...)` is inside `with torch.cuda.device_of(...)`."""
    found = 0
    for path in KERNELS.rglob("triton_*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        guarded = {
            inner
            for node in ast.walk(tree)
            if isinstance(node, ast.With)
            and any(ast.unparse(item.context_expr).startswith("torch.cuda.device_of(") for item in node.items)
            for inner in ast.walk(node)
        }
        launches = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript)]
        found += len(launches)
        assert [ast.unparse(node.func) for node in launches if node not in guarded] == [], path.name
    assert found >= 5


def test_clustering_runs_on_the_device_it_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.device] = []

    class Asked(Exception):  # noqa: N818
        pass

    def engine(points: object, weights: object, device: torch.device, *_: Any) -> None:
        asked.append(device)
        raise Asked

    monkeypatch.setattr(clustering, "TorchEngine", engine)
    points = np.zeros((20, 4), dtype=np.float32)
    with pytest.raises(Asked):
        kmeans.kmeans(points, 3, device="cuda:1")
    with pytest.raises(Asked):
        kmeans.assign(points, points[:3], device="cuda:1")
    assert asked == [torch.device("cuda:1")] * 2


def test_an_input_on_another_device_is_refused() -> None:
    codes = torch.zeros((6, 2), dtype=torch.int32).to(torch.uint16)
    weight = prepare(torch.zeros((3, 4)), codes, 8, path="reference")
    with pytest.raises(ValueError, match="x is on meta, the weight was prepared for cpu"):
        weight(torch.zeros((1, 6), device="meta"))
