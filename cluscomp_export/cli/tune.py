"""The commands `tune` and `merge`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from cluscomp_export import api
from cluscomp_export.cli.messages import warn
from cluscomp_export.cli.options import (
    DEVICE,
    GGUF_TYPE,
    JSON,
    PATH,
    PRECISIONS,
    SCHEDULES,
    OutputFormat,
    command,
    option,
)
from cluscomp_export.cli.terminal import ProgressDisplay, print_json, print_table, say, show

__all__ = ["merge", "tune"]

TRAINING, HELD_OUT = "Training", "Held-out data"
KINDS = {"codebook": "codebooks", "row_scale": "scales", "norm": "norms"}


def _names(ctx: click.Context, param: click.Parameter, value: str) -> list[str]:
    return value.split(",")


def _share_or_file(ctx: click.Context, param: click.Parameter, value: str) -> float | Path:
    try:
        return float(value)
    except ValueError:
        return Path(value)


def _weights(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[float, ...] | None:
    try:
        return None if value is None else tuple(float(weight) for weight in value.split(","))
    except ValueError:
        raise click.BadParameter(f"{value!r} is not a list of numbers separated by commas.", ctx, param) from None


@command()
@click.argument("model", type=PATH)
@click.argument("delta", type=PATH)
@option("--text", type=PATH, help="Train on a UTF-8 text, to predict the next token.")
@option("--chat", type=PATH, help="Train on chats, a JSON object per line, to predict what the assistant says.")
@option("--epochs", type=float, help="Epochs over the data; not with --steps. [default: 1]")
@option("--context", type=int, default=512, show_default=True, help="Tokens per window; longer chats are cut.")
@option("--lr", type=float, default=1e-3, show_default=True, help="Learning rate, relative to the magnitude of each tensor.")
@DEVICE
@option("--dry-run", is_flag=True, help="Read model and data, show what training would need; train nothing.")
@option("--force", is_flag=True, help="Replace the delta if it exists.")
@JSON
@option(
    "--train",
    heading=TRAINING,
    metavar="KINDS",
    callback=_names,
    default="codebooks,scales,norms",
    show_default=True,
    help="What to train.",
)
@option("--steps", heading=TRAINING, type=click.IntRange(min=1), help="Training steps. [default: depends on --epochs]")
@option("--batch", heading=TRAINING, type=int, default=4, show_default=True, help="Windows or chats per step.")
@option("--schedule", heading=TRAINING, type=SCHEDULES, default="cosine", show_default=True, help="Learning rate schedule.")
@option("--warmup", heading=TRAINING, type=int, default=0, show_default=True, help="Steps in which the rate rises.")
@option("--reference", heading=TRAINING, type=PATH, help="The original model, to stay close to; needs --kl.")
@option(
    "--kl",
    heading=TRAINING,
    type=float,
    default=0.0,
    help="Weight of the divergence from --reference in the loss, such as 0.5.",
)
@option(
    "--precision",
    heading=TRAINING,
    type=PRECISIONS,
    default="float32",
    show_default=True,
    help="Precision of matrix products; bfloat16 is many times faster on a CPU with matrix units (AMX).",
)
@option("--seed", heading=TRAINING, type=int, default=0, show_default=True, help="The same seed produces the same bytes.")
@option(
    "--held-out",
    heading=HELD_OUT,
    metavar="SHARE|FILE",
    callback=_share_or_file,
    default="0.1",
    show_default=True,
    help="Share of the data, or a file, that is not trained on and decides which state is kept.",
)
@option("--checks", heading=HELD_OUT, type=int, default=8, show_default=True, help="Number of evaluations on held-out data.")
@option(
    "--patience", heading=HELD_OUT, type=int, default=3, show_default=True, help="Stop after N evaluations without improvement."
)
def tune(model: Path, delta: Path, *, dry_run: bool, force: bool, as_json: bool, **options: Any) -> None:
    """Train the codebooks, row scales and norms of MODEL on a text or on chats; write what changed to DELTA.

    \b
    Examples:
      cluscomp-export tune model.clus legal.delta --text contracts.txt
      cluscomp-export tune model.clus math.delta --chat gsm8k.jsonl --epochs 2 --lr 5e-4
      cluscomp-export tune model.clus my.delta --chat my.jsonl --reference original/ --kl 0.5
      cluscomp-export generate model.clus --delta my.delta --chat "..."      try it
      cluscomp-export merge model.clus my.delta tuned.gguf --to gguf         make a model of it

    Codes stay as they are. DELTA is therefore small, and applies to MODEL in any format. A line of --chat is
    {"messages": [{"role": ..., "content": ...}, ...]}, {"prompt": ..., "completion": ...} or {"question": ..., "answer": ...}.

    MODEL is never changed. An interrupted training keeps its state in a folder .DELTA.work: run the same command again to
    resume it.
    """
    from dataclasses import asdict

    if dry_run:
        planned = api.plan_tuning(model, **options)
        for warning in planned.warnings:
            warn(warning)
        if as_json:
            print_json(asdict(planned))
            return
        rows = [(kind, f"{count}") for kind, count in planned.parameters.items()]
        print_table(("to train", "values"), rows)
        show(f"{planned.examples} examples with {planned.predictions} tokens to learn, {planned.held_out_examples} held out")
        show(f"{planned.steps} steps of {options['batch']}")
        show(f"delta: at most {planned.delta_bytes / 1e6:.1f} MB, {planned.delta_bytes / planned.model_bytes:.1%} of the model")
        return
    from cluscomp_export.work_folder import work_path

    try:
        with ProgressDisplay() as progress:
            report = api.tune(model, delta, force=force, on_progress=progress, **options)
    except BaseException:
        if os.path.isdir(work_path(delta)):  # noqa: PTH112 - Path.is_dir raises
            say(f"the state of the training is kept in {work_path(delta)}: run the same command again to resume")
        raise
    for warning in report.warnings:
        warn(warning)
    if report.resumed_at:
        say(f"resumed an interrupted training at step {report.resumed_at}")
    if as_json:
        print_json(asdict(report))
        return
    curve = [
        (str(entry["step"]), f"{entry['train']:.4f}" if "train" in entry else "", f"{entry['held_out']:.4f}")
        for entry in report.curve
    ]
    print_table(("step", "loss", "held-out loss"), curve)
    if report.stopped:
        say(f"stopped: {report.stopped}")
    changed = ", ".join(f"{count} {name}" for kind, name in KINDS.items() if (count := report.changed.get(kind)))
    show(f"changed: {changed or 'nothing'}")
    show(f"{report.file_bytes / 1e6:.2f} MB, {report.share_of_model:.1%} of the model")
    show(f"wrote {report.output} in {report.seconds:.0f} s")


@command()
@click.argument("model", type=PATH)
@click.argument("deltas", type=PATH, nargs=-1, required=True)
@click.argument("output", type=PATH)
@option("--to", type=OutputFormat(), default="packed", show_default=True, help="The format to write, as in convert.")
@GGUF_TYPE
@option(
    "--weights",
    metavar="NUMBERS",
    callback=_weights,
    help="One number for each delta. [default: equal shares; 1 for a single delta]",
)
@option("--force", is_flag=True, help="Replace the output if it exists.")
@JSON
def merge(model: Path, deltas: tuple[Path, ...], output: Path, *, force: bool, as_json: bool, **options: Any) -> None:
    """Apply DELTAS, made by tune, to MODEL and write the result to OUTPUT.

    \b
    Examples:
      cluscomp-export merge model.clus my.delta tuned.clus
      cluscomp-export merge model.gguf my.delta tuned/ --to hf                        base and result in any format
      cluscomp-export merge model.clus math.delta legal.delta both.clus --weights 0.7,0.5

    MODEL must be the model that the deltas were trained on, in any format. Of several deltas, the weighted differences from
    MODEL are added.
    """
    from dataclasses import asdict

    with ProgressDisplay() as progress:
        report = api.merge(model, deltas, output, force=force, on_progress=progress, **options)
    for warning in report.warnings:
        warn(warning)
    if as_json:
        print_json(asdict(report))
        return
    if report.digest:
        show(report.digest)
    show(f"wrote {report.output} ({report.file_bytes / 1e6:.1f} MB) in {report.seconds:.0f} s")
