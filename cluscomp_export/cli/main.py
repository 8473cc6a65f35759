"""The command line: options in, one library call, an exit code out.

Results go to standard output, progress and messages to standard error. Exit codes: 0 success, 1 `verify` found a difference,
2 a usage error or `verify` could not tell, 3 an invalid file, 4 something this version does not support, 5 the output exists,
6 a storage problem, 7 a failed self-test, 8 workers that died, 130 interrupted.
"""

from __future__ import annotations

import io
import os
import sys
import warnings
from pathlib import Path
from typing import Any, TextIO

import click

from cluscomp_export.cli.options import DEVICE, JSON, PATH, levels_from
from cluscomp_export.cli.plan import plan, planning_options, show_plan
from cluscomp_export.cli.terminal import ProgressDisplay, json_document, print_json, print_table, say, show
from cluscomp_export.cli.tune import merge, tune
from cluscomp_formats.errors import ClusCompError, grouped, printable
from cluscomp_formats.files.atomic import atomic_write, check_output, storage_error
from cluscomp_formats.version import __version__

__all__ = ["main"]

INTERRUPTED = 130


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="cluscomp-export")
def cli() -> None:
    """Turn a language model into a ClusComp codebook model, and run it.

    \b
    A typical session:
      cluscomp-export plan MODEL --bits 3                            what would it come to?
      cluscomp-export convert MODEL model.clus --bits 3              make it
      cluscomp-export verify MODEL model.clus                        did it come out right?
      cluscomp-export generate model.clus "The capital of France is"
      cluscomp-export tune model.clus my.delta --text my.txt         train its codebooks on a text
      cluscomp-export merge model.clus my.delta tuned.clus           a model like any other

    MODEL is a Hugging Face folder with safetensors, a GGUF file, an authors' ClusComp checkpoint or whatever convert made.
    Nothing is ever downloaded.

    Tab completion: eval "$(_CLUSCOMP_EXPORT_COMPLETE=bash_source cluscomp-export)" (or zsh_source, fish_source).
    """


@cli.command()
@click.argument("source", type=PATH)
@click.argument("output", type=PATH)
@planning_options
@click.option("--threads", type=click.IntRange(min=1), help="Threads to use, with --workers each. [default: all cores]")
@click.option(
    "--workers",
    metavar="N|threads:N|ray|ray://HOST:PORT",
    help="Cluster with N processes or threads, or on a Ray cluster (docs/workers.md): the same bytes, sooner. "
    "[default: in this process]",
)
@DEVICE
@click.option(
    "--dry-run",
    is_flag=True,
    help="Show the plan, its size and the memory it takes; write nothing.",
)
@click.option("--force", is_flag=True, help="Replace the output if it exists.")
@click.option("--report", "report_path", type=PATH, help="Also write the JSON report to this file; it holds the loss curves.")
@JSON
def convert(
    source: Path, output: Path, *, dry_run: bool, force: bool, report_path: Path | None, as_json: bool, **options: Any
) -> None:
    """Cluster SOURCE and write it to OUTPUT.

    \b
    Examples:
      cluscomp-export convert llama/ llama.clus --bits 3
      cluscomp-export convert model.gguf model.clus --bits 2.5 --embedding-bits 4 --dry-run
      cluscomp-export convert model.gguf model.clus --budget 55MB               the whole file, never more
      cluscomp-export convert llama/ llama.clus --plan plan.json                as `plan --save plan.json` said
      cluscomp-export convert llama/ paper.clus --dim 6 --clusters 65500        the paper's setting
      cluscomp-export convert clustered-checkpoint/ packed.clus                 repack without loss
      cluscomp-export convert packed.clus folder/ --to hf                       for transformers
      cluscomp-export convert packed.clus out.gguf --to gguf --gguf-type q8_0   for stock llama.cpp
      cluscomp-export convert llama/ best.clus --bits 2.5 --effort best --recovery-steps 96 --report best.json
      cluscomp-export convert llama/ paper.clus --dim 6 --clusters 65500 --blockwise-epochs 5
      cluscomp-export convert llama/ llama.clus --workers ray://head:10001      on a Ray cluster

    Memory stays near the largest tensor (--effort balanced: near one block of the model; best: also its codes);
    --dry-run tells what each phase needs, and is content with a folder that holds a config.json as SOURCE.
    OUTPUT is complete or not there; SOURCE is never changed. A clustering that fails or is interrupted keeps what it has
    finished in a folder .OUTPUT.work beside OUTPUT: run the same command again to go on.
    """
    from cluscomp_export.conversion.convert import ConversionOptions, prepare
    from cluscomp_export.conversion.convert import convert as run
    from cluscomp_export.outputs import check_apart
    from cluscomp_export.work_folder import work_path
    from cluscomp_runtime.memory import return_freed_arrays

    return_freed_arrays()
    chosen = ConversionOptions(**levels_from(options))
    if dry_run:
        with ProgressDisplay() as progress:
            prepared = prepare(source, chosen, progress, to_plan=True)
        show_plan(prepared, as_json=as_json)
        return
    check_apart([output, report_path], [source, *chosen.files()])
    if report_path is not None:
        check_output(report_path, force=force)
    told: list[str] = []

    def warn(text: str) -> None:
        told.append(text)
        say(f"warning: {text}")

    try:
        with ProgressDisplay() as progress:
            report = run(source, output, chosen, force=force, on_progress=progress, on_warning=warn)
    except BaseException:
        if os.path.isdir(work_path(output)):  # noqa: PTH112 - Path.is_dir raises
            say(f"what is finished is kept in {work_path(output)}: run the same command again to go on")
        raise
    for text in report.warnings[len(told) :]:
        say(f"warning: {text}")
    if report.reused:
        say(f"went on from an interrupted conversion: {report.reused} finished parts were taken up again")
    if report_path is not None:
        _write_json(report_path, vars(report), force=force)
    if as_json:
        print_json(vars(report))
        return
    bits = report.bits_per_weight
    print_table(
        ("", "source", chosen.to),
        [("MB", f"{report.source_file_bytes / 1e6:.1f}", f"{report.file_bytes / 1e6:.1f}")],
    )
    show(f"bits per weight: {bits['linears']:.2f} (linear layers), {bits['all']:.2f} (everything)")
    if report.digest:
        show(report.digest)
    show(f"wrote {report.output} in {report.seconds:.0f} s")


