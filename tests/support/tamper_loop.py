"""Loses or damages one unit of work after the other and converts again: `tamper_loop.py SOURCE EFFORT [EVERY]`.

The units are those that a kill just before the output's renaming leaves. Every EVERYth is tampered with, in turns deleted, cut
and with a byte changed. Prints which conversions ended with other bytes.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from cluscomp_export.conversion.convert import ConversionOptions, convert
from cluscomp_export.conversion.options import Effort
from cluscomp_export.work_folder import WorkFolder, work_path
from cluscomp_formats.ir import AnyArray


@dataclass(frozen=True)
class Tampering:
    """How many units there were, which were tampered with, which of these changed the result, and units reused at least."""

    units: int
    tried: tuple[str, ...]
    wrong: tuple[str, ...]
    least_reused: int


def tamper(source: Path, folder: Path, options: ConversionOptions, every: int = 1, names: tuple[str, ...] = ()) -> Tampering:
    """Tamper with every `every`th unit, those called `names` included."""
    output, kept = folder / "model.clus", folder / "kept"
    files: dict[str, str] = {}
    save = WorkFolder.save

    def noted(work: WorkFolder, name: str, arrays: dict[str, AnyArray]) -> None:
        files[name] = work._file(name).name
        save(work, name, arrays)

    with mock.patch.object(WorkFolder, "save", noted), mock.patch.object(WorkFolder, "remove"):
        convert(source, output, options)
    work_path(output).rename(kept)
    wanted = output.read_bytes()
    chosen = [name for number, name in enumerate(sorted(files)) if number % every == 0 or name in names]
    wrong, reused = [], []
    for number, name in enumerate(chosen):
        output.unlink()
        shutil.copytree(kept, work_path(output))
        file = work_path(output) / files[name]
        content = bytearray(file.read_bytes())
        if number % 3 == 0:
            file.unlink()
        else:
            content[-1] ^= 1
            file.write_bytes(content if number % 3 == 1 else content[: len(content) // 2])
        reused.append(convert(source, output, options).reused)
        if output.read_bytes() != wanted:
            wrong.append(name)
    return Tampering(len(files), tuple(chosen), tuple(wrong), min(reused))


def options_for(effort: Effort, *, windows: int = 4, context: int = 128) -> ConversionOptions:
    """Few windows, and every phase of the effort; codebooks of their own, so that blocks are tuned."""
    phases: dict[str, Any] = {} if effort == "fast" else {"calibration_windows": windows}
    if effort == "best":
        phases |= {"recovery_steps": 2, "recovery_batch": 1, "recovery_context": 64}
    return ConversionOptions(bits=3, share="none", effort=effort, threads=1, calibration_context=context, **phases)


if __name__ == "__main__":
    every = int(sys.argv[3]) if len(sys.argv) > 3 else 1
    with tempfile.TemporaryDirectory() as temporary:
        found = tamper(Path(sys.argv[1]), Path(temporary), options_for(sys.argv[2]), every)  # type: ignore[arg-type]
    print(f"{sys.argv[2]}: {found.units} units, {len(found.tried)} lost or damaged, {len(found.wrong)} other models")
    print("\n".join(found.wrong))
