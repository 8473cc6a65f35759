"""The commands `tune` and `merge`; see `cli.py`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from cluscomp_export.cli.options import DEVICE, GGUF_TYPE, JSON, PATH, PRECISIONS, SCHEDULES, OutputFormat
from cluscomp_export.cli.terminal import ProgressDisplay, print_json, print_table, say, show

__all__ = ["merge", "tune"]

KINDS = {"codebooks": "codebook", "scales": "row_scale", "norms": "norm"}


def _kinds(ctx: click.Context, param: click.Parameter, value: str) -> tuple[str, ...]:
    unknown = [name for name in value.split(",") if name not in KINDS]
    if unknown:
        raise click.BadParameter(f"{unknown[0]!r} is not one of {', '.join(KINDS)}.", ctx, param)
    return tuple(KINDS[name] for name in value.split(","))


def _share_or_file(ctx: click.Context, param: click.Parameter, value: str) -> float | Path:
    try:
        return float(value)
    except ValueError:
        return Path(value)


def _weights(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[float, ...] | None:
    try:
        return None if value is None else tuple(float(weight) for weight in value.split(","))
    except ValueError:
        raise click.BadParameter(f"{value!r} are not numbers with commas between.", ctx, param) from None


@click.command()
@click.argument("model", type=PATH)
@click.argument("delta", type=PATH)
@click.option("--text", type=PATH, help="Train on a UTF-8 text: to predict its next token.")
@click.option("--chat", type=PATH, help="Train on chats, a JSON object a line: to say what the assistant says in them.")
@click.option("--steps", type=click.IntRange(min=1), help="Steps to train for. [default: --epochs]")
@click.option("--epochs", type=float, default=1.0, show_default=True, help="Times over the data; not with --steps.")
@click.option("--batch", type=int, default=4, show_default=True, help="Windows or chats per step.")
@click.option("--context", type=int, default=512, show_default=True, help="Tokens of a window; longer chats are cut.")
@click.option("--lr", "rate", type=float, default=1e-3, show_default=True, help="Learning rate, relative to a tensor's size.")
@click.option("--schedule", type=SCHEDULES, default="cosine", show_default=True)
@click.option("--warmup", type=int, default=0, show_default=True, help="Steps over which the rate rises at the beginning.")
@click.option(
    "--held-out",
    metavar="SHARE|FILE",
    callback=_share_or_file,
    default="0.1",
    show_default=True,
    help="Share of the data, or a file, that is not trained on and tells which state is best.",
)
@click.option("--checks", type=int, default=8, show_default=True, help="How often the held-out data is looked at.")
@click.option("--patience", type=int, default=3, show_default=True, help="Stop after so many checks without progress.")
@click.option(
    "--train",
    "kinds",
    metavar="KINDS",
    callback=_kinds,
    default="codebooks,scales,norms",
    show_default=True,
    help="What to train.",
)
@click.option("--reference", type=PATH, help="The original model, to stay near to; needs --kl.")
@click.option("--kl", type=float, default=0.0, help="Weight of the divergence from --reference in the loss, such as 0.5.")
@click.option(
    "--precision",
    type=PRECISIONS,
    default="float32",
    show_default=True,
    help="What matrices are multiplied in; bfloat16 is many times faster where there are units for it.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="The same seed gives the same bytes.")
@DEVICE
@click.option("--dry-run", is_flag=True, help="Read model and data, show what training would take; train nothing.")
@click.option("--force", is_flag=True, help="Replace the delta if it exists.")
@JSON
def tune(
    model: Path,
    delta: Path,
    *,
    text: Path | None,
    chat: Path | None,
    steps: int | None,
    dry_run: bool,
    force: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Train the codebooks, row scales and norms of MODEL on a text or on chats; write what changed to DELTA.

    \b
    Examples:
      cluscomp-export tune model.clus legal.delta --text contracts.txt
      cluscomp-export tune model.clus math.delta --chat gsm8k.jsonl --epochs 2 --lr 5e-4
      cluscomp-export tune model.clus my.delta --chat my.jsonl --reference original/ --kl 0.5
      cluscomp-export generate model.clus --delta my.delta --chat "..."      try it
      cluscomp-export merge model.clus my.delta tuned.gguf --to gguf         make a model of it

    Codes stay as they are, so that DELTA is small and goes with MODEL in any format. A line of --chat is
    {"messages": [{"role": ..., "content": ...}, ...]}, {"prompt": ..., "completion": ...} or {"question": ..., "answer": ...}.
    MODEL is never changed. A training that is interrupted keeps its state in a folder .DELTA.work: run the same command again
    to go on.
    """
    from dataclasses import asdict, fields

    from cluscomp_export.training import TrainingOptions
    from cluscomp_export.training.finetuning import TuneOptions, plan_tuning
    from cluscomp_export.training.finetuning import tune as run
    from cluscomp_export.work_folder import work_path

    data = text or chat
    if data is None or (text and chat):
        raise click.UsageError("Give --text or --chat, one of them.")
    given = click.get_current_context().get_parameter_source("epochs")
    if steps is not None and given is click.core.ParameterSource.COMMANDLINE:
        raise click.UsageError("--steps and --epochs exclude each other.")
    how = {field.name: options.pop(field.name) for field in fields(TrainingOptions) if field.name in options}
    chosen = TuneOptions(data, chat is not None, training=TrainingOptions(steps=steps or 0, **how), **options)
    if dry_run:
        plan = plan_tuning(model, chosen)
        for warning in plan.warnings:
            say(f"warning: {warning}")
        if as_json:
            print_json(asdict(plan))
            return
        rows = [(kind, f"{count}") for kind, count in plan.parameters.items()]
        print_table(("to train", "values"), rows)
        show(f"{plan.examples} examples with {plan.predictions} tokens to learn, {plan.held_out_examples} held out")
        show(f"{plan.steps} steps of {how['batch']}")
        show(f"delta: at most {plan.delta_bytes / 1e6:.1f} MB, {plan.delta_bytes / plan.model_bytes:.1%} of the model")
        return
    try:
        with ProgressDisplay() as progress:
            report = run(model, delta, chosen, force=force, on_progress=progress)
    except BaseException:
        if os.path.isdir(work_path(delta)):  # noqa: PTH112 - Path.is_dir raises
            say(f"the state of the training is kept in {work_path(delta)}: run the same command again to go on")
        raise
    for warning in report.warnings:
        say(f"warning: {warning}")
    if report.resumed_at:
        say(f"went on from an interrupted training, at step {report.resumed_at}")
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
    changed = ", ".join(f"{count} {name}" for name, kind in KINDS.items() if (count := report.changed.get(kind)))
    show(f"changed: {changed or 'nothing'}")
    show(f"{report.file_bytes / 1e6:.2f} MB, {report.share_of_model:.1%} of the model")
    show(f"wrote {report.output} in {report.seconds:.0f} s")


