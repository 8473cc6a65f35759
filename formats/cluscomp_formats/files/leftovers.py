"""What killed writers leave beside their output: told from the work of living ones, and cleared away.

While a writer lives, it holds a lock on its temporary file or folder, which the system gives up with the process, however that
ends. A temporary that can be locked is therefore nobody's any more. Process ids would not tell: they are used again, and in
containers they are all alike.

Nothing else is ever touched. A temporary is called `.OUTPUT.cluscomp-PID-MARK.part`; the mark is a hash of the output's name
and the process, which no file of somebody else has by chance, and is there from the moment the temporary is. Of the output's
name `SHOWN_BYTES` are kept, so that the temporary's fits wherever that does.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import stat
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

__all__ = [
    "SHOWN_BYTES",
    "clear_leftovers",
    "discard_folder",
    "held",
    "old_name",
    "put_back",
    "shown_name",
    "try_lock",
    "unfinished_name",
]

SHOWN_BYTES = 80
"""Of an output's name in those made from it. File systems take 255, encrypted ones 143."""

_OURS = re.compile(r"\.(.*)\.cluscomp-([0-9]+)-([0-9a-f]{16})\.(part|old)", re.DOTALL | re.ASCII)


def unfinished_name(output: Path) -> Path:
    """Where this process makes `output`: in the same folder, since only a rename within one file system is atomic."""
    return output.with_name(f".{shown_name(output)}.cluscomp-{os.getpid()}-{_mark(output, str(os.getpid()))}.part")


def old_name(output: Path) -> Path:
    """Where this process moves the folder that `output` replaces. It is complete as long as it has this name."""
    return unfinished_name(output).with_suffix(".old")


def shown_name(output: Path) -> str:
    """The output's name, cut to `SHOWN_BYTES`."""
    name = os.fsencode(output.name)
    return output.name if len(name) <= SHOWN_BYTES else name[:SHOWN_BYTES].decode("utf-8", "ignore")


def _mark(output: Path, process: str) -> str:
    """What only a writer of ours calls its temporaries by, 16 hexadecimal digits."""
    return hashlib.sha256(b"\0".join((b"cluscomp-export", os.fsencode(output.name), process.encode()))).hexdigest()[:16]


def try_lock(path: Path) -> int | None:
    """Lock a file or folder; a handle, to be closed with `os.close`, or None where the system has no such locks.

    Raises BlockingIOError if somebody else has the lock; other OSErrors if `path` cannot be opened or is a symbolic link.
    """
    if sys.platform == "win32":
        return None
    import fcntl

    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(handle), path.lstat()):
            raise BlockingIOError(f"{path} was replaced meanwhile")
    except BlockingIOError:
        os.close(handle)
        raise
    except OSError:
        # A file system without locks, as some network file systems are.
        os.close(handle)
        return None
    return handle


@contextlib.contextmanager
def held(path: Path) -> Iterator[None]:
    """Mark a file or folder as being worked on until the block ends, under whatever name it is then.

    Raises BlockingIOError if somebody else works on it.
    """
    handle = try_lock(path)
    try:
        yield
    finally:
        if handle is not None:
            os.close(handle)


def put_back(folder: Path) -> None:
    """Give a folder its name back that a killed writer had moved aside to replace it. Never raises."""
    for path, kind in _leftovers(folder):
        if kind == "old" and not os.path.lexists(folder):
            with contextlib.suppress(OSError), _abandoned(path, stat.S_ISDIR):
                path.rename(folder)


def clear_leftovers(output: Path, *, folder: bool) -> None:
    """Remove unfinished attempts at `output`, a file or a `folder`, whose writers are gone.

    Touches nothing else, and nothing at all that cannot be locked. Never raises: what cannot be cleared stays.
    """
    for path, kind in _leftovers(output):
        # A folder moved aside is the only copy until another has its name.
        if kind == "part" or (folder and os.path.lexists(output)):
            with contextlib.suppress(OSError), _abandoned(path, stat.S_ISDIR if folder else stat.S_ISREG):
                if folder:
                    discard_folder(path, path.with_suffix(".part"))
                else:
                    path.unlink()


def _leftovers(output: Path) -> Iterator[tuple[Path, str]]:
    """What bears the mark of a writer of `output`, and whether it is a `part` or `old`."""
    with contextlib.suppress(OSError, ValueError):
        # `.part` before `.old`, which may need its name.
        for path in sorted(output.parent.iterdir(), reverse=True):
            match = _OURS.fullmatch(path.name)
            if match is not None and (match[1], match[3]) == (shown_name(output), _mark(output, match[2])):
                yield path, match[4]


@contextlib.contextmanager
def _abandoned(path: Path, kind: Callable[[int], bool]) -> Iterator[None]:
    """Hold a lock on something of that kind which nobody holds. Raises OSError."""
    if not kind(path.lstat().st_mode):
        raise FileNotFoundError(f"{path} is something else")
    handle = try_lock(path)
    if handle is None:
        raise BlockingIOError(f"{path} cannot be locked")
    try:
        yield
    finally:
        os.close(handle)


def discard_folder(path: Path, unfinished: Path) -> None:
    """Delete a folder that may be whole, under a name that says that it no longer is."""
    if path != unfinished:
        path.rename(unfinished)
    shutil.rmtree(unfinished, ignore_errors=True)
