"""Predicted and real peak memory of every phase of a conversion: `python benchmarks/memory.py [MODEL ...]`. Linux only.

Every phase runs in a process of its own, on what the phases before it have finished (a work folder); reported is the peak of
its resident memory over what was resident when it began, all libraries warm. The prediction is that of `convert --dry-run`.
Checked: no phase needs more than predicted. Sizes are in MB = 10^6 bytes.

Beside the models given, synthetic ones are measured. The blocks of a model are alike, so these have one or two, as wide as
those of models many times larger.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from measuring import forget_peak, peak_resident_bytes, resident_bytes
from synthetic_model import llama_config, write_model

from cluscomp_export.calibration.activations import (
    calibration_tokens,
    calibration_windows,
    channel_second_moments,
    shipped_text,
)
from cluscomp_export.calibration.fisher import WINDOWS
from cluscomp_export.calibration.row_importance import row_importance
from cluscomp_export.cli.terminal import print_table, say
from cluscomp_export.compression.fit_encode import Computing
from cluscomp_export.compression.jobs import Jobs
from cluscomp_export.compression.pipeline import BlockByBlock, compress
from cluscomp_export.conversion.convert import ConversionOptions, Prepared, convert, prepare
from cluscomp_export.conversion.effort import phases_of
from cluscomp_export.conversion.finite_values import scan_source
from cluscomp_export.conversion.memory import Peak, conversion_memory
from cluscomp_export.conversion.options import Effort
from cluscomp_export.conversion.output_format import output_format
from cluscomp_export.training import RecoveryOptions, TrainableModel, recover
from cluscomp_export.training.blockwise import BlockwiseOptions
from cluscomp_export.work_folder import WorkFolder, work_path
from cluscomp_formats.ir import AnyArray, Model
from cluscomp_formats.packed import open_packed
from cluscomp_formats.progress import silent
from cluscomp_runtime.memory import return_freed_arrays
from cluscomp_runtime.selftest import make_self_test

STORIES = Path(__file__).parent.parent / "tests" / "data" / "stories260K"
EFFORTS: tuple[Effort, ...] = ("fast", "best")
CONVERSION = "0" * 16
"""Fingerprint of the work, of which each process does a part."""

SYNTHETIC = {
    "1B": llama_config(2048, 5632, 2, 32, 4, 8192),
    "narrow, wide inside": llama_config(768, 4096, 1, 12, 12, 2048),
    "untied": llama_config(3072, 4096, 1, 24, 8, 16384, tie_word_embeddings=False),
}
"""The first has the blocks of TinyLlama-1.1B; the tokenizer is that of a small model."""

SETTINGS: dict[str, dict[str, Any]] = {
    "a codebook each": {"dim": 8, "clusters": 1024, "effort": "balanced"},
    "shared by kind": {"dim": 8, "clusters": 1024, "effort": "balanced", "share": "kind"},
}
"""Few clusters, for the sake of time; `benchmarks/kmeans.py` has the full number."""


@dataclass
class Stand:
    """What a phase works on: the source, its plan, and the work done so far."""

    path: Path
    output: Path
    options: ConversionOptions
    windows: int
    context: int
    prepared: Prepared
    work: WorkFolder

    def calibration(self, windows: int) -> torch.Tensor:
        return calibration_windows(calibration_tokens(self.prepared.source, shipped_text()), windows, self.context)

    def moments(self) -> Mapping[str, AnyArray] | None:
        source = self.prepared.source
        shapes = {name: ("float32", (tensor.shape[1],)) for name, tensor in source.tensors.items() if len(tensor.shape) == 2}
        return self.work.load("energies", shapes)

    def compressed(self, tuning: BlockwiseOptions | None = None, *, block_by_block: bool = False) -> Model:
        """The compressed model; what the work folder has is not computed again."""
        prepared = self.prepared
        assert prepared.plan is not None
        blocks = BlockByBlock(self.calibration(self.windows), tuning=tuning) if block_by_block else None
        computing = Computing(threads=self.options.threads)
        moments = self.moments()
        return compress(
            prepared.source, prepared.plan, computing=computing, moments=moments, blocks=blocks, store=self.work
        ).model


def open_work(path: Path) -> WorkFolder:
    path.mkdir(exist_ok=True)
    work = WorkFolder(path)
    work.begin(CONVERSION)
    return work


def feedback_path(output: Path) -> Path:
    return output.with_name("feedback")


def codebooks_of(stand: Stand, path: Path) -> WorkFolder:
    """A work folder with the codebooks of another alone: both ways to choose codes keep them under the same names."""
    work = open_work(path)
    assert stand.prepared.plan is not None
    for book in stand.prepared.plan.codebooks:
        specs = {"centroids": (book.dtype, (book.num_clusters, book.cluster_dim)), "step": ("float32", (1,))}
        arrays = stand.work.load(f"codebook {book.name}", specs)
        assert arrays is not None, f"{book.name} has not been fitted"
        work.save(f"codebook {book.name}", arrays)
    return work


def check(stand: Stand) -> None:
    scan_source(stand.prepared.source, stand.path)


def calibrate(stand: Stand) -> None:
    # Second moments of more windows than are run at a time take longer, not more memory.
    stand.work.save("energies", channel_second_moments(stand.prepared.source, stand.calibration(stand.windows)))


def weigh_rows(stand: Stand) -> None:
    row_importance(stand.prepared.source, stand.calibration(WINDOWS))


def fit(stand: Stand) -> None:
    """The jobs that `compress` runs first, one after the other."""
    plan, computing = stand.prepared.plan, Computing(threads=stand.options.threads)
    assert plan is not None
    jobs = Jobs(stand.prepared.source, plan, stand.moments() or {})
    for book in plan.codebooks:
        stand.work.save(f"codebook {book.name}", jobs.fit(book, computing).run())


def encode(stand: Stand) -> None:
    stand.compressed()


def encode_with_feedback(stand: Stand) -> None:
    stand.compressed(block_by_block=True)


def tune(stand: Stand) -> None:
    """On codes that are there: the blocks are run, but nothing is encoded."""
    stand.compressed(BlockwiseOptions(epochs=1), block_by_block=True)


def train(stand: Stand) -> None:
    token_ids = calibration_tokens(stand.prepared.source, shipped_text())
    recover(TrainableModel(stand.compressed()), stand.prepared.source, token_ids, RecoveryOptions(steps=2, checks=1))


def write(stand: Stand) -> None:
    output_format(stand.options.to).write(stand.compressed(), stand.output, force=True, self_test=None, on_progress=silent)


def self_test(stand: Stand) -> None:
    make_self_test(open_packed(stand.output))


PHASES: dict[str, Callable[[Stand], None]] = {
    "checking the source": check,
    "calibration": calibrate,
    "row importance": weigh_rows,
    "fitting codebooks": fit,
    "choosing codes": encode,
    "error feedback": encode_with_feedback,
    "block-wise tuning": tune,
    "recovery": train,
    "writing": write,
    "self-test": self_test,
}


def predictions(stand: Stand) -> dict[str, Peak]:
    """The model's peaks by phase, both ways to choose codes among them."""
    prepared = stand.prepared
    peaks: dict[str, Peak] = {}
    for effort in EFFORTS:
        found = conversion_memory(
            prepared.source,
            prepared.model,
            prepared.plan,
            output_bytes=prepared.sizes.payload_bytes,
            calibrated=True,
            phases=phases_of(ConversionOptions(effort=effort)),
            windows=stand.windows,
            context=stand.context,
        )
        peaks |= {peak.phase: peak for peak in found}
    return peaks


