"""Which path runs a compressed linear on which device, and the preparation of weights for it.

| path | what it is |
|---|---|
| native | C kernels on tiled codes (CPU) |
| triton | Triton kernels (CUDA, compute capability 8.0 and up) |
| embedding_bag | torch.nn.functional.embedding_bag (CPU), where the C kernels could not be built |
| reference | decode and multiply at every call, any device |
| dense | decode once and keep the dense matrix, any device |
"""

from __future__ import annotations

import functools
import importlib.util
import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from cluscomp_kernels import native
from cluscomp_kernels.clus_linear import native_kernel
from cluscomp_kernels.clus_linear.native_weight import NativeWeight
from cluscomp_kernels.clus_linear.operands import check_codebook, check_codes, check_epilogue
from cluscomp_kernels.clus_linear.prepared import (
    DenseWeight,
    EmbeddingBagWeight,
    Operands,
    PreparedCodebook,
    PreparedWeight,
    ReferenceWeight,
)

__all__ = ["PATHS", "PathStatus", "choose_path", "paths", "prepare", "prepare_codebook"]

PATHS = ("native", "triton", "embedding_bag", "reference", "dense")

INT8_UNIT = 32.0
"""Codebooks of int8 are divided by this to be float16, row scales are multiplied with it; both are exact.

Centroids of rows of unit variance are then about as large as in a codebook of floats. Products of whole numbers could leave the
range of float16 before the row scale brings them back.
"""


class PathStatus(NamedTuple):
    """A path on a device; `reason` says why it is not available, and is empty if it is."""

    name: str
    available: bool
    reason: str


def paths(device: str | torch.device) -> tuple[PathStatus, ...]:
    """Every path and whether it is available on the device."""
    kind = torch.device(device).type
    on_cpu = "" if kind == "cpu" else f"runs on the CPU only, not on {kind}"
    reasons = {"native": on_cpu or native.missing_reason(), "triton": _triton_missing(device), "embedding_bag": on_cpu}
    return tuple(PathStatus(name, not reasons.get(name), reasons.get(name, "")) for name in PATHS)


def _triton_missing(device: str | torch.device) -> str:
    if torch.device(device).type != "cuda":
        return f"runs on CUDA devices only, not on {torch.device(device).type}"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "needs a GPU of compute capability 8.0 or higher"
    return ""


@functools.cache
def _announce(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=4)


def choose_path(device: str | torch.device) -> str:
    """The fastest available path that keeps the weight compressed. Warns once where it has to be a slow one."""
    status = {path.name: path for path in paths(device)}
    best, fallback = ("native", "embedding_bag") if torch.device(device).type == "cpu" else ("triton", "reference")
    if status[best].available:
        return best
    _announce(f"the {best} path is not available on {device}: {status[best].reason}. The slower path {fallback!r} is used.")
    return fallback


def _checked_path(path: str, device: str | torch.device, cluster_dim: int) -> str:
    if path == "auto":
        chosen = choose_path(device)
        if chosen == "native" and cluster_dim > native_kernel.LANES:
            _announce(f"the native path takes no cluster_dim above {native_kernel.LANES}; 'embedding_bag' is used.")
            return "embedding_bag"
        return chosen
    status = {known.name: known for known in paths(device)}
    available = ", ".join(name for name, known in status.items() if known.available)
    if path not in status:
        raise ValueError(f"there is no path {path!r}; on {device} there are: auto, {available}")
    if not status[path].available:
        raise ValueError(f"the path {path!r} is not available on {device}: {status[path].reason}; available: auto, {available}")
    return path


def prepare_codebook(codebook: Tensor, *, path: str = "auto", device: str | torch.device = "cpu") -> PreparedCodebook:
    """Lay out `codebook [num_clusters, cluster_dim]` for a path, once for all the weights that use it.

    Values are exact: float16 and bfloat16 keep their type or are widened, int8 becomes float16. Raises TypeError or ValueError
    on a wrong codebook, ValueError on a path that the device does not have.
    """
    check_codebook(codebook)
    num_clusters, cluster_dim = codebook.shape
    path = _checked_path(path, device, cluster_dim)
    codebook = codebook.detach()
    unit = 1.0
    if codebook.dtype == torch.int8:
        codebook, unit = codebook.to(torch.float16) / INT8_UNIT, INT8_UNIT
    if path == "native":
        values = native_kernel.pad_codebook(codebook.to("cpu"))
    elif path == "embedding_bag":
        values = codebook.to("cpu", torch.float32)
    elif path == "triton":
        row = 1 << (cluster_dim - 1).bit_length()
        values = torch.nn.functional.pad(codebook.to(device), (0, row - cluster_dim)).contiguous()
    else:
        values = codebook.to(device)
    return PreparedCodebook(path, values, num_clusters, cluster_dim, unit)


def prepare(
    codebook: Tensor | PreparedCodebook,
    codes: Tensor,
    out_features: int,
    *,
    row_scale: Tensor | None = None,
    bias: Tensor | None = None,
    path: str = "auto",
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> PreparedWeight:
    """Prepare a clustered weight for inference.

    `codebook` is `[num_clusters, cluster_dim]` or what `prepare_codebook` made of it, which sets the path; `codes` uint16
    `[in_features, ceil(out_features / cluster_dim)]`, of which no more is kept than the path needs; `row_scale` and `bias`
    `[out_features]`. `dtype` is what `decode()` and `embedding()` give, and the type the dense path keeps and computes in.

    Raises TypeError on a wrong dtype; ValueError on a wrong shape, a code past the codebook, or a path that the device lacks.
    """
    if isinstance(codebook, Tensor):
        codebook = prepare_codebook(codebook, path=path, device=device)
    elif path not in ("auto", codebook.path):
        raise ValueError(f"the codebook was prepared for the path {codebook.path!r}, not {path!r}")
    check_codes(codes, codebook.cluster_dim, out_features)
    check_epilogue(out_features, row_scale, bias)
    if codebook.path != "native":  # whose tiling checks on the way
        _check_code_range(codes, codebook.num_clusters)
    target = codebook.values.device

    def epilogue(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.detach().to(target, torch.float32).contiguous()

    scale = epilogue(row_scale)
    if codebook.unit != 1:
        scale = torch.full((out_features,), codebook.unit, device=target) if scale is None else scale * codebook.unit
    operands = Operands(codebook, codes, out_features, scale, epilogue(bias), dtype)
    return _weight_class(codebook.path)(operands)


def _weight_class(path: str) -> type[PreparedWeight]:
    if path == "triton":
        from cluscomp_kernels.clus_linear.triton_weight import TritonWeight

        return TritonWeight
    classes: tuple[type[PreparedWeight], ...] = (NativeWeight, EmbeddingBagWeight, ReferenceWeight, DenseWeight)
    return {known.path: known for known in classes}[path]


def _check_code_range(codes: Tensor, num_clusters: int) -> None:
    largest = int(codes.to(torch.int32).max()) if codes.numel() else 0
    if largest >= num_clusters:
        raise ValueError(f"codes go up to {largest}, but the codebook has only {num_clusters} clusters")
