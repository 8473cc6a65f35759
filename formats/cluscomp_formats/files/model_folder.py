"""Files of a model's folder that become a part of what is made of it: none may come from elsewhere.

A folder from a stranger may hold links. One that leads to a private file of the user would put that into the artefact, which
the user then passes on. Weights may lie elsewhere, on a larger disk: they are numbers that fit the model or are refused.
"""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from cluscomp_formats.errors import InvalidFileError, Problem
from cluscomp_formats.files.regular_file import MAX_JSON_BYTES, read_whole

__all__ = ["read_inside"]


def read_inside(folder: Path, name: str, most: int = MAX_JSON_BYTES, remedy: str | None = None) -> bytes:
    """The content of a file of the folder, of at most `most` bytes.

    It may be a link within the folder or, as in the cache of the Hugging Face Hub, from `snapshots/REVISION` to `blobs` beside
    `snapshots`. Raises InvalidFileError for a link that leads elsewhere, and what `read_whole` raises.
    """
    path = folder / name
    if not _stays(folder, path):
        message, target = "a link that leads out of the model's folder", os.path.realpath(path)
        found, expected = f"a link to {target}", "a file, or a link within the folder or the Hub's cache"
        # People paste it into a shell, and the names are a stranger's.
        copy = shlex.join(["cp", "--remove-destination", target, str(path)])
        is_file = os.path.isfile(target)  # noqa: PTH113 - Path.is_file raises
        advice = f"if it belongs to the model, put the file in place of the link: {copy}" if is_file else "remove the link"
        raise InvalidFileError(Problem("foreign_link", message, str(path), None, found, expected, advice))
    return read_whole(path, most, remedy)


def _stays(folder: Path, path: Path) -> bool:
    try:
        home, real = (Path(os.path.realpath(each)) for each in (folder, path))
    except (OSError, ValueError):
        # A name no system takes; to read it says so.
        return True
    snapshots = next((parent for parent in (home, *home.parents) if parent.name == "snapshots"), None)
    return real.is_relative_to(home) or (snapshots is not None and real.parent == snapshots.with_name("blobs"))
