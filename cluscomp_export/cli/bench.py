"""The command `bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from cluscomp_export import api
from cluscomp_export.cli.messages import warn
from cluscomp_export.cli.options import JSON, PATH, command, option
from cluscomp_export.cli.terminal import ProgressDisplay, print_json

__all__ = ["bench"]


def _thread_counts(context: click.Context, param: click.Parameter, value: str | None) -> list[int] | None:
    """Numbers separated by commas. Their range is the library's business."""
    if value is None:
        return None
    parts = [part.strip() for part in value.split(",")]
    if not all(part.isascii() and part.isdigit() and len(part) < 10 for part in parts):
        raise click.BadParameter(f"{value!r} is not a list of numbers, such as 1,2,4.", context, param)
    return [int(part) for part in parts]


@command()
@click.argument("model", type=PATH)
@option("--against", multiple=True, type=PATH, help="Another model to measure in turn with MODEL; repeatable.")
@option(
    "--threads",
    callback=_thread_counts,
    metavar="N,...",
    help="Numbers of threads, such as 1,2,4. [default: 1 and all cores]",
)
@option("--prompt-tokens", type=int, help="Tokens of the prompt. [default: 512, or what the models were made for]")
@option("--new-tokens", type=int, help="Tokens to generate. [default: 128, or what the models were made for]")
@option("--repetitions", type=click.IntRange(min=1), default=5, show_default=True, help="Measurements of each model.")
@JSON
def bench(model: Path, *, against: tuple[Path, ...], as_json: bool, **options: Any) -> None:
    """Measure how fast MODEL runs on this machine: tokens per second, load time, memory.

    \b
    Examples:
      cluscomp-export bench model.clus
      cluscomp-export bench model.clus --against other.clus --against original/     with ratios
      cluscomp-export bench model.clus --against model.clus                         the noise of this machine
      cluscomp-export bench model.clus --threads 1,2,4 --repetitions 9 --json

    MODEL is anything convert reads or writes. A model with a self-test record must pass its self-test first. Every measurement
    runs in a new process, and the models take turns. docs/bench.md says what the figures mean; close other programs.
    """
    from dataclasses import asdict

    from cluscomp_export.cli.tables import print_speeds

    with ProgressDisplay() as progress:
        speeds = api.bench(model, against=against, on_progress=progress, on_warning=warn, **options)
    print_json([asdict(speed) for speed in speeds]) if as_json else print_speeds(speeds)
