"""What a conversion has finished so far, kept beside its output until that is there: a rerun resumes from it.

Each unit of work, a name and some arrays, is a safetensors file of its own. It gets its name when it is complete, and is used
again only if it is undamaged and belongs to the same conversion: a SHA-256 in the file covers what the conversion is, the
unit's name and the arrays. Anything else is as good as absent, so a rerun can only be slower, never wrong.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cluscomp_export.store import ArraySpecs
from cluscomp_formats.errors import InvalidFileError, Problem, StorageError
from cluscomp_formats.files.atomic import storage_error
from cluscomp_formats.files.leftovers import shown_name, try_lock
from cluscomp_formats.ir import DTYPES, AnyArray
from cluscomp_formats.safetensors.mapped_shards import open_shard
from cluscomp_formats.safetensors.writer import header_bytes, lay_out
from cluscomp_formats.strict_json import canonical_json

__all__ = ["WorkFolder", "fingerprint", "work_folder", "work_path"]

_UNIT = re.compile(r"([0-9a-f]{16})-[0-9a-f]{32}\.(safetensors|part)")
_CHECKSUM = "sha256"
_CHECKSUM_SPEC = ("uint8", (32,))


def work_path(output: Path) -> Path:
    """Where the unfinished work of a conversion to `output` is kept."""
    # The name of "." is empty.
    output = Path(os.path.abspath(output))  # noqa: PTH100 - resolve() would follow links
    shown = shown_name(output)
    if shown != output.name:
        # A long name is cut, and must not be that of another output.
        shown += f".{hashlib.sha256(os.fsencode(output.name)).hexdigest()[:16]}"
    return output.parent / f".{shown}.work"


def fingerprint(conversion: Mapping[str, Any]) -> str:
    """What tells a conversion from others, 16 hexadecimal digits; `conversion` is a JSON object of all that determines it."""
    return hashlib.sha256(canonical_json(conversion).encode()).hexdigest()[:16]


class WorkFolder:
    """The finished units of one conversion. Get it from `work_folder`, then say by `begin` which conversion it is."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.conversion = ""
        self._saved: set[str] = set()
        self._sound: set[str] = set()
        self._loaded: set[str] = set()

    def begin(self, conversion: str) -> tuple[int, int]:
        """Keep the units of the conversion with this fingerprint, delete all others. How many were kept, and deleted.

        Raises StorageError.
        """
        self.conversion = conversion
        kept = deleted = 0
        for file, owner in self._files():
            if owner == conversion and file.suffix == ".safetensors":
                kept += 1
            else:
                _delete(file)
                deleted += file.suffix == ".safetensors"
        return kept, deleted

    def load(self, name: str, specs: ArraySpecs) -> dict[str, AnyArray] | None:
        """The arrays of a unit, None if it has not been finished, is damaged or holds other arrays than `specs`.

        Raises StorageError if it was sound before: what depends on it would not be what it was computed from.
        """
        arrays = self._read(name, specs)
        if arrays is None and name in self._sound:
            message, remedy = "a finished part is gone or was changed while it was needed", "run the same command again"
            raise StorageError(Problem("unit_changed", message, str(self._file(name)), remedy=remedy))
        if arrays is not None:
            self._loaded.add(name)
        return arrays

    def holds(self, name: str, specs: ArraySpecs) -> bool:
        """Whether a unit is there, undamaged and of these `specs`. Reads it the first time."""
        if name not in self._sound and self._read(name, specs) is not None:
            self._sound.add(name)
        return name in self._sound

    def discard(self, names: Iterable[str]) -> int:
        """Delete the units of these names that exist, and return how many there were. Raises StorageError."""
        found = [name for name in names if self._file(name).exists()]
        for name in found:
            _delete(self._file(name))
        self._sound.difference_update(found)
        self._loaded.difference_update(found)
        return len(found)

    def _read(self, name: str, specs: ArraySpecs) -> dict[str, AnyArray] | None:
        try:
            shard = open_shard(self._file(name))
            stored = {key: (entry.dtype, entry.shape) for key, entry in shard.entries.items()}
            if stored != _stored_specs(specs):
                return None
            arrays = {}
            for key, entry in shard.entries.items():
                content = shard.file.copy(shard.data_begin + entry.begin, entry.end - entry.begin)
                arrays[key] = np.frombuffer(content, dtype=DTYPES[entry.dtype]).reshape(entry.shape)
        except (InvalidFileError, StorageError, ValueError):
            return None
        checksum = arrays.pop(_CHECKSUM)
        if checksum.tobytes() != self._checksum(name, arrays):
            return None
        return {_array_name(key): values for key, values in arrays.items()}

    def save(self, name: str, arrays: Mapping[str, AnyArray]) -> None:
        """Save a finished unit. Raises StorageError."""
        stored = {_key(array): np.asarray(values, order="C") for array, values in arrays.items()}
        stored[_CHECKSUM] = np.frombuffer(self._checksum(name, stored), dtype=np.uint8)
        entries = lay_out({key: (values.dtype.name, values.shape) for key, values in stored.items()})
        file = self._file(name)
        unfinished = file.with_suffix(".part")
        try:
            # Synced before it has its name: else a machine that fails could keep what was computed from it, and not the unit.
            with unfinished.open("wb") as stream:
                stream.write(header_bytes(entries))
                for key in entries:
                    stream.write(stored[key].reshape(-1).view(np.uint8).data)
                stream.flush()
                os.fsync(stream.fileno())
            unfinished.replace(file)
        except OSError as error:
            raise storage_error(file, error) from error
        self._saved.add(name)
        self._sound.add(name)

    @property
    def started(self) -> bool:
        """Whether a unit was saved since this folder was opened."""
        return bool(self._saved)

    @property
    def reused(self) -> int:
        """Units of an earlier attempt that were used again."""
        return len((self._sound | self._loaded) - self._saved)

    @property
    def empty(self) -> bool:
        """Whether there is no unit."""
        return not any(file.suffix == ".safetensors" for file, _ in self._files())

    def holds_only(self, conversion: str) -> bool:
        """Whether every unit belongs to the conversion with this fingerprint."""
        return all(owner == conversion for _, owner in self._files())

    def stored_bytes(self) -> int:
        """Bytes of all units, also of other conversions. Raises StorageError."""
        try:
            return sum(file.stat().st_size for file, _ in self._files())
        except OSError as error:
            raise storage_error(self.path, error) from error

    def remove(self) -> None:
        """Delete the units, and the folder if there is nothing else in it."""
        with contextlib.suppress(OSError, StorageError):
            for file, _ in self._files():
                file.unlink()
            self.path.rmdir()

    def _file(self, name: str) -> Path:
        # Names of tensors are the source's: too long for a file, perhaps, or leading elsewhere.
        return self.path / f"{self.conversion}-{hashlib.sha256(name.encode()).hexdigest()[:32]}.safetensors"

    def _files(self) -> Iterator[tuple[Path, str]]:
        """Our own files, finished and not, with the fingerprint of their conversion. Raises StorageError."""
        try:
            files = sorted(entry.name for entry in os.scandir(self.path) if entry.is_file(follow_symlinks=False))
        except OSError as error:
            raise storage_error(self.path, error) from error
        for name in files:
            match = _UNIT.fullmatch(name)
            if match is not None:
                yield self.path / name, match[1]

    def _checksum(self, name: str, stored: Mapping[str, AnyArray]) -> bytes:
        specs = {key: [values.dtype.name, list(values.shape)] for key, values in stored.items()}
        checksum = hashlib.sha256(canonical_json([self.conversion, name, specs]).encode())
        for key in sorted(stored):
            checksum.update(stored[key].reshape(-1).view(np.uint8).data)
        return checksum.digest()