@cli.command()
@click.argument("model", type=PATH)
@click.option("--quick", is_flag=True, help="Read the header only: no digest, no checksums, no use of codebooks.")
@click.option("--reference", type=PATH, help="The original: adds the error of each tensor against it.")
@JSON
def inspect(model: Path, *, quick: bool, reference: Path | None, as_json: bool) -> int:
    """Show what MODEL holds: architecture, settings per tensor, bits per weight, how its codebooks are used, worst tensors.

    Everything is read, and all that is wrong with it is listed; exit code 3 then. MODEL may be a delta (see tune); --reference
    is the model it belongs to then, and adds how far it is from that.
    """
    from cluscomp_export.cli.tables import print_delta, print_inspection
    from cluscomp_export.inspection.inspect import inspect_delta, inspect_model
    from cluscomp_formats.delta import is_delta

    if is_delta(model):
        report = inspect_delta(model, reference=reference)
        (print_json if as_json else print_delta)(report)
        return 0
    with ProgressDisplay() as progress:
        report = inspect_model(model, reference=reference, quick=quick, on_progress=progress)
    if as_json:
        print_json(report)
    else:
        print_inspection(report)
    return int(report["exit_code"])


@cli.command()
@click.argument("a", type=PATH)
@click.argument("b", type=PATH)
@click.option("--delta", type=PATH, help="Swap this delta in (see tune) to B first.")
@DEVICE
@JSON
def verify(a: Path, b: Path, *, delta: Path | None, device: str, as_json: bool) -> int:
    """Check that A and B are the same model, or that one was made from the other.

    Exit code 0: equal, or derived from that source and sound. 1: different, a self-test fails, or too few bits to compute
    anything of the source. 2: could not tell. docs/verify.md has the rules; what is proven and what only claimed is printed.
    """
    from dataclasses import asdict

    from cluscomp_export.inspection.verify import verify as run

    try:
        with ProgressDisplay() as progress:
            result = run(a, b, delta=delta, device=device, on_progress=progress)
    except ClusCompError as error:
        _report(error, as_json=as_json, exit_code=2)
        return 2
    if as_json:
        print_json({**asdict(result), "exit_code": result.exit_code})
        return result.exit_code
    worst = sorted(result.tensors, key=lambda tensor: -tensor.relative)[:5]
    if worst and worst[0].max_absolute > 0:
        rows = [(tensor.name, f"{tensor.relative:.4f}", f"{tensor.max_absolute:.4g}") for tensor in worst]
        print_table(("worst tensors", "relative error", "largest difference"), rows)
    if result.logits:
        values = result.logits
        show(
            f"logits on {values['positions']} positions: KL {values['kl']:.4f} (by chance {values['chance']:.2f}), "
            f"top-1 agreement {100 * values['top1']:.1f} %, largest difference {values['max_difference']:.4g}"
        )
    for name, test in result.self_tests.items():
        verdict = {True: "passed", False: "FAILED", None: "not run"}[test["passed"]]
        detail = f" (difference {test['max_difference']:.3g}, allowed {test['tolerance']:.3g})" if "tolerance" in test else ""
        show(f"self-test of {name}: {verdict}{detail}")
    for reason in result.reasons:
        show(f"- {printable(reason)}")
    for label, texts in (("proven", result.proven), ("only claimed", result.claimed)):
        for text in texts:
            show(f"{label}: {printable(text)}")
    show(result.verdict.upper())
    return result.exit_code


