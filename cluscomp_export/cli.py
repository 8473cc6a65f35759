"""The command line: options in, one library call, an exit code out.

Results go to standard output, progress and messages to standard error. Exit codes: 0 success, 1 `verify` found a difference,
2 a usage error or `verify` could not tell, 3 an invalid file, 4 something this version does not support, 5 the output exists,
6 a storage problem, 7 a failed self-test, 130 interrupted.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import click
from click.shell_completion import CompletionItem

from cluscomp_export.terminal import ProgressDisplay, print_json, print_table, say
from cluscomp_formats.errors import ClusCompError, printable
from cluscomp_formats.version import __version__

if TYPE_CHECKING:
    from cluscomp_export.convert import Prepared

__all__ = ["main"]

PATH = click.Path(path_type=Path)
JSON = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on standard output.")
DEVICE = click.option("--device", default="cpu", show_default=True, help="Where to compute: cpu, cuda, cuda:1, ...")
INTERRUPTED = 130


def _output_formats() -> tuple[str, ...]:
    from cluscomp_export.writers import output_formats

    return output_formats()


class _OutputFormat(click.types.StringParamType):
    """The name of a format that can be written; plug-ins are not looked for before somebody asks."""

    name = "format"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if value not in _output_formats():
            self.fail(f"{value!r} is not one of {', '.join(_output_formats())}.", param, ctx)
        return value

    # click 8.1 passes no context.
    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        return f"[{'|'.join(_output_formats())}]"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return [CompletionItem(name) for name in _output_formats() if name.startswith(incomplete)]


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

    MODEL is a Hugging Face folder with safetensors, a GGUF file, an authors' ClusComp checkpoint or whatever convert made.
    Nothing is ever downloaded.

    Tab completion: eval "$(_CLUSCOMP_EXPORT_COMPLETE=bash_source cluscomp-export)" (or zsh_source, fish_source).
    """


class _Size(click.types.StringParamType):
    """A number of bytes, with or without a unit."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        from cluscomp_export.sizes import parse_bytes

        try:
            return parse_bytes(str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)


def _planning_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """What `convert` and `plan` take both."""
    options = (
        click.option(
            "--to",
            type=_OutputFormat(),
            default="packed",
            show_default=True,
            help="The format to write: one .clus file, a Hugging Face folder, a GGUF file, an ONNX folder, or a plug-in's.",
        ),
        click.option(
            "--gguf-type",
            type=click.Choice(["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"]),
            help="With --to gguf: decode and store as this type, for stock llama.cpp. [default: codebooks and codes]",
        ),
        click.option(
            "--bits", type=float, help="Most bits per weight of the linear layers, codebooks and scales counted. [default: 4]"
        ),
        click.option(
            "--budget",
            type=_Size(),
            metavar="SIZE",
            help="Most bytes of the whole artefact, embedding and head included: 16MB, 1.5GiB, ... Excludes --bits.",
        ),
        click.option(
            "--match-loss",
            type=float,
            metavar="NATS",
            help="The smallest artefact whose divergence from the source is at most this, in nats per token, predicted on the "
            "calibration text, before error feedback and training. Excludes --bits.",
        ),
        click.option("--plan", type=PATH, help="A plan that `plan --save` has written, edited or not. Excludes --bits."),
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
            help="Most bits per weight of embedding and head; 16 keeps them dense. [default: the width in the source]",
        ),
        click.option(
            "--sensitivity",
            type=click.Choice(["measured", "equal"]),
            help="Measure how much predictions suffer from errors of each tensor and give bits where they matter, or take all "
            "weights for equal. [default: measured, given a calibration text and an architecture the runtime knows]",
        ),
        click.option(
            "--calibration",
            metavar="FILE|none",
            help="A text that tells which weights and inputs matter. [default: a text of this package; none with --dim]",
        ),
        click.option(
            "--effort",
            type=click.Choice(["fast", "balanced", "best"]),
            help="fast only clusters; balanced chooses codes that make up for each other's errors on the calibration text; "
            "best then trains codebooks and scales on it, which takes much longer. [default: balanced; fast with --dim]",
        ),
        click.option(
            "--method",
            type=click.Choice(["fast", "lloyd"]),
            default="fast",
            show_default=True,
            help="How to cluster: fast is at least as good in a fraction of the time; lloyd is plain k-means, as in the paper.",
        ),
        click.option("--seed", type=int, default=0, show_default=True, help="The same seed gives the same bytes."),
    )
    for option in reversed(options):
        command = option(command)
    return command


@cli.command()
@click.argument("source", type=PATH)
@click.argument("output", type=PATH)
@_planning_options
@click.option("--threads", type=click.IntRange(min=1), help="Threads to use. [default: all cores]")
@DEVICE
@click.option("--dry-run", is_flag=True, help="Show the plan and the predicted size; write nothing.")
@click.option("--force", is_flag=True, help="Replace the output if it exists.")
@JSON
def convert(source: Path, output: Path, *, dry_run: bool, force: bool, as_json: bool, **options: Any) -> None:
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

    Memory stays near the largest tensor (--effort balanced: near one block of the model; best: above the model as float32).
    OUTPUT is complete or not there; SOURCE is never changed. A clustering that fails or is interrupted keeps what it has
    finished in a folder .OUTPUT.work beside OUTPUT: run the same command again to go on.
    """
    from cluscomp_export.convert import ConversionOptions, prepare
    from cluscomp_export.convert import convert as run
    from cluscomp_export.work_folder import work_path

    chosen = ConversionOptions(**options)
    if dry_run:
        with ProgressDisplay() as progress:
            prepared = prepare(source, chosen, progress)
        _show_plan(prepared, as_json=as_json)
        return
    try:
        with ProgressDisplay() as progress:
            report = run(source, output, chosen, force=force, on_progress=progress)
    except BaseException:
        if work_path(output).is_dir():
            say(f"what is finished is kept in {work_path(output)}: run the same command again to go on")
        raise
    for text in report.warnings:
        say(f"warning: {text}")
    if report.reused:
        say(f"went on from an interrupted conversion: {report.reused} finished parts were taken up again")
    if as_json:
        print_json(vars(report))
        return
    bits = report.bits_per_weight
    print_table(
        ("", "source", chosen.to),
        [("MB", f"{report.source_file_bytes / 1e6:.1f}", f"{report.file_bytes / 1e6:.1f}")],
    )
    click.echo(f"bits per weight: {bits['linears']:.2f} (linear layers), {bits['all']:.2f} (everything)")
    if report.digest:
        click.echo(report.digest)
    click.echo(f"wrote {report.output} in {report.seconds:.0f} s")


