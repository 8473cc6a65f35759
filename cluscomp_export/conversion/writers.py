"""What `convert` writes with: a format's own writer, or one that needs what only this package can make."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluscomp_formats.errors import InvalidRequestError, Problem
from cluscomp_formats.gguf import DENSE_TYPES, dense_gguf_notes, dense_gguf_size, write_dense_gguf
from cluscomp_formats.ir import Model
from cluscomp_formats.progress import Progress
from cluscomp_formats.registry import CheckOutput, WriteModel, Written, find_format, formats

__all__ = ["Writer", "find_writer", "output_formats"]

SelfTest = Callable[[Model], Mapping[str, Any] | None]


@dataclass(frozen=True)
class Writer:
    """`check(path, force=...)` refuses an output before any work, `write` makes it; see `Format`."""

    check: CheckOutput
    write: WriteModel
    check_model: Callable[[Model], object] = lambda model: None
    """Refuses a model before any work, by its configuration and shapes. Raises UnsupportedError, InvalidFileError."""
    size: Callable[[Model], int] | None = None
    """Bytes of what `write` makes of a model with that self-test record, at most; see `Format`."""
    notes: Callable[[Model], Sequence[str]] = lambda model: ()
    """What the artefact will not say of the model, though it goes on. Raises what `write` does before it writes."""


@dataclass(frozen=True)
class _Export:
    """A file without codebooks has no digest."""

    file_bytes: int
    digest: None = None


def output_formats() -> tuple[str, ...]:
    """Names of the formats that can be written."""
    return tuple(fmt.name for fmt in formats() if fmt.write is not None or fmt.name == "onnx")


def find_writer(name: str, gguf_type: str | None = None) -> Writer:
    """The writer of the format of that name; with `gguf_type`, decoded and requantised for stock llama.cpp.

    Raises InvalidRequestError.
    """
    fmt = find_format(name)
    if gguf_type is not None and name != "gguf":
        raise InvalidRequestError(Problem("bad_option", "--gguf-type needs --to gguf", found=f"--to {name}"))
    if name == "onnx":
        return Writer(fmt.check_output, _write_onnx, _build_graph, _onnx_size)
    if gguf_type is not None:
        if gguf_type not in DENSE_TYPES:
            found, expected = repr(gguf_type)[:200], ", ".join(DENSE_TYPES)
            raise InvalidRequestError(Problem("bad_option", "no such GGUF type", found=found, expected=expected))
        write = functools.partial(_write_dense_gguf, gguf_type)
        size = functools.partial(dense_gguf_size, gguf_type=gguf_type)
        return Writer(fmt.check_output, write, size=size, notes=functools.partial(dense_gguf_notes, gguf_type=gguf_type))
    if fmt.write is None:
        expected = ", ".join(output_formats())
        raise InvalidRequestError(Problem("not_writable", "this format is only read", found=name, expected=expected))
    return Writer(fmt.check_output, fmt.write, size=fmt.size)


def _build_graph(model: Model) -> Any:
    # Here, so that the names of formats can be asked for without loading torch.
    from cluscomp_export.onnx_graph import build_graph

    return build_graph(model)


def _onnx_size(model: Model) -> int:
    graph = _build_graph(model)
    from cluscomp_formats.onnx.writer import onnx_size

    return onnx_size(model, graph)


def _write_onnx(model: Model, path: Path, *, force: bool, self_test: SelfTest | None, on_progress: Progress) -> Written:
    graph = _build_graph(model)
    # After `build_graph`, which says so if the package onnx is missing.
    from cluscomp_formats.onnx.writer import write_onnx

    return write_onnx(model, path, graph, force=force, self_test=self_test, on_progress=on_progress)


def _write_dense_gguf(
    gguf_type: str, model: Model, path: Path, *, force: bool, self_test: SelfTest | None, on_progress: Progress
) -> Written:
    return _Export(write_dense_gguf(model, path, gguf_type=gguf_type, force=force, on_progress=on_progress).file_bytes)
