"""What `convert --to` can write: each output format with its check before the work and its writer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluscomp_export.onnx_graph import build_graph
from cluscomp_formats.atomic import check_output
from cluscomp_formats.atomic_folder import check_output_folder
from cluscomp_formats.gguf import write_dense_gguf, write_gguf
from cluscomp_formats.hf import holds_only_model, write_hf
from cluscomp_formats.ir import Model
from cluscomp_formats.onnx import holds_only_onnx
from cluscomp_formats.packed import write_packed

__all__ = ["WRITERS", "Writer", "dense_gguf_writer"]

SelfTest = Callable[[Model], Mapping[str, Any] | None]
BytesDone = Callable[[int, int], None]


def _check_folder(path: Path, *, force: bool) -> None:
    check_output_folder(path, force=force, replaceable=holds_only_model)


def _check_onnx(path: Path, *, force: bool) -> None:
    check_output_folder(path, force=force, replaceable=holds_only_onnx)


def _write_onnx(model: Model, path: Path, **options: Any) -> Any:
    graph = build_graph(model)
    # After `build_graph`, which says so if the package onnx is missing.
    from cluscomp_formats.onnx.writer import write_onnx

    return write_onnx(model, path, graph, **options)


@dataclass(frozen=True)
class Writer:
    """`check(path, force=)` refuses an output before any work; `write(model, path, force, self_test, on_progress)` makes it,
    atomically, and returns the size of the output in bytes and the model's digest, None if the output is no codebook model."""

    check: Callable[..., None]
    write: Callable[[Model, Path, bool, SelfTest, BytesDone], tuple[int, str | None]]


def _writer(check: Callable[..., None], write: Callable[..., Any]) -> Writer:
    def run(model: Model, path: Path, force: bool, self_test: SelfTest, on_progress: BytesDone) -> tuple[int, str | None]:
        report = write(model, path, force=force, self_test=self_test, on_progress=on_progress)
        return report.file_bytes, report.digest

    return Writer(check, run)


def dense_gguf_writer(gguf_type: str) -> Writer:
    """Decoded and requantised to a stock GGUF type, for stock llama.cpp."""

    def run(model: Model, path: Path, force: bool, self_test: SelfTest, on_progress: BytesDone) -> tuple[int, str | None]:
        return write_dense_gguf(model, path, gguf_type=gguf_type, force=force, on_progress=on_progress).file_bytes, None

    return Writer(check_output, run)


WRITERS = {
    "packed": _writer(check_output, write_packed),
    "hf": _writer(_check_folder, write_hf),
    "gguf": _writer(check_output, write_gguf),
    "onnx": _writer(_check_onnx, _write_onnx),
}