def _show_plan(prepared: Prepared, *, as_json: bool) -> None:
    from cluscomp_export.plan_report import explain
    from cluscomp_export.tables import print_plan

    report = explain(prepared)
    if as_json:
        print_json(report)
        return
    print_plan(report)
    for text in prepared.warnings:
        say(f"warning: {text}")


@cli.command()
@click.argument("source", type=PATH)
@_planning_options
@click.option("--save", type=PATH, metavar="FILE", help="Write the plan as JSON, for `convert --plan`.")
@click.option("--force", is_flag=True, help="Replace FILE if it exists.")
@JSON
def plan(source: Path, *, save: Path | None, force: bool, as_json: bool, **options: Any) -> None:
    """Show how SOURCE would be stored and why, without converting it.

    \b
    Examples:
      cluscomp-export plan llama/ --bits 3
      cluscomp-export plan llama/ --budget 55MB --to gguf
      cluscomp-export plan llama/ --match-loss 0.1 --json
      cluscomp-export plan llama/ --bits 3 --save plan.json    then edit it, and: convert llama/ llama.clus --plan plan.json

    The sensitivity of a tensor is the loss, in nats per token, that a squared error as large as its weights' squares would
    cost, as measured with gradients on the calibration text; the loss of a plan is the sum of sensitivity times expected error.
    The size is that of the whole artefact, at most: exact but for the digits of checksums and of the self-test record.
    """
    from cluscomp_export.convert import ConversionOptions, prepare
    from cluscomp_export.planning.plan_file import write_plan
    from cluscomp_formats.atomic import check_output

    if save is not None:
        check_output(save, force=force)
    with ProgressDisplay() as progress:
        prepared = prepare(source, ConversionOptions(**options), progress)
    if save is not None:
        if prepared.plan is None:
            raise click.UsageError("there is no plan to save: SOURCE is clustered already")
        write_plan(prepared.plan, save, force=force)
    _show_plan(prepared, as_json=as_json)


@cli.command()
@click.argument("model", type=PATH)
@click.option("--quick", is_flag=True, help="Read the header only: no digest, no checksums, no use of codebooks.")
@click.option("--reference", type=PATH, help="The original: adds the error of each tensor against it.")
@JSON
def inspect(model: Path, *, quick: bool, reference: Path | None, as_json: bool) -> int:
    """Show what MODEL holds: architecture, settings per tensor, bits per weight, how its codebooks are used, worst tensors.

    Everything is read, and all that is wrong with it is listed; exit code 3 then.
    """
    from cluscomp_export.inspection import inspect_model
    from cluscomp_export.tables import print_inspection

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
@DEVICE
@JSON
def verify(a: Path, b: Path, *, device: str, as_json: bool) -> int:
    """Check that A and B are the same model, or that one was made from the other.

    Exit code 0: equal, or derived from that source and sound. 1: different, or a self-test fails. 2: could not tell.
    """
    from dataclasses import asdict

    from cluscomp_export.verify import verify as run

    try:
        with ProgressDisplay() as progress:
            result = run(a, b, device=device, on_progress=progress)
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
        click.echo(
            f"logits on the self-test sequences: KL {values['kl']:.4f}, top-1 agreement {100 * values['top1']:.1f} %, "
            f"largest difference {values['max_difference']:.4g}"
        )
    for name, test in result.self_tests.items():
        verdict = {True: "passed", False: "FAILED", None: "not run"}[test["passed"]]
        detail = f" (difference {test['max_difference']:.3g}, allowed {test['tolerance']:.3g})" if "tolerance" in test else ""
        click.echo(f"self-test of {name}: {verdict}{detail}")
    for reason in result.reasons:
        click.echo(f"- {printable(reason)}")
    click.echo(result.verdict.upper())
    return result.exit_code


