"""What may lie where a file is expected."""

from __future__ import annotations

import os
import socket
from pathlib import Path


def place(path: Path, what: str) -> Path:
    """Something at `path` that is no small regular file."""
    target = path.with_name("target")
    if what == "folder":
        path.mkdir()
    elif what == "pipe":
        os.mkfifo(path)
    elif what == "link to a pipe":
        os.mkfifo(target)
        path.symlink_to(target)
    elif what == "socket":
        listener = socket.socket(socket.AF_UNIX)
        here = Path.cwd()
        try:
            # The name of a socket is short.
            os.chdir(path.parent)
            listener.bind(path.name)
        finally:
            os.chdir(here)
            listener.close()
    elif what == "device":
        path.symlink_to("/dev/zero")
    elif what == "dangling link":
        path.symlink_to("nothing")
    elif what == "loop":
        path.symlink_to(path)
    elif what == "sparse file":
        path.touch()
        os.truncate(path, 1 << 40)
    return path
