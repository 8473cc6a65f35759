"""The command `eval`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from cluscomp_export import api
from cluscomp_export.cli.options import DEVICE, JSON, OUTPUT, PATH, RESOURCES, command, option
from cluscomp_export.cli.terminal import ProgressDisplay, print_json, write_json

__all__ = ["evaluate"]

TEXT, TASKS = "With --text", "With --tasks"


@command("eval")
@click.argument("model", type=PATH)
@option("--text", type=PATH, help="Score a UTF-8 text file.")
@option("--tasks", help="Run tasks of lm-evaluation-harness: names or YAML files, separated by commas.")
@DEVICE
@option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), help="Compute in. [default: depends on --device]")
@JSON
@option(
    "--reference",
    heading=TEXT,
    type=PATH,
    help="The original: adds KL divergence, top-1 agreement and the ratio of perplexities.",
)
@option(
    "--protocol",
    heading=TEXT,
    type=click.Choice(["llama.cpp", "gptq"]),
    default="llama.cpp",
    show_default=True,
    help="llama.cpp scores the second half of each window of the unchanged text. gptq, used in papers, joins lines as rows of "
    "the data set and scores all of a window.",
)
@option("--windows", heading=TEXT, type=click.IntRange(min=1), help="Most windows of the text to use. [default: all]")
@option("--delta", heading=TEXT, type=PATH, help="Apply this delta (see tune) first.")
@option("--context", heading=TEXT, type=int, help="Tokens per window. [default: 512; gptq: 2048; at most the model's context]")
@option(
    "--stride",
    heading=TEXT,
    type=int,
    help="Tokens from one window to the next, for windows that overlap. Only new tokens are scored. [default: --context]",
)
@option(
    "--join",
    heading=TEXT,
    type=click.Choice(["rows", "none"]),
    help="How to join lines. [default: none; gptq: rows]",
)
@option("--limit", heading=TASKS, type=click.IntRange(min=1), help="Most examples of each task. [default: all]")
@option("--num-fewshot", heading=TASKS, type=click.IntRange(min=0), help="Examples in the prompt. [default: as the task says]")
@option("--threads", heading=RESOURCES, type=click.IntRange(min=1), help="Threads to use. [default: all cores]")
@option("--output", heading=OUTPUT, type=PATH, help="Also write the JSON document to this file.")
@option("--force", heading=OUTPUT, is_flag=True, help="Replace the output file if it exists.")
def evaluate(
    model: Path,
    *,
    text: Path | None,
    tasks: str | None,
    output: Path | None,
    force: bool,
    as_json: bool,
    device: str,
    dtype: str | None,
    threads: int | None,
    limit: int | None,
    num_fewshot: int | None,
    **options: Any,
) -> None:
    """Measure how well MODEL predicts a text, how far it is from the original, or how it does on tasks.

    \b
    Examples:
      cluscomp-export eval model.clus --text wiki.test.raw                       perplexity as llama.cpp reports it
      cluscomp-export eval model.clus --text wiki.test.raw --protocol gptq       ... as papers do
      cluscomp-export eval model.clus --text some.txt --reference original/ --output eval.json
      cluscomp-export eval model.clus --tasks arc_easy,my-task.yaml --limit 100

    The JSON document also contains what is needed to repeat the evaluation: digests, versions, parameters, the command. Tasks
    need the extra lm-eval and their data sets on this machine; nothing is downloaded unless HF_HUB_OFFLINE=0 is in the
    environment.
    """
    from cluscomp_export.cli.tables import print_scores, print_task_results

    if (text is None) == (tasks is None):
        raise click.UsageError("Give either --text or --tasks.")
    given = [f"--{name}" for name, value in options.items() if value is not None and name != "protocol"]
    if tasks is not None and given:
        raise click.UsageError(f"{', '.join(given)}: only with --text.")
    if text is not None and (limit is not None or num_fewshot is not None):
        raise click.UsageError("--limit, --num-fewshot: only with --tasks.")
    names = (tasks or "").split(",")
    if output is not None:
        from cluscomp_export.outputs import check_apart
        from cluscomp_formats.files.atomic import check_output

        files = [Path(name) for name in names if name]
        check_apart([output], [model, text, options["reference"], options["delta"], *files])
        check_output(output, force=force)
    machine: dict[str, Any] = {"device": device, "dtype": dtype, "threads": threads}
    if text is not None:
        with ProgressDisplay() as progress:
            scores = api.evaluate(model, text, on_progress=progress, **machine, **options)
        document = dict(vars(scores))
    else:
        document = dict(vars(api.evaluate_tasks(model, names, limit=limit, num_fewshot=num_fewshot, **machine)))
    document["record"] = {**document["record"], "command": ["cluscomp-export", *sys.argv[1:]]}
    if output is not None:
        write_json(output, document, force=force)
    if as_json:
        print_json(document)
    elif text is not None:
        print_scores(scores)
    else:
        print_task_results(document["results"])
