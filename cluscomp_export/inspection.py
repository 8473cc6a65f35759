"""Describe a model of any format, for people and for machines."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from cluscomp_export.progress import Progress, silent
from cluscomp_export.sizes import model_sizes, tensor_rows
from cluscomp_export.sources import open_source, source_bytes
from cluscomp_formats.ir import Model
from cluscomp_formats.registry import detect
from cluscomp_kernels.clus_linear import choose_path, paths

__all__ = ["inspect_model"]


def inspect_model(path: Path, *, quick: bool = False, on_progress: Progress = silent) -> dict[str, Any]:
    """A JSON-ready description: format, architecture, sizes, digest, settings per tensor, codebooks, kernel of this machine.

    `quick` reads no payload; `digest` is then None. Otherwise every payload is read, which checks its checksum. Raises
    InvalidFileError, UnsupportedError.
    """
    model = open_source(path)
    sizes = model_sizes(model)
    fmt = detect(path)
    architectures = model.config.get("architectures")
    named = architectures[0] if isinstance(architectures, list) and architectures else model.config.get("model_type", "unknown")
    return {
        "file": str(path),
        "format": fmt.name if fmt else model.provenance.get("format", "unknown"),
        "architecture": str(named),
        "weights": sizes.all_weights,
        "file_bytes": source_bytes(path),
        "bits_per_weight": sizes.bits_per_weight(),
        "digest": None if quick else _digest(model, on_progress),
        "provenance": dict(model.provenance),
        "self_test": model.self_test is not None,
        "files": {name: array.nbytes for name, array in sorted(model.files.items())},
        "codebooks": [
            {"name": book.name, "dim": book.cluster_dim, "clusters": book.num_clusters, "dtype": book.values.dtype}
            for book in model.codebooks.values()
        ],
        "tensors": tensor_rows(model),
        "kernel": _kernel(),
    }


def _digest(model: Model, on_progress: Progress) -> str:
    total = sum(1 for _ in model.payloads())
    done = itertools.count(1)
    return model.digest(lambda *_: on_progress("computing the digest", next(done), total))


def _kernel() -> str:
    """The kernel the CPU of this machine would use, and why not a faster one."""
    chosen = choose_path("cpu")
    missing = [f"{name} unavailable: {reason}" for name, available, reason in paths("cpu") if not available]
    return "; ".join([f"{chosen} (cpu)", *missing])
