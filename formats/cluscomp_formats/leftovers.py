"""What killed writers leave beside their output: told from the work of living ones, and cleared away.

While a writer lives, it holds a lock on its temporary file or folder, which the system gives up with the process, however that
ends. A temporary that can be locked is therefore nobody's any more. Process ids would not tell: they are used again, and in
containers they are all alike.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

__all__ = ["clear_leftovers", "discard_folder", "held", "old_name", "try_lock", "unfinished_name"]


def unfinished_name(output: Path) -> Path:
    """Where this process makes `output`: in the same folder, since only a rename within one file system is atomic."""
    return output.with_name(f".{output.name}.{os.getpid()}.part")


def old_name(output: Path) -> Path:
    """Where this process moves the folder that `output` replaces. It is complete as long as it has this name."""
    return output.with_name(f".{output.name}.{os.getpid()}.old")


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


def clear_leftovers(output: Path) -> None:
    """Remove unfinished attempts at `output` whose writers are gone; put back the folder one of them had moved aside.

    Touches nothing else, and nothing at all that cannot be locked. Never raises: what cannot be cleared stays.
    """
    ours = re.compile(re.escape(f".{output.name}.") + r"[0-9]+\.(part|old)")
    with contextlib.suppress(OSError):
        # `.part` before `.old`, which may need its name.
        for path in sorted(output.parent.iterdir(), reverse=True):
            match = ours.fullmatch(path.name)
            if match is not None:
                with contextlib.suppress(OSError):
                    _clear(path, output, whole=match[1] == "old")


def _clear(path: Path, output: Path, *, whole: bool) -> None:
    handle = try_lock(path)
    if handle is None:
        return
    try:
        if whole and path.is_dir() and not output.exists():
            path.rename(output)
        elif path.is_dir():
            discard_folder(path, path.with_suffix(".part"))
        elif not whole:
            path.unlink()
    finally:
        os.close(handle)


def discard_folder(path: Path, unfinished: Path) -> None:
    """Delete a folder that may be whole, under a name that says that it no longer is."""
    if path != unfinished:
        path.rename(unfinished)
    shutil.rmtree(unfinished, ignore_errors=True)
