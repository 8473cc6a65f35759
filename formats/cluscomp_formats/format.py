"""`Format`: the type by which readers, writers and plug-ins are registered; see `docs/plugins.md`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from cluscomp_formats.errors import InvalidRequestError, Problem
from cluscomp_formats.files.atomic import check_output
from cluscomp_formats.ir import Model
from cluscomp_formats.progress import Progress

__all__ = ["CheckOutput", "Format", "WriteModel", "Written", "read_only"]


class Written(Protocol):
    """The result of a writer: the output's size in bytes and the model's digest, None if the output is no codebook model."""

    @property
    def file_bytes(self) -> int: ...
    @property
    def digest(self) -> str | None: ...


class WriteModel(Protocol):
    """Writes a model to `path`, atomically and one payload at a time.

    `self_test` is called with the model as opened from the finished payloads, and returns the record to store. `on_progress` is
    called with the phase ("writing"), the bytes done and the total bytes. If the model's `claimed_digest` is not its digest, no
    output must be made: `check_claim` of `cluscomp_formats.sections.digest` raises InvalidFileError.

    Raises OutputExistsError if the output exists and `force` is False; StorageError if the system refuses to read or write;
    InvalidRequestError or UnsupportedError if the format cannot store the model.
    """

    def __call__(
        self,
        model: Model,
        path: Path,
        /,
        *,
        force: bool,
        self_test: Callable[[Model], Mapping[str, Any] | None] | None,
        on_progress: Progress,
    ) -> Written: ...


class CheckOutput(Protocol):
    """Checks the output before a long job. Raises OutputExistsError or StorageError if it cannot be written."""

    def __call__(self, path: Path, /, *, force: bool) -> None: ...


def read_only(model: Model, path: Path, /, **_: Any) -> Written:
    """Raise InvalidRequestError: the `Format.write` of a format without a writer."""
    raise InvalidRequestError(Problem("not_writable", "this format can only be read", str(path)))


@dataclass(frozen=True)
class Format:
    """A file format: functions to recognise a file, to open it and, optionally, to write it.

    `matches(path)` inspects a file's first bytes or a folder's content and must not raise for any input. `open(path)` validates
    the file and returns a lazy model; it raises InvalidFileError with every problem found.

    `check_output` is called before the long job that ends with `write`. The default is for single files; folder formats use
    `check_output_folder` of `cluscomp_formats.files.atomic_folder`. `size(model)` returns an upper bound of the bytes that
    `write` makes of a model with its self-test record, without reading payloads; the option `budget` requires it.

    `check_model(model)` checks the configuration and shapes of a model before the job; it raises UnsupportedError or
    InvalidFileError. `notes(model)` lists what `write` omits or stores differently than requested; it may raise the errors of
    `write`.
    """

    name: str
    description: str
    matches: Callable[[Path], bool]
    open: Callable[[Path], Model]
    write: WriteModel = read_only
    check_output: CheckOutput = check_output
    size: Callable[[Model], int] | None = None
    check_model: Callable[[Model], object] = lambda model: None
    notes: Callable[[Model], Sequence[str]] = lambda model: ()

    @property
    def writable(self) -> bool:
        """Whether the format has a writer."""
        return self.write is not read_only
