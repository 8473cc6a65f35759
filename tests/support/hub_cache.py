"""The layout of the cache of the Hugging Face Hub."""

from __future__ import annotations

import shutil
from pathlib import Path


def hub_cache(folder: Path, repository: Path) -> Path:
    """Move a model's files into `repository` as the Hub's cache keeps them: its snapshot, of links to `blobs`."""
    snapshot = repository / "snapshots" / "0a1b2c"
    (repository / "blobs").mkdir(parents=True)
    for number, file in enumerate(sorted(path for path in folder.rglob("*") if path.is_file())):
        blob = repository / "blobs" / f"{number:064x}"
        shutil.move(file, blob)
        link = snapshot / file.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(Path(*[".."] * len(link.relative_to(repository).parent.parts)) / "blobs" / blob.name)
    return snapshot