@cli.command(name="eval")
@click.argument("model", type=PATH)
@click.option("--text", type=PATH, required=True, help="A UTF-8 text file.")
@click.option("--reference", type=PATH, help="The original: adds KL divergence and top-1 agreement against it.")
@click.option("--windows", type=click.IntRange(min=1), help="How many windows of the text to use. [default: all]")
@click.option("--context", type=int, default=512, show_default=True, help="Tokens per window; the second half is scored.")
@DEVICE
@JSON
def evaluate(
    model: Path, *, text: Path, reference: Path | None, windows: int | None, context: int, device: str, as_json: bool
) -> None:
    """Perplexity of MODEL on a text, in llama.cpp's protocol (windows of 512 tokens, second half scored)."""
    from dataclasses import asdict

    from cluscomp_export.evaluate import evaluate_files

    with ProgressDisplay() as progress:
        result = evaluate_files(
            model, text=text, reference=reference, windows=windows, context=context, device=device, on_progress=progress
        )
    if as_json:
        print_json(asdict(result))
        return
    click.echo(
        f"perplexity {result.perplexity:.4f} +/- {result.perplexity_error:.4f} ({result.windows} windows of {result.context})"
    )
    if result.kl is not None and result.top1 is not None:
        click.echo(f"reference perplexity {result.reference_perplexity:.4f}")
        click.echo(f"KL divergence {result.kl:.4f} nats per token, top-1 agreement {100 * result.top1:.1f} %")


@cli.command()
@click.argument("model", type=PATH)
@click.argument("prompt")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=128, show_default=True)
@click.option("--chat", is_flag=True, help="Treat PROMPT as a user's message, through the model's chat template.")
@click.option("--temperature", type=click.FloatRange(min=0), default=0.0, show_default=True, help="0 is greedy.")
@click.option("--top-k", type=click.IntRange(min=1), help="Sample among the k likeliest tokens.")
@click.option(
    "--top-p", type=click.FloatRange(min=0, max=1), help="Sample among the likeliest tokens of this total probability."
)
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the sampling.")
@DEVICE
@click.option(
    "--kernel", default="auto", show_default=True, help="Force a kernel: native, embedding_bag, triton, dense, reference."
)
@click.option("--selftest", is_flag=True, help="Run the self-test first; fail if the model computes something else.")
@JSON
def generate(
    model: Path, prompt: str, *, device: str, kernel: str, selftest: bool, chat: bool, as_json: bool, **options: Any
) -> None:
    """Continue PROMPT with MODEL."""
    from dataclasses import asdict

    from cluscomp_runtime import load

    with ProgressDisplay() as progress:
        progress("loading", 0, 1)
        loaded = load(model, device=device, kernel=kernel, selftest=selftest)
    say(f"kernel: {loaded.kernel_summary}")
    text = loaded.chat([{"role": "user", "content": prompt}]) if chat else prompt
    stream = loaded.stream(text, add_special_tokens=not chat, **options)
    if not as_json and not chat:
        click.echo(prompt, nl=False)
    for piece in stream:
        if not as_json:
            click.echo(piece, nl=False)
            sys.stdout.flush()
    result = stream.finish()
    if as_json:
        rates = {"new_tokens": result.new_tokens, "tokens_per_second": result.tokens_per_second}
        print_json({**asdict(result), **rates, "kernel": loaded.kernel_summary})
        return
    click.echo()
    say(f"{result.new_tokens} tokens, {result.tokens_per_second:.1f} tokens/s, stopped by {result.stop_reason}")


def _report(error: ClusCompError, *, as_json: bool, exit_code: int) -> None:
    if as_json:
        print_json({"exit_code": exit_code, "problems": [problem.as_dict() for problem in error.problems]})
    else:
        for problem in error.problems:
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
    except (KeyboardInterrupt, click.Abort):
        say("interrupted; no output was written")
        code = INTERRUPTED
    sys.exit(code if isinstance(code, int) else 0)


if __name__ == "__main__":
    main()
