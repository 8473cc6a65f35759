"""The formats that `convert` and `merge` write: those of the registry, ONNX with the graph that only this package can build."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from cluscomp_formats.errors import InvalidRequestError, Problem
from cluscomp_formats.format import Format, Written
from cluscomp_formats.gguf import dense_format
from cluscomp_formats.ir import Model
from cluscomp_formats.progress import Progress
from cluscomp_formats.registry import find_format, formats

__all__ = ["output_format", "output_formats"]


def output_formats() -> tuple[str, ...]:
    """Names of the formats that can be written."""
    return tuple(fmt.name for fmt in map(_with_graph, formats()) if fmt.writable)


def output_format(to: str, gguf_type: str | None = None) -> Format:
    """The format of that name; with `gguf_type`, one that decodes and requantises for stock llama.cpp.

    Raises InvalidRequestError for a name or type that does not exist, and for a format that is only read.
    """
    fmt = _with_graph(find_format(to))
    if gguf_type is not None:
        if to != "gguf":
            raise InvalidRequestError(Problem("bad_option", "`gguf_type` needs `to='gguf'`", found=f"`to={to!r}`"))
        return dense_format(fmt, gguf_type)
    if not fmt.writable:
        expected = ", ".join(output_formats())
        raise InvalidRequestError(Problem("not_writable", "this format can only be read", found=to, expected=expected))
    return fmt


def _with_graph(fmt: Format) -> Format:
    """ONNX with a writer; any other format as it is."""
    return replace(fmt, write=_write_onnx, size=_onnx_size, check_model=_build_graph) if fmt.name == "onnx" else fmt


def _build_graph(model: Model) -> Any:
    # Here, so that the names of formats can be asked for without loading torch.
    from cluscomp_export.onnx_graph import build_graph

    return build_graph(model)


def _onnx_size(model: Model) -> int:
    graph = _build_graph(model)
    from cluscomp_formats.onnx.writer import onnx_size

    return onnx_size(model, graph)


def _write_onnx(
    model: Model,
    path: Path,
    *,
    force: bool,
    self_test: Callable[[Model], Mapping[str, Any] | None] | None,
    on_progress: Progress,
) -> Written:
    graph = _build_graph(model)
    # After `build_graph`, which says so if the package onnx is missing.
    from cluscomp_formats.onnx.writer import write_onnx

    return write_onnx(model, path, graph, force=force, self_test=self_test, on_progress=on_progress)