@cli.command(name="eval")
@click.argument("model", type=PATH)
@click.option("--text", type=PATH, help="A UTF-8 text file.")
@click.option("--reference", type=PATH, help="The original: adds KL divergence, top-1 agreement and the ratio of perplexities.")
@click.option(
    "--protocol",
    type=click.Choice(["llama.cpp", "gptq"]),
    default="llama.cpp",
    show_default=True,
    help="llama.cpp: the text as it is, the second half of each window scored. gptq, as in the papers: lines joined as rows of "
    "the data set, all of a window scored.",
)
@click.option("--windows", type=click.IntRange(min=1), help="How many windows of the text to use. [default: all]")
@click.option("--delta", type=PATH, help="Swap this delta in (see tune) first.")
@click.option("--context", type=int, help="Tokens per window. [default: 512, gptq 2048; no more than the model takes]")
@click.option("--stride", type=int, help="Let windows overlap: tokens from one to the next. Only new ones are scored.")
@click.option("--join", type=click.Choice(["rows", "none"]), help="How to join the text's lines. [default: none, gptq rows]")
@click.option("--tasks", help="Instead of --text: tasks of lm-evaluation-harness, names or YAML files, separated by commas.")
@click.option("--limit", type=click.IntRange(min=1), help="With --tasks: how many examples of each to use. [default: all]")
@click.option("--num-fewshot", type=click.IntRange(min=0), help="With --tasks: examples in the prompt. [default: the task's]")
@DEVICE
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), help="Compute in. [default: by device]")
@click.option("--threads", type=click.IntRange(min=1), help="Threads to use. [default: all cores]")
@click.option("--output", type=PATH, help="Also write the JSON document to this file.")
@click.option("--force", is_flag=True, help="Replace the output file if it exists.")
@JSON
def evaluate(
    model: Path,
    *,
    text: Path | None,
    tasks: str | None,
    limit: int | None,
    num_fewshot: int | None,
    threads: int | None,
    output: Path | None,
    force: bool,
    as_json: bool,
    device: str,
    dtype: str | None,
    **options: Any,
) -> None:
    """How well MODEL predicts a text, how far it is from the original, or how it does on tasks.

    \b
    Examples:
      cluscomp-export eval model.clus --text wiki.test.raw                       perplexity as llama.cpp reports it
      cluscomp-export eval model.clus --text wiki.test.raw --protocol gptq       ... as papers do
      cluscomp-export eval model.clus --text some.txt --reference original/ --output eval.json
      cluscomp-export eval model.clus --tasks arc_easy,my-task.yaml --limit 100

    The JSON document also holds what is needed to repeat it: digests, versions, parameters, the command. Tasks need the extra
    lm-eval and their data sets on this machine; nothing is downloaded unless HF_HUB_OFFLINE=0 is in the environment.
    """
    from cluscomp_export.cli.tables import print_scores, print_task_results

    if (text is None) == (tasks is None):
        raise click.UsageError("Give either --text or --tasks.")
    given = [f"--{name}" for name, value in options.items() if value is not None and name != "protocol"]
    if tasks is not None and given:
        raise click.UsageError(f"{', '.join(given)}: only with --text.")
    if text is not None and (limit is not None or num_fewshot is not None):
        raise click.UsageError("--limit, --num-fewshot: only with --tasks.")
    if output is not None:
        from cluscomp_export.outputs import check_apart

        files = [Path(task) for task in (tasks or "").split(",") if task]
        check_apart([output], [model, text, options["reference"], options["delta"], *files])
        check_output(output, force=force)
    from cluscomp_export.threads import torch_threads

    if text is not None:
        from cluscomp_export.evaluation.evaluate import evaluate_files

        with torch_threads(threads), ProgressDisplay() as progress:
            scores = evaluate_files(model, text=text, device=device, dtype=dtype, on_progress=progress, **options)
        document = dict(vars(scores))
    else:
        from cluscomp_export.evaluation.harness import evaluate_tasks

        with torch_threads(threads):
            document = evaluate_tasks(
                model, str(tasks).split(","), limit=limit, num_fewshot=num_fewshot, device=device, dtype=dtype
            )
    document["record"] = {**document["record"], "command": ["cluscomp-export", *sys.argv[1:]]}
    if output is not None:
        _write_json(output, document, force=force)
    if as_json:
        print_json(document)
    elif text is not None:
        print_scores(scores)
    else:
        print_task_results(document["results"])


