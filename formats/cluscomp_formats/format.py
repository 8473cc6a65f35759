"""What a format is: the one type that readers, writers and plug-ins are offered as; see `docs/plugins.md`."""

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
    """What a writer says it made: its size in bytes, and the model's digest, None if it made no codebook model."""

    @property
    def file_bytes(self) -> int: ...
    @property
    def digest(self) -> str | None: ...


class WriteModel(Protocol):
    """Writes a model to `path`, atomically and one payload at a time.

    `self_test` gets the model as opened from the finished payloads and gives the record to store; `on_progress` is told the
    phase ("writing"), the bytes done and the bytes in total. A model whose `claimed_digest` is not its digest must not become
    an artefact: `check_claim` of `cluscomp_formats.sections.digest` raises InvalidFileError. Raises OutputExistsError,
    StorageError, InvalidRequestError, UnsupportedError.
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
    """Refuses an output before any work. Raises OutputExistsError, StorageError."""

    def __call__(self, path: Path, /, *, force: bool) -> None: ...


def read_only(model: Model, path: Path, /, **_: Any) -> Written:
    """`Format.write` of a format that is only read. Raises InvalidRequestError."""
    raise InvalidRequestError(Problem("not_writable", "this format is only read", str(path)))


@dataclass(frozen=True)
class Format:
    """A way to store a model: how to recognise it, open it and, if `write` is given, write it.

    `matches(path)` looks at a file's first bytes or a folder's content and must not raise on any input. `open(path)`
    validates and returns a lazy model; it raises InvalidFileError with every problem found. `check_output` is called before
    the work of which `write` is the end; the default suits a single file, a folder has `check_output_folder` of
    `cluscomp_formats.files.atomic_folder`. `size(model)` predicts the bytes of what `write` makes of a model with that
    self-test record, at most, without reading its payloads; without it, `--budget` cannot be held in this format.

    `check_model(model)` refuses a model before the work, by its configuration and shapes; it raises UnsupportedError or
    InvalidFileError. `notes(model)` says what `write` leaves out or stores otherwise than asked; it may raise what `write`
    does before it writes.
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
        """Whether models can be written in this format."""
        return self.write is not read_only