@contextlib.contextmanager
def work_folder(output: Path) -> Iterator[WorkFolder]:
    """The work folder of a conversion to `output`, made if need be, for this process alone.

    When the block succeeds, or has finished no unit, the folder is deleted; else it stays for the next attempt. Raises
    StorageError if the folder cannot be made, or another process works on the same output.
    """
    with _locked(work_path(output)) as work:
        try:
            yield work
            work.remove()
        finally:
            with contextlib.suppress(StorageError):
                if work.empty:
                    work.remove()


def remove_work(output: Path, conversion: str) -> None:
    """Delete what is left of the finished conversion to `output` that has this fingerprint. Raises StorageError."""
    with _locked(work_path(output)) as work:
        if work.holds_only(conversion):
            work.remove()


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[WorkFolder]:
    try:
        path.mkdir(exist_ok=True)
        lock = try_lock(path)
    except BlockingIOError as error:
        remedy = "wait until it is done, or write elsewhere"
        raise StorageError(Problem("busy", "another conversion to this output is running", str(path), remedy=remedy)) from error
    except OSError as error:
        raise storage_error(path, error) from error
    try:
        yield WorkFolder(path)
    finally:
        if lock is not None:
            os.close(lock)


def _delete(file: Path) -> None:
    try:
        file.unlink(missing_ok=True)
    except OSError as error:
        raise storage_error(file, error) from error


def _key(array: str) -> str:
    return f"array.{array}"


def _array_name(key: str) -> str:
    return key.removeprefix("array.")


def _stored_specs(specs: ArraySpecs) -> dict[str, tuple[str, tuple[int, ...]]]:
    # Stored as numpy holds it: bfloat16 as uint16.
    stored = {_key(array): (DTYPES[dtype].name, tuple(shape)) for array, (dtype, shape) in specs.items()}
    return {**stored, _CHECKSUM: _CHECKSUM_SPEC}