@cli.command()
@click.argument("model", type=PATH)
@click.argument("prompt")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=128, show_default=True)
@click.option("--chat", is_flag=True, help="Treat PROMPT as a user's message, through the model's chat template.")
@click.option("--raw", is_flag=True, help="Print what the model writes as it is, control characters included.")
@click.option("--temperature", type=click.FloatRange(min=0), default=0.0, show_default=True, help="0 is greedy.")
@click.option("--top-k", type=click.IntRange(min=1), help="Sample among the k likeliest tokens.")
@click.option(
    "--top-p", type=click.FloatRange(min=0, max=1), help="Sample among the likeliest tokens of this total probability."
)
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the sampling.")
@click.option("--delta", type=PATH, help="Swap this delta in (see tune) first.")
@DEVICE
@click.option(
    "--kernel", default="auto", show_default=True, help="Force a kernel: native, embedding_bag, triton, dense, reference."
)
@click.option("--selftest", is_flag=True, help="Run the self-test first; fail if the model computes something else.")
@JSON
def generate(
    model: Path,
    prompt: str,
    *,
    delta: Path | None,
    device: str,
    kernel: str,
    selftest: bool,
    chat: bool,
    raw: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Continue PROMPT with MODEL.

    Control characters that the model writes are shown escaped (\\x1b), as is what reverses the order of text.
    """
    from dataclasses import asdict

    from cluscomp_runtime import load

    with ProgressDisplay() as progress:
        progress("loading", 0, 1)
        loaded = load(model, device=device, kernel=kernel, selftest=selftest, delta=delta)
    say(f"kernel: {loaded.kernel_summary}")
    text = loaded.chat([{"role": "user", "content": prompt}]) if chat else prompt
    stream = loaded.stream(text, add_special_tokens=not chat, **options)
    if not as_json and not chat:
        show(prompt, end="", raw=raw)
    for piece in stream:
        if not as_json:
            show(piece, end="", raw=raw)
    result = stream.finish()
    if as_json:
        rates = {"new_tokens": result.new_tokens, "tokens_per_second": result.tokens_per_second}
        print_json({**asdict(result), **rates, "kernel": loaded.kernel_summary})
        return
    show()
    say(f"{result.new_tokens} tokens, {result.tokens_per_second:.1f} tokens/s, stopped by {result.stop_reason}")


for command in (plan, tune, merge):
    cli.add_command(command)


def _write_json(path: Path, document: Any, *, force: bool) -> None:
    with atomic_write(path, force=force) as stream:
        stream.write(json_document(document).encode() + b"\n")


def _report(error: ClusCompError, *, as_json: bool, exit_code: int) -> None:
    if as_json:
        print_json({"exit_code": exit_code, "problems": [problem.as_dict() for problem in error.problems]})
    else:
        for problem in grouped(error.problems):
            say(f"error: {problem}")


def main() -> None:
    """Entry point of the `cluscomp-export` command."""
    as_json = "--json" in sys.argv

    def show_warning(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        say(f"warning: {message}")

    if isinstance(sys.stdout, io.TextIOWrapper):
        # Names of files need not be text, and not every stream takes every text.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with warnings.catch_warnings():
            warnings.showwarning = show_warning
            code = cli.main(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except ClusCompError as error:
        _report(error, as_json=as_json, exit_code=error.exit_code)
        code = error.exit_code
    except OSError as error:
        # A file that went away meanwhile, for instance.
        refused = storage_error(Path(os.fsdecode(error.filename)) if isinstance(error.filename, str | bytes) else None, error)
        _report(refused, as_json=as_json, exit_code=refused.exit_code)
        code = refused.exit_code
    except (KeyboardInterrupt, click.Abort):
        say("interrupted; no output was written")
        code = INTERRUPTED
    sys.exit(code if isinstance(code, int) else 0)


if __name__ == "__main__":
    main()
