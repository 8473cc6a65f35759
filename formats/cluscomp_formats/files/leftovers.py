"""Find and remove the temporary files and folders of killed writers.

A running writer holds a lock on its temporary file or folder, and the system releases the lock when the process ends for any
reason. A temporary that can be locked is therefore abandoned. Process ids would not be reliable: they are reused, and processes
in containers often have the same ids.

Nothing else is touched. A temporary is named `.OUTPUT.cluscomp-PID-MARK.part`. MARK is a hash of the output's name and the
process, which no other file has by chance. OUTPUT is cut to `SHOWN_BYTES`, so that the temporary's name fits the file system if
the output's name does.
"""

from __future__ import annotations

import contextlib
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
    "locked",
    "old_name",
    "restore_old_folder",
    "shown_name",
    "try_lock",
    "unfinished_name",
]

SHOWN_BYTES = 80
"""Bytes of an output's name in names derived from it. File systems allow 255 bytes, encrypted ones 143."""

_OURS = re.compile(r"\.(.*)\.cluscomp-([0-9]+)-([0-9a-f]{16})\.(part|old)", re.DOTALL | re.ASCII)


def unfinished_name(output: Path) -> Path:
    """Return the temporary path for `output`, in the same folder, because renames are atomic only within a file system."""
    return output.with_name(f".{shown_name(output)}.cluscomp-{os.getpid()}-{_mark(output, str(os.getpid()))}.part")


def old_name(output: Path) -> Path:
    """Return the path to which the folder that `output` replaces is moved. A folder with this name is complete."""
    return unfinished_name(output).with_suffix(".old")


def shown_name(output: Path) -> str:
    """Return the output's name, cut to `SHOWN_BYTES`."""
    name = os.fsencode(output.name)
    return output.name if len(name) <= SHOWN_BYTES else name[:SHOWN_BYTES].decode("utf-8", "ignore")


def _mark(output: Path, process: str) -> str:
    """Return the mark of a writer's temporaries, 16 hexadecimal digits."""
    # Imported here: it loads OpenSSL, and a model is loaded without it.
    import hashlib

    return hashlib.sha256(b"\0".join((b"cluscomp-export", os.fsencode(output.name), process.encode()))).hexdigest()[:16]


def try_lock(path: Path) -> int | None:
    """Lock a file or folder. Return a handle, to be closed with `os.close`, or None if the system has no such locks.

    Raises BlockingIOError if another process has the lock; other OSErrors if `path` cannot be opened or is a symbolic link.
    """
    if sys.platform == "win32":
        return None
    import fcntl

    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(handle), path.lstat()):
            raise BlockingIOError(f"{path} was replaced while it was locked")
    except BlockingIOError:
        os.close(handle)
        raise
    except OSError:
        # Some network file systems do not support locks.
        os.close(handle)
        return None
    return handle


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Lock a file or folder during the block, even if it is renamed.

    Raises BlockingIOError if another process has the lock.
    """
    handle = try_lock(path)
    try:
        yield
    finally:
        if handle is not None:
            os.close(handle)


def restore_old_folder(folder: Path) -> None:
    """Give a folder its name back if a killed writer had moved it aside. Never raises."""
    for path, kind in _leftovers(folder):
        if kind == "old" and not os.path.lexists(folder):
            with contextlib.suppress(OSError), _abandoned(path, stat.S_ISDIR):
                path.rename(folder)


def clear_leftovers(output: Path, *, folder: bool) -> None:
    """Remove the temporaries of killed writers of `output`, a file or a `folder`.

    Touches nothing else, and nothing that cannot be locked. Never raises; what cannot be removed stays.
    """
    for path, kind in _leftovers(output):
        # A folder that was moved aside is the only copy until another folder has its name.
        if kind == "part" or (folder and os.path.lexists(output)):
            with contextlib.suppress(OSError), _abandoned(path, stat.S_ISDIR if folder else stat.S_ISREG):
                if folder:
                    discard_folder(path, path.with_suffix(".part"))
                else:
                    path.unlink()


def _leftovers(output: Path) -> Iterator[tuple[Path, str]]:
    """Yield the temporaries of writers of `output`, and whether each is a `part` or `old`."""
    with contextlib.suppress(OSError, ValueError):
        # `.part` comes before `.old`, which may be renamed to it.
        for path in sorted(output.parent.iterdir(), reverse=True):
            match = _OURS.fullmatch(path.name)
            if match is not None and (match[1], match[3]) == (shown_name(output), _mark(output, match[2])):
                yield path, match[4]


@contextlib.contextmanager
def _abandoned(path: Path, kind: Callable[[int], bool]) -> Iterator[None]:
    """Lock a temporary of this kind during the block. Raises OSError if another process has the lock."""
    if not kind(path.lstat().st_mode):
        raise FileNotFoundError(f"{path} is of another kind")
    handle = try_lock(path)
    if handle is None:
        raise BlockingIOError(f"{path} cannot be locked")
    try:
        yield
    finally:
        os.close(handle)


def discard_folder(path: Path, unfinished: Path) -> None:
    """Delete a folder, after renaming it to `unfinished`, since a name ending in `.old` means that it is complete."""
    if path != unfinished:
        path.rename(unfinished)
    shutil.rmtree(unfinished, ignore_errors=True)
