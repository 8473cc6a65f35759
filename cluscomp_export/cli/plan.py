"""The command `plan`, and what it shares with `convert`; see `cli.py`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cluscomp_export.cli.options import GGUF_TYPE, JSON, PATH, OutputFormat, level_options, levels_from
from cluscomp_export.cli.terminal import ProgressDisplay, print_json, say

if TYPE_CHECKING:
    from cluscomp_export.conversion.prepare import Prepared

__all__ = ["plan", "planning_options", "show_plan"]


def _bytes(ctx: click.Context, param: click.Parameter, value: str | None) -> int | None:
    from cluscomp_export.planning.sizes import parse_bytes

    try:
        return None if value is None else parse_bytes(value)
    except ValueError as error:
        raise click.BadParameter(str(error), ctx, param) from None


_OPTIONS = (
    click.option(
        "--to",
        type=OutputFormat(),
        default="packed",
        show_default=True,
        help="The format to write: one .clus file, a Hugging Face folder, a GGUF file, an ONNX folder, or what a plug-in "
        "brings.",
    ),
    GGUF_TYPE,
    click.option(
        "--bits", type=float, help="Most bits per weight of the linear layers, codebooks and scales counted. [default: 4]"
    ),
    click.option(
        "--budget",
        metavar="SIZE",
        callback=_bytes,
        help="Most bytes of the whole artefact, embedding and head included: 16MB, 1.5GiB, ... Excludes --bits.",
    ),
    click.option(
        "--match-loss",
        type=float,
        metavar="NATS",
        help="The smallest artefact whose divergence from the source is at most this, in nats per token, as predicted on the "
        "calibration text, before error feedback and training. Excludes --bits.",
    ),
    click.option("--plan", type=PATH, metavar="FILE", help="A plan that `plan --save` wrote, edited or not. Excludes --bits."),
    click.option(
        "--dim", "cluster_dim", type=int, help="Weights per code, as in the paper; needs --clusters, excludes --bits."
    ),
    click.option("--clusters", "num_clusters", type=int, help="Centroids per codebook, at most 65536; needs --dim."),
    click.option(
        "--share",
        type=click.Choice(["none", "kind", "model"]),
        help="A codebook per matrix, per kind of matrix over all layers, or one for all. "
        "[default: none with --dim, else whichever is expected to be best]",
    ),
    click.option(
        "--embedding-bits",
        type=float,
        help="Most bits per weight of embedding and head; 16 keeps them dense. [default: the width they have in the source]",
    ),
    click.option(
        "--codebook-bits",
        type=click.Choice([8, 16]),
        help="Bits per value of a codebook: 8 for int8, 16 for float16, which codebooks without row scales always have. "
        "[default: whichever is expected to be best; 8 with --dim; 16 with recovery]",
    ),
    click.option(
        "--sensitivity",
        type=click.Choice(["measured", "equal"]),
        help="Measure on the calibration text how much predictions suffer from errors of each tensor, and give bits where they "
        "matter; or take all weights for equal. [default: equal; measured with --match-loss]",
    ),
    click.option(
        "--calibration",
        metavar="FILE|none",
        help="A text whose activations tell which input channels matter. [default: a text of this package; none with --dim]",
    ),
    click.option(
        "--effort",
        type=click.Choice(["fast", "balanced", "best"]),
        help="fast only clusters; balanced chooses codes that make up for each other's errors on the calibration text, then "
        "tunes each block's own codebooks; best then trains codebooks, scales and norms end to end, which takes much longer. "
        "[default: balanced; fast with --dim]",
    ),
    level_options,
    click.option(
        "--method",
        type=click.Choice(["fast", "lloyd"]),
        default="fast",
        show_default=True,
        help="How to cluster: fast is at least as good in a fraction of the time; lloyd is plain k-means, as in the paper.",
    ),
    click.option("--seed", type=int, default=0, show_default=True, help="The same seed gives the same bytes."),
)


def planning_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """What `convert` and `plan` take both."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


@click.command()
@click.argument("source", type=PATH)
@planning_options
@click.option("--save", type=PATH, metavar="FILE", help="Write the plan as JSON, for `convert --plan`.")
@click.option("--force", is_flag=True, help="Replace FILE if it exists.")
@click.option("--threads", type=click.IntRange(min=1), help="Threads to measure sensitivities with. [default: all cores]")
@JSON
def plan(source: Path, *, save: Path | None, force: bool, as_json: bool, **options: Any) -> None:
    """Show how SOURCE would be stored and why, without converting it.

    \b
    Examples:
      cluscomp-export plan llama/ --bits 2.2
      cluscomp-export plan llama/ --budget 55MB --to gguf
      cluscomp-export plan llama/ --match-loss 0.1 --json
      cluscomp-export plan llama/ --bits 3 --save plan.json    then edit it, and: convert llama/ llama.clus --plan plan.json

    The sensitivity of a tensor is the loss, in nats per token, that a squared error as large as its weights' squares would
    cost, as measured with gradients on the calibration text; the loss of a plan is the sum of sensitivity times expected error.
    The size is that of the whole artefact, at most: exact but for the digits of checksums and of the self-test record. Unless
    sensitivities are to be measured, a folder that holds a config.json will do as SOURCE.
    """
    from cluscomp_export.conversion.options import ConversionOptions
    from cluscomp_export.conversion.prepare import prepare
    from cluscomp_export.outputs import check_apart
    from cluscomp_export.planning.plan_file import write_plan
    from cluscomp_formats.files.atomic import check_output

    chosen = ConversionOptions(**levels_from(options))
    if save is not None:
        check_apart([save], [source, *chosen.files()])
        check_output(save, force=force)
    with ProgressDisplay() as progress:
        prepared = prepare(source, chosen, progress, to_plan=True)
    if save is not None:
        if prepared.plan is None:
            raise click.UsageError("there is no plan to save: SOURCE is clustered already")
        write_plan(prepared.plan, save, force=force)
    show_plan(prepared, as_json=as_json)


def show_plan(prepared: Prepared, *, as_json: bool) -> None:
    """Print the plan, its size and the memory it takes."""
    from cluscomp_export.cli.tables import print_plan
    from cluscomp_export.conversion.plan_report import explain

    report = explain(prepared)
    if as_json:
        print_json(report)
        return
    print_plan(report)
    for text in prepared.warnings:
        say(f"warning: {text}")
