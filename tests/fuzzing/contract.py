"""What every reader owes whoever opens a file of unknown origin, and a run of a reader that holds it to that.

A hostile file may be refused with a `ClusCompError` and nothing else, within bounded time, with memory in proportion to its
size, and without any file outside its folder being opened. What is printed about it cannot steer a terminal.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import sys
import sysconfig
import tracemalloc
import unicodedata
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

from cluscomp_formats.errors import ClusCompError, InvalidFileError, StorageError, UnsupportedError

BYTES_PER_BYTE = 96
"""Memory a reader may take per byte of the file. `[],` costs Python's JSON 21 times its length, twice while held against its
canonical form, and codes grow 16 times when unpacked."""
SPARE_BYTES = 4 << 20
"""Memory a reader may take whatever the size of the file."""
SPARE_NATIVE_BYTES = 1 << 30
"""The same for what is allocated outside of Python, by the address space; threads reserve most of it."""
SECONDS = 60
"""A small file that takes longer hangs; a busy machine does not."""


class ViolationError(AssertionError):
    """A file made a reader break the contract."""


class _HangError(BaseException):
    """The time is over. No Exception, so that nothing catches it."""


def hold_to_contract(consume: Callable[[Path], None], path: Path, folder: Path, *, alarm: bool = True) -> str:
    """Run `consume(path)`; what it came to: "sound" or the kind of the first problem.

    `path` is in `folder`, the only one whose files may be opened. Without `alarm` a hang is for the caller to notice. Raises
    ViolationError.
    """
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    tracemalloc.start()
    try:
        with _address_space(SPARE_NATIVE_BYTES), _time_limit(SECONDS if alarm else 0), _watched(folder) as opened:
            outcome = _outcome(consume, path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    if opened:
        raise ViolationError(f"files outside the folder were opened: {opened}")
    if peak > SPARE_BYTES + BYTES_PER_BYTE * size:
        raise ViolationError(f"{peak} bytes of memory for {size} bytes of files")
    return outcome


def _outcome(consume: Callable[[Path], None], path: Path) -> str:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            # What the runtime announces is no fault.
            warnings.filterwarnings("ignore", message=".*which no kernel supports|the native path supports no")
            consume(path)
    except (InvalidFileError, UnsupportedError, StorageError) as error:
        check_printable(error)
        return error.problems[0].kind
    except ClusCompError as error:
        # What a request comes to, such as a prompt that the model's template refuses: an answer, but not of a reader.
        check_printable(error)
        return f"{type(error).__name__}: {error.problems[0].kind}"
    except _HangError:
        raise ViolationError(f"no end after {SECONDS} seconds") from None
    except BaseException as error:
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        raise ViolationError(f"{type(error).__name__}: {str(error)[:500]!a}") from error
    return "sound"


def check_printable(error: ClusCompError) -> None:
    """Raise ViolationError if the message holds what a stream cannot encode or a terminal would obey."""
    bad = {c for c in str(error) if c != "\n" and unicodedata.category(c) in ("Cc", "Cs")}
    if bad:
        raise ViolationError(f"the message holds {bad!a}: {str(error)[:500]!a}")


class _Watch:
    """Notes every file Python opens outside a folder. Native code opens files unseen."""

    def __init__(self) -> None:
        self.folder: str | None = None
        self.opened: list[str] = []
        # Modules imported late, and what libraries ask of the system, name no file of the user's.
        roots = {
            "/proc",
            "/sys",
            # Where processes of their own leave what they have nothing to do with.
            os.devnull,
            *sys.path,
            sys.prefix,
            sys.base_prefix,
            sysconfig.get_paths()["stdlib"],
            str(Path(__file__).parents[2]),
        }
        self._own = tuple(str(Path(root).resolve()) for root in roots if root)
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.folder is None or event not in ("open", "os.listdir", "os.scandir", "os.remove", "os.rename", "os.mkdir"):
            return
        name = arguments[0]
        if not isinstance(name, (str, bytes, os.PathLike)):
            return
        path = os.path.abspath(os.fsdecode(name))  # noqa: PTH100 - Path.absolute keeps ".."
        inside = path == self.folder or path.startswith(self.folder + os.sep)
        imported = event in ("open", "os.listdir") and path.startswith(self._own)
        if not inside and not imported:
            self.opened.append(f"{event} {path}")


_watch: list[_Watch] = []


@contextlib.contextmanager
def _watched(folder: Path) -> Iterator[list[str]]:
    if not _watch:
        # An audit hook stays as long as the process.
        _watch.append(_Watch())
    watch = _watch[0]
    watch.opened, watch.folder = [], os.path.abspath(folder)  # noqa: PTH100
    try:
        yield watch.opened
    finally:
        watch.folder = None


@contextlib.contextmanager
def _address_space(spare: int) -> Iterator[None]:
    """Let the process grow by `spare` bytes at most, where the system can (Linux)."""
    if not sys.platform.startswith("linux"):
        yield
        return
    used = psutil.Process().memory_info().vms
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + spare, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@contextlib.contextmanager
def _time_limit(seconds: int) -> Iterator[None]:
    if not seconds:
        yield
        return

    def stop(*_: object) -> None:
        raise _HangError

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
