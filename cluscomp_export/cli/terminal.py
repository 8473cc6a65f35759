"""What the command line shows: progress bars and messages on standard error, tables and JSON on standard output."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from cluscomp_formats.errors import displayable, printable
from cluscomp_formats.files.atomic import atomic_write

__all__ = ["ProgressDisplay", "print_json", "print_table", "say", "show", "write_json"]


LINE_SECONDS = 60.0
"""Interval of progress lines where there is no terminal for bars: rare enough for a log."""
SPEED_SECONDS = 3600.0
"""How far back the estimate of the remaining time looks: steps of large models take minutes."""
EARLIEST_ESTIMATE = 0.05
"""Share of a phase that must be done before a line reports the remaining time."""


class ProgressDisplay:
    """One bar per phase of a long job; a line per minute where standard error is not a terminal.

    It is a `Progress`.
    """

    def __init__(self, prefix: str = "") -> None:
        self._prefix = prefix
        console = Console(stderr=True)
        columns = (
            # Names come from files: "[/]" is text, not markup.
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self._progress = Progress(
            *columns,
            console=console,
            transient=True,
            disable=not console.is_terminal,
            speed_estimate_period=SPEED_SECONDS,
            get_time=time.monotonic,
        )
        self._tasks: dict[str, TaskID] = {}
        self._told = time.monotonic()

    def __enter__(self) -> ProgressDisplay:
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._progress.stop()

    def __call__(self, phase: str, done: int, total: int) -> None:
        # "clustering q_proj" and "clustering k_proj" share a bar: only one of them runs at a time.
        key = phase.split(" ", 1)[0]
        if key not in self._tasks:
            self._tasks[key] = self._progress.add_task("", total=total)
        # Phases contain names from untrusted files.
        self._progress.update(self._tasks[key], description=printable(self._prefix + phase), completed=done, total=total)
        if self._progress.disable and total > 1 and time.monotonic() - self._told >= LINE_SECONDS:
            self._told = time.monotonic()
            left = next(task.time_remaining for task in self._progress.tasks if task.id == self._tasks[key])
            # Too early it misleads.
            about = f", about {max(1, round(left / 60))} min left" if left and done >= EARLIEST_ESTIMATE * total else ""
            say(printable(f"{self._prefix}{phase}: {done}/{total}{about}"))


def say(text: str) -> None:
    """Text on standard error, with control characters escaped."""
    show(text, err=True)


def show(text: str = "", *, end: str = "\n", raw: bool = False, err: bool = False) -> None:
    """Text on standard output. Control characters are escaped unless `raw`, as is what the stream cannot encode."""
    shown = (text if raw else displayable(text)) + end
    stream = sys.stderr if err else sys.stdout
    encoding = getattr(stream, "encoding", None) or "utf-8"
    # Not click.echo, which drops colours if the output is a pipe; `raw` keeps them.
    stream.write(shown.encode(encoding, "backslashreplace").decode(encoding))
    stream.flush()


def _json_document(value: Mapping[str, Any] | Sequence[Any]) -> str:
    """A JSON document, indented, with sorted keys."""
    return json.dumps(value, indent=2, sort_keys=True, default=str)


def print_json(value: Mapping[str, Any] | Sequence[Any]) -> None:
    """A JSON document on standard output, and nothing else there."""
    show(_json_document(value))


def write_json(path: Path, value: Mapping[str, Any], *, force: bool) -> None:
    """A JSON document in a file. Raises OutputExistsError, StorageError."""
    with atomic_write(path, force=force) as stream:
        stream.write(_json_document(value).encode() + b"\n")


def print_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """An aligned table on standard output."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for position, title in enumerate(header):
        table.add_column(title, justify="left" if position == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(Text(printable(str(cell))) for cell in row))
    # A pipe has no width: a table is cut on terminals only.
    console = Console()
    Console(width=None if console.is_terminal else 400).print(table)
