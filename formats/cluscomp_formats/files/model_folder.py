"""Read files of a model's folder that are copied to the output, without following links out of the folder.

An untrusted folder may contain links. A link to a private file of the user would copy that file into the output, which the user
may then publish. Weights may be links to another disk: they are numbers that must fit the model.
"""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from cluscomp_formats.errors import InvalidFileError, Problem
from cluscomp_formats.files.regular_file import MAX_JSON_BYTES, read_whole

__all__ = ["read_inside"]


def read_inside(folder: Path, name: str, most: int = MAX_JSON_BYTES, remedy: str | None = None) -> bytes:
    """Return the content of a file in the folder, of at most `most` bytes.

    The file may be a link within the folder or, as in the cache of the Hugging Face Hub, a link from `snapshots/REVISION` to
    `blobs` next to `snapshots`. Raises InvalidFileError if a link leads elsewhere; otherwise as `read_whole`.
    """
    path = folder / name
    if not _stays(folder, path):
        message, target = "a link that leads out of the model's folder", os.path.realpath(path)
        found, expected = f"a link to {target}", "a file, or a link within the folder or the Hub's cache"
        # Users may paste the command into a shell, and the names are untrusted.
        copy = shlex.join(["cp", "--remove-destination", target, str(path)])
        is_file = os.path.isfile(target)  # noqa: PTH113 - Path.is_file raises
        advice = f"if it belongs to the model, put the file in place of the link: {copy}" if is_file else "remove the link"
        raise InvalidFileError(Problem("foreign_link", message, str(path), None, found, expected, advice))
    return read_whole(path, most, remedy)


def _stays(folder: Path, path: Path) -> bool:
    try:
        home, real = (Path(os.path.realpath(each)) for each in (folder, path))
    except (OSError, ValueError):
        # The name is invalid; reading the file reports that.
        return True
    snapshots = next((parent for parent in (home, *home.parents) if parent.name == "snapshots"), None)
    return real.is_relative_to(home) or (snapshots is not None and real.parent == snapshots.with_name("blobs"))
