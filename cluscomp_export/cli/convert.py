"""The commands `convert` and `plan`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cluscomp_export import api
from cluscomp_export.cli.messages import warn
from cluscomp_export.cli.options import (
    DEVICE,
    GGUF_TYPE,
    JSON,
    OUTPUT,
    PATH,
    PRECISIONS,
    RESOURCES,
    SCHEDULES,
    Decorator,
    OutputFormat,
    command,
    option,
)
from cluscomp_export.cli.terminal import ProgressDisplay, print_json, print_table, say, show, write_json

if TYPE_CHECKING:
    from cluscomp_export.conversion.plan_report import PlanReport

__all__ = ["convert", "plan"]

PLANNING = "Planning"
CALIBRATION = "Calibration and error feedback"
BLOCKWISE = "Block-wise tuning (with --effort balanced and best)"
RECOVERY = "Recovery: end-to-end distillation (with --effort best)"

_NEEDED_FIRST: tuple[Decorator[Any], ...] = (
    option("--bits", type=float, help="Most bits per weight of the linear layers, codebooks and scales counted. [default: 4]"),
    option(
        "--budget",
        metavar="SIZE",
        help="Most bytes of the whole artefact, embedding and head included: 16MB, 1.5GiB, ... Excludes --bits.",
    ),
    option(
        "--to",
        type=OutputFormat(),
        default="packed",
        show_default=True,
        help="The format to write: one .clus file, a Hugging Face folder, a GGUF file, an ONNX folder, or a plug-in's format.",
    ),
    GGUF_TYPE,
    option(
        "--effort",
        type=click.Choice(["fast", "balanced", "best"]),
        help="fast only clusters. balanced adds error feedback and block-wise tuning. best adds recovery: it trains "
        "codebooks, scales and norms end to end, which needs much longer. [default: balanced; fast with --dim]",
    ),
    option(
        "--calibration",
        metavar="FILE|none",
        help="Text to calibrate on. [default: a text of this package; none with --dim]",
    ),
)
_PLANNING = (
    option(
        "--match-loss",
        heading=PLANNING,
        type=float,
        metavar="NATS",
        help="The smallest artefact whose divergence from the source is at most this, in nats per token, as predicted on the "
        "calibration text, before error feedback and training. Excludes --bits.",
    ),
    option(
        "--plan",
        heading=PLANNING,
        type=PATH,
        metavar="FILE",
        help="Use a plan that `plan --save` wrote, edited or not. Excludes --bits.",
    ),
    option("--dim", heading=PLANNING, type=int, help="Weights per code, as in the paper; needs --clusters, excludes --bits."),
    option("--clusters", heading=PLANNING, type=int, help="Centroids per codebook, at most 65536; needs --dim."),
    option(
        "--share",
        heading=PLANNING,
        type=click.Choice(["none", "kind", "model"]),
        help="One codebook per matrix, per kind of matrix over all layers, or for the whole model. "
        "[default: none with --dim, otherwise whichever has the least expected error]",
    ),
    option(
        "--embedding-bits",
        heading=PLANNING,
        type=float,
        help="Most bits per weight of embedding and head; 16 keeps them dense. [default: 2.1 more than --bits, at least 4; at "
        "most their width in the source, which is the default with --dim]",
    ),
    option(
        "--codebook-bits",
        heading=PLANNING,
        type=click.Choice([8, 16]),
        help="Bits per value of a codebook: 8 for int8, 16 for float16. Codebooks without row scales always have 16. "
        "[default: whichever has the least expected error; 8 with --dim; 16 with recovery]",
    ),
    option(
        "--sensitivity",
        heading=PLANNING,
        type=click.Choice(["measured", "equal"]),
        help="Measure on the calibration text how much predictions suffer from errors in each tensor, and distribute bits "
        "accordingly; or treat all weights alike. [default: equal; measured with --match-loss]",
    ),
    option(
        "--optimize",
        heading=PLANNING,
        type=click.Choice(["size", "speed"]),
        help="What counts at a given size: size ignores the time for a token, speed prefers codebooks that are fast to look up "
        "in. [default: between them]",
    ),
    option(
        "--machine",
        heading=PLANNING,
        metavar="NAME",
        help="The machine whose time counts, and whose tokens per second are predicted: avx512, avx2, cortex-a78ae, orin, "
        "or this to measure here, once (docs/planning.md). [default: avx512]",
    ),
    option(
        "--method",
        heading=PLANNING,
        type=click.Choice(["fast", "lloyd"]),
        default="fast",
        show_default=True,
        help="The k-means variant. fast is at least as good, in a fraction of the time; lloyd is k-means as in the paper.",
    ),
    option("--seed", heading=PLANNING, type=int, default=0, show_default=True, help="The same seed produces the same bytes."),
)
_PHASES = (
    option(
        "--calibration-windows",
        heading=CALIBRATION,
        type=int,
        metavar="N",
        help="Number of calibration windows, spaced evenly through the text; used by every phase except recovery. "
        "[default: 64; best: 256]",
    ),
    option(
        "--calibration-context",
        heading=CALIBRATION,
        type=int,
        metavar="N",
        help="Tokens per calibration window. [default: 512, or the model's context if that is shorter]",
    ),
    option(
        "--feedback/--no-feedback",
        heading=CALIBRATION,
        default=None,
        help="Choose codes with error feedback, or take the nearest centroid. [default: depends on --effort]",
    ),
    option(
        "--blockwise-epochs",
        heading=BLOCKWISE,
        type=int,
        metavar="N",
        help="Epochs per block; 0 disables block-wise tuning. [default: 2]",
    ),
    option("--blockwise-batch", heading=BLOCKWISE, type=int, metavar="N", help="Windows per step. [default: 2]"),
    option(
        "--blockwise-lr",
        heading=BLOCKWISE,
        type=float,
        help="Learning rate, relative to the magnitude of each tensor. [default: 0.002]",
    ),
    option("--blockwise-schedule", heading=BLOCKWISE, type=SCHEDULES, help="Learning rate schedule. [default: cosine]"),
    option(
        "--blockwise-same-input",
        heading=BLOCKWISE,
        type=float,
        metavar="WEIGHT",
        help="Weight of the paper's second loss, which gives the original block the same input. [default: 0]",
    ),
    option(
        "--blockwise-held-out",
        heading=BLOCKWISE,
        type=float,
        metavar="SHARE",
        help="Share of the windows that is not trained on and decides which state is kept. [default: 0.125]",
    ),
    option(
        "--blockwise-patience",
        heading=BLOCKWISE,
        type=int,
        metavar="N",
        help="Stop a block after N epochs without improvement. [default: 2]",
    ),
    option(
        "--blockwise-precision",
        heading=BLOCKWISE,
        type=PRECISIONS,
        help="Precision of matrix products. [default: float32]",
    ),
    option(
        "--recovery-steps", heading=RECOVERY, type=int, metavar="N", help="Training steps; 0 disables recovery. [default: 48]"
    ),
    option("--recovery-batch", heading=RECOVERY, type=int, metavar="N", help="Windows per step. [default: 4]"),
    option("--recovery-context", heading=RECOVERY, type=int, metavar="N", help="Tokens per window. [default: 512]"),
    option(
        "--recovery-lr",
        heading=RECOVERY,
        type=float,
        help="Learning rate, relative to the magnitude of each tensor. "
        "[default: 0.0015 times the square root of the divergence before recovery]",
    ),
    option("--recovery-schedule", heading=RECOVERY, type=SCHEDULES, help="Learning rate schedule. [default: cosine]"),
    option("--recovery-warmup", heading=RECOVERY, type=int, metavar="N", help="Steps in which the rate rises. [default: 0]"),
    option(
        "--recovery-checks",
        heading=RECOVERY,
        type=int,
        metavar="N",
        help="Number of evaluations on the held-out text. [default: 8]",
    ),
    option(
        "--recovery-patience",
        heading=RECOVERY,
        type=int,
        metavar="N",
        help="Stop after N evaluations without improvement. [default: 3]",
    ),
    option(
        "--recovery-precision",
        heading=RECOVERY,
        type=PRECISIONS,
        help="Precision of matrix products. [default: bfloat16 on a CPU with AMX, otherwise float32]",
    ),
)


def _options(*decorators: Decorator[Any]) -> Decorator[Any]:
    """Decorators in the order in which the help lists their options."""

    def decorate(function: Any) -> Any:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return decorate


@command()
@click.argument("source", type=PATH)
@click.argument("output", type=PATH)
@_options(
    *_NEEDED_FIRST,
    DEVICE,
    option("--dry-run", is_flag=True, help="Show the plan, the size and the memory it needs; write nothing."),
    option("--force", is_flag=True, help="Replace the output if it exists."),
    *_PLANNING,
    *_PHASES,
    option(
        "--threads",
        heading=RESOURCES,
        type=click.IntRange(min=1),
        help="Threads to use; with --workers, threads of each worker. [default: all cores]",
    ),
    option(
        "--workers",
        heading=RESOURCES,
        metavar="N|threads:N|ray|ray://HOST:PORT",
        help="Cluster in parallel, with N processes or threads, or on a Ray cluster (docs/workers.md). The bytes are the same. "
        "[default: in this process]",
    ),
    option(
        "--report",
        "report_path",
        heading=OUTPUT,
        type=PATH,
        help="Also write the JSON report, which has the loss curves, to this file.",
    ),
    JSON,
)
def convert(
    source: Path, output: Path, *, dry_run: bool, force: bool, report_path: Path | None, as_json: bool, **options: Any
) -> None:
    """Compress SOURCE and write it to OUTPUT.

    \b
    Examples:
      cluscomp-export convert llama/ llama.clus --bits 3
      cluscomp-export convert model.gguf model.clus --bits 2.5 --embedding-bits 4 --dry-run
      cluscomp-export convert model.gguf model.clus --budget 55MB               the whole file, at most
      cluscomp-export convert llama/ llama.clus --plan plan.json                a plan of `plan --save`
      cluscomp-export convert llama/ paper.clus --dim 6 --clusters 65500        the paper's setting
      cluscomp-export convert clustered-checkpoint/ packed.clus                 repack without loss
      cluscomp-export convert packed.clus folder/ --to hf                       for transformers
      cluscomp-export convert packed.clus out.gguf --to gguf --gguf-type q8_0   for stock llama.cpp
      cluscomp-export convert llama/ best.clus --bits 2.5 --effort best --recovery-steps 96 --report best.json
      cluscomp-export convert llama/ paper.clus --dim 6 --clusters 65500 --blockwise-epochs 5
      cluscomp-export convert llama/ llama.clus --workers ray://head:10001      on a Ray cluster

    Memory stays near the size of the largest tensor; with --effort balanced near one block of the model, with best also its
    codes. --dry-run reports what each phase needs; for it, a folder with a config.json is enough as SOURCE.

    OUTPUT is complete or absent; SOURCE is never changed. A conversion that fails or is interrupted keeps its finished work in
    a folder .OUTPUT.work next to OUTPUT: run the same command again to resume it.
    """
    if dry_run:
        with ProgressDisplay() as progress:
            planned = api.plan(source, on_progress=progress, **options)
        _show_plan(planned, as_json=as_json)
        return
    from cluscomp_export.cli.tables import described_bits, print_predicted_speed
    from cluscomp_export.outputs import check_apart
    from cluscomp_export.work_folder import work_path
    from cluscomp_formats.files.atomic import check_output
    from cluscomp_runtime.memory import return_freed_arrays

    return_freed_arrays()
    if report_path is not None:
        files = [Path(name) for name in (options["plan"], options["calibration"]) if name not in (None, "none")]
        check_apart([output, report_path], [source, *files])
        check_output(report_path, force=force)
    try:
        with ProgressDisplay() as progress:
            report = api.convert(source, output, force=force, on_progress=progress, on_warning=warn, **options)
    except BaseException:
        if os.path.isdir(work_path(output)):  # noqa: PTH112 - Path.is_dir raises
            say(f"finished work is kept in {work_path(output)}: run the same command again to resume")
        raise
    if report.reused:
        say(f"resumed an interrupted conversion (reused {report.reused} finished units)")
    if report_path is not None:
        write_json(report_path, vars(report), force=force)
    if as_json:
        print_json(vars(report))
        return
    print_table(
        ("", "source", options["to"]),
        [("MB", f"{report.source_file_bytes / 1e6:.1f}", f"{report.file_bytes / 1e6:.1f}")],
    )
    show(f"bits per weight: {described_bits(report.bits_per_weight)}")
    print_predicted_speed(report.speed)
    if report.digest:
        show(report.digest)
    show(f"wrote {report.output} in {report.seconds:.0f} s")


@command()
@click.argument("source", type=PATH)
@_options(
    *_NEEDED_FIRST,
    option("--save", type=PATH, metavar="FILE", help="Write the plan as JSON, for `convert --plan`."),
    option("--force", is_flag=True, help="Replace FILE if it exists."),
    *_PLANNING,
    *_PHASES,
    option(
        "--threads",
        heading=RESOURCES,
        type=click.IntRange(min=1),
        help="Threads to measure sensitivities with. [default: all cores]",
    ),
    JSON,
)
def plan(source: Path, *, as_json: bool, **options: Any) -> None:
    """Show how SOURCE would be stored and why, without converting it.

    \b
    Examples:
      cluscomp-export plan llama/ --bits 2.2
      cluscomp-export plan llama/ --budget 55MB --to gguf
      cluscomp-export plan llama/ --match-loss 0.1 --json
      cluscomp-export plan llama/ --bits 3 --save plan.json    then edit it, and: convert llama/ llama.clus --plan plan.json

    The sensitivity of a tensor is the loss, in nats per token, of a squared error as large as its squared weights. It is
    measured with gradients on the calibration text. The loss of a plan is the sum of sensitivity times expected error.

    The size is that of the whole artefact, at most: exact except for the digits of checksums and of the self-test record. A
    folder with a config.json is enough as SOURCE, unless sensitivities are measured.
    """
    with ProgressDisplay() as progress:
        report = api.plan(source, on_progress=progress, **options)
    _show_plan(report, as_json=as_json)


def _show_plan(report: PlanReport, *, as_json: bool) -> None:
    from cluscomp_export.cli.tables import print_plan

    if as_json:
        print_json(vars(report))
        return
    print_plan(report)
    for text in report.warnings:
        warn(text)
