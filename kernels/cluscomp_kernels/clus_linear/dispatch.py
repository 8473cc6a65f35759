"""Choose the path that runs a compressed linear on a device, and prepare weights for it.

| path | implementation | device |
|---|---|---|
| native | C kernels on tiled codes | CPU |
| triton | Triton kernels | CUDA, compute capability 8.0 or higher |
| embedding_bag | torch.nn.functional.embedding_bag; used if the C kernels were not built | CPU |
| reference | decode and multiply in every call | any |
| dense | decode once and keep the dense matrix | any |
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
"""int8 codebooks are divided by this and stored as float16; row scales are multiplied by it. Both operations are exact.

The division gives centroids of about the magnitude of a floating-point codebook. Sums of products with the undivided integers
could overflow float16 before the row scale is applied.
"""


class PathStatus(NamedTuple):
    """Whether a path is available on a device; `reason` says why not, and is empty for an available path."""

    name: str
    available: bool
    reason: str


def paths(device: str | torch.device) -> tuple[PathStatus, ...]:
    """Return the status of every path on the device."""
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
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=4)


def choose_path(device: str | torch.device) -> str:
    """Return the fastest available path that keeps the weight compressed. Warns once if only a slow one is available."""
    status = {path.name: path for path in paths(device)}
    best, fallback = ("native", "embedding_bag") if torch.device(device).type == "cpu" else ("triton", "reference")
    if status[best].available:
        return best
    _warn_once(f"the {best} path is not available on {device}: {status[best].reason}. The slower path {fallback!r} is used.")
    return fallback


def _checked_path(path: str, device: str | torch.device, cluster_dim: int) -> str:
    if path == "auto":
        chosen = choose_path(device)
        if chosen == "native" and cluster_dim > native_kernel.LANES:
            _warn_once(f"the native path supports no cluster_dim above {native_kernel.LANES}; 'embedding_bag' is used.")
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
    """Lay out `codebook [num_clusters, cluster_dim]` for a path, once for all weights that use it.

    Values stay exact: float16 and bfloat16 keep their type or are widened, int8 becomes float16 (see `INT8_UNIT`).

    Raises TypeError if the codebook has an unsupported dtype; ValueError if its shape is wrong, or if the path is unknown or
    not available on the device.
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

    `codebook` is `[num_clusters, cluster_dim]`, or a result of `prepare_codebook`, whose path is then used. `codes` is uint16
    `[in_features, ceil(out_features / cluster_dim)]`; the result keeps a reference to it only if the path needs canonical
    codes. `row_scale` and `bias` are `[out_features]`. `dtype` is the dtype of `decode()` and `embedding()`; the dense path
    also stores the weight and computes in it.

    Raises TypeError if an operand has an unsupported dtype; ValueError if a shape is wrong, a code is not below num_clusters,
    or the path is not available on the device.
    """
    if isinstance(codebook, Tensor):
        codebook = prepare_codebook(codebook, path=path, device=device)
    elif path not in ("auto", codebook.path):
        raise ValueError(f"the codebook was prepared for the path {codebook.path!r}, not {path!r}")
    check_codes(codes, codebook.cluster_dim, out_features)
    check_epilogue(out_features, row_scale, bias)
    if codebook.path != "native":  # tile_codes() checks the range for the native path
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