def run_phase(phase: str, stand: Stand) -> int:
    """Bytes the phase adds to this process at most."""
    calibration_tokens(stand.prepared.source, shipped_text())
    forget_peak()
    before = resident_bytes()
    PHASES[phase](stand)
    return peak_resident_bytes() - before


def warm_up(folder: Path) -> None:
    """Load and use every library once, on a model of a quarter of a million weights."""
    convert(STORIES, folder / "warm.clus", ConversionOptions(bits=4, effort="balanced"), force=True)
    torch.ones(512, 512) @ torch.ones(512, 512)
    torch.linalg.cholesky(torch.eye(256, dtype=torch.float64))


def child(request: dict[str, Any]) -> None:
    return_freed_arrays()
    path, output = Path(request["source"]), Path(request["output"])
    options = ConversionOptions(**request["options"])
    warm_up(output.parent)
    stand = Stand(
        path, output, options, request["windows"], request["context"], prepare(path, options), open_work(work_path(output))
    )
    if request["phase"] == "error feedback":
        stand = replace(stand, work=codebooks_of(stand, feedback_path(output)))
    elif request["phase"] == "block-wise tuning":
        stand = replace(stand, work=open_work(feedback_path(output)))
    expected = predictions(stand)[request["phase"]]
    started = time.perf_counter()
    measured = run_phase(request["phase"], stand)
    result = {"predicted": expected.host, "measured": measured, "seconds": time.perf_counter() - started}
    print(json.dumps(result))


