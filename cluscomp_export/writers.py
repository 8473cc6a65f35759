"""What `convert` writes with: a registered format, or the one output that is an export and no format of ours."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluscomp_formats.errors import InvalidRequestError, Problem
from cluscomp_formats.gguf import write_dense_gguf
from cluscomp_formats.ir import Model
from cluscomp_formats.registry import CheckOutput, WriteModel, Written, find_format, writable_formats

__all__ = ["Writer", "find_writer"]


@dataclass(frozen=True)
class Writer:
    """`check(path, force=...)` refuses an output before any work, `write` makes it; see `Format`."""

    check: CheckOutput
    write: WriteModel


@dataclass(frozen=True)
class _Export:
    """A file without codebooks has no digest."""

    file_bytes: int
    digest: None = None


def find_writer(name: str, gguf_type: str | None = None) -> Writer:
    """The writer of the format of that name; with `gguf_type`, decoded and requantised for stock llama.cpp.

    Raises InvalidRequestError.
    """
    fmt = find_format(name)
    if fmt.write is None:
        expected = ", ".join(writable_formats())
        raise InvalidRequestError(Problem("not_writable", "this format is only read", found=name, expected=expected))
    if gguf_type is None:
        return Writer(fmt.check_output, fmt.write)
    if name != "gguf":
        raise InvalidRequestError(Problem("bad_option", "--gguf-type needs --to gguf", found=f"--to {name}"))
    return Writer(fmt.check_output, _dense_gguf(gguf_type))


def _dense_gguf(gguf_type: str) -> WriteModel:
    def write(
        model: Model,
        path: Path,
        *,
        force: bool,
        self_test: Callable[[Model], Mapping[str, Any] | None] | None,
        on_progress: Callable[[int, int], None] | None,
    ) -> Written:
        report = write_dense_gguf(model, path, gguf_type=gguf_type, force=force, on_progress=on_progress)
        return _Export(report.file_bytes)

    return write