@click.command()
@click.argument("model", type=PATH)
@click.argument("deltas", type=PATH, nargs=-1, required=True)
@click.argument("output", type=PATH)
@click.option("--to", type=OutputFormat(), default="packed", show_default=True, help="The format to write, as for convert.")
@GGUF_TYPE
@click.option(
    "--weights",
    metavar="NUMBERS",
    callback=_weights,
    help="One number for each delta. [default: equal shares; 1 for a single one]",
)
@click.option("--force", is_flag=True, help="Replace the output if it exists.")
@JSON
def merge(model: Path, deltas: tuple[Path, ...], output: Path, *, force: bool, as_json: bool, **options: Any) -> None:
    """Apply DELTAS, made by tune, to MODEL and write the result to OUTPUT.

    \b
    Examples:
      cluscomp-export merge model.clus my.delta tuned.clus
      cluscomp-export merge model.gguf my.delta tuned/ --to hf                        base and result in any format
      cluscomp-export merge model.clus math.delta legal.delta both.clus --weights 0.7,0.5

    MODEL must be the one that the deltas were trained on, in any format; another is refused. Of several deltas the weighted
    differences from MODEL are added up.
    """
    from dataclasses import asdict

    from cluscomp_export.conversion.merge import merge as run

    with ProgressDisplay() as progress:
        report = run(model, deltas, output, force=force, on_progress=progress, **options)
    for warning in report.warnings:
        say(f"warning: {warning}")
    if as_json:
        print_json(asdict(report))
        return
    if report.digest:
        show(report.digest)
    show(f"wrote {report.output} ({report.file_bytes / 1e6:.1f} MB) in {report.seconds:.0f} s")