def measure(
    name: str, source: Path, settings: str, phases: list[str], windows: int, context: int, folder: Path
) -> list[dict[str, Any]]:
    rows = []
    output = folder / "output.clus"
    for phase in phases:
        request = {
            "phase": phase,
            "source": str(source),
            "output": str(output),
            "windows": windows,
            "context": context,
            "options": {**SETTINGS[settings], "threads": 1},
        }
        command = [sys.executable, __file__, "--child", json.dumps(request)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        row = {"model": name, "settings": settings, "phase": phase, **json.loads(done.stdout)}
        say(json.dumps(row))
        rows.append(row)
    for work in (work_path(output), feedback_path(output)):
        shutil.rmtree(work, ignore_errors=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="*", help="models to measure beside the synthetic ones")
    parser.add_argument("--synthetic", nargs="*", default=list(SYNTHETIC), choices=list(SYNTHETIC), help="[default: all]")
    parser.add_argument("--settings", nargs="*", default=list(SETTINGS), choices=list(SETTINGS), help="[default: all]")
    parser.add_argument("--phases", nargs="*", default=list(PHASES), choices=list(PHASES), help="[default: all]")
    parser.add_argument("--windows", type=int, default=4, help="windows of error feedback (default 4)")
    parser.add_argument("--context", type=int, default=512, help="tokens of a window (default 512)")
    parser.add_argument("--json", action="store_true", help="print one JSON list")
    parser.add_argument("--folder", type=Path, help="where the files go (default: a temporary folder)")
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child)
        return
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    rows = []
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        models = {path.stem: path for path in options.models}
        for model in options.synthetic:
            models[model] = folder / model
            models[model].mkdir()
            write_model(models[model], SYNTHETIC[model])
            for file in ("tokenizer.json", "tokenizer_config.json"):
                if (STORIES / file).is_file():
                    shutil.copy(STORIES / file, models[model])
        for model, source in models.items():
            for settings in options.settings:
                rows += measure(model, source, settings, options.phases, options.windows, options.context, folder)
    if options.json:
        print(json.dumps(rows, indent=1))
    else:
        header = ("model", "settings", "phase", "predicted", "measured", "ratio")
        megabytes = [(f"{row['predicted'] / 1e6:.0f}", f"{row['measured'] / 1e6:.0f}") for row in rows]
        ratios = [f"{row['predicted'] / max(1, row['measured']):.2f}" for row in rows]
        names = [(row["model"], row["settings"], row["phase"]) for row in rows]
        print_table(header, [(*a, *b, c) for a, b, c in zip(names, megabytes, ratios, strict=True)])
    exceeded = [row for row in rows if row["measured"] > row["predicted"]]
    if exceeded:
        sys.exit(f"{len(exceeded)} phases need more than predicted")


if __name__ == "__main__":
    main()
