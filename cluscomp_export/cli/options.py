"""Options that several commands take."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click
from click.shell_completion import CompletionItem

from cluscomp_formats.errors import printable

__all__ = ["DEVICE", "GGUF_TYPE", "JSON", "PATH", "PRECISIONS", "SCHEDULES", "OutputFormat", "level_options", "levels_from"]


class _AnyPath(click.Path):
    """A path, whatever is there: the command says what is wrong with that."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            return super().convert(value, param, ctx)
        except ValueError as error:
            # It looks even at what need not exist.
            self.fail(f"{printable(str(value))} is a name no file can have: {error}.", param, ctx)


PATH = _AnyPath(path_type=Path)
JSON = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on standard output.")
DEVICE = click.option("--device", default="cpu", show_default=True, help="Where to compute: cpu, cuda, cuda:1, ...")
GGUF_TYPE = click.option(
    "--gguf-type",
    type=click.Choice(["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"]),
    help="With --to gguf: decode and store as this type, for stock llama.cpp. [default: codebooks and codes]",
)


def _output_formats() -> tuple[str, ...]:
    from cluscomp_export.conversion.output_format import output_formats

    return output_formats()


class OutputFormat(click.types.StringParamType):
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


SCHEDULES = click.Choice(["cosine", "linear", "constant"])
PRECISIONS = click.Choice(["float32", "bfloat16"])
_LEVEL_OPTIONS = (
    click.option(
        "--feedback/--no-feedback", default=None, help="Error feedback, or the nearest centroid. [default: by --effort]"
    ),
    click.option(
        "--calibration-windows",
        type=int,
        metavar="N",
        help="Windows of the text, from all over it, for all but recovery. [default: 64; best: 256]",
    ),
    click.option(
        "--calibration-context",
        type=int,
        metavar="N",
        help="Tokens of such a window. [default: 512, or what the model was trained for]",
    ),
    click.option(
        "--blockwise-epochs", type=int, metavar="N", help="Times over the windows for each block; 0: no tuning. [default: 2]"
    ),
    click.option("--blockwise-batch", type=int, metavar="N", help="Windows per step. [default: 2]"),
    click.option(
        "--blockwise-lr", "blockwise_rate", type=float, help="Learning rate, relative to a tensor's size. [default: 0.002]"
    ),
    click.option("--blockwise-schedule", type=SCHEDULES, help="[default: cosine]"),
    click.option(
        "--blockwise-same-input",
        type=float,
        metavar="WEIGHT",
        help="Weight of the paper's second loss: against what the original block makes of the same input. [default: 0]",
    ),
    click.option(
        "--blockwise-held-out", type=float, metavar="SHARE", help="Windows that only tell which state is best. [default: 0.125]"
    ),
    click.option(
        "--blockwise-patience", type=int, metavar="N", help="Stop a block after N epochs without progress. [default: 2]"
    ),
    click.option("--blockwise-precision", type=PRECISIONS, help="What matrices are multiplied in. [default: float32]"),
    click.option("--recovery-steps", type=int, metavar="N", help="Steps to train for, end to end; 0: none. [default: 48]"),
    click.option("--recovery-batch", type=int, metavar="N", help="Windows per step. [default: 4]"),
    click.option("--recovery-context", type=int, metavar="N", help="Tokens of a window. [default: 512]"),
    click.option(
        "--recovery-lr",
        "recovery_rate",
        type=float,
        help="Learning rate, relative to a tensor's size. [default: 0.0015 times the square root of the divergence before]",
    ),
    click.option("--recovery-schedule", type=SCHEDULES, help="[default: cosine]"),
    click.option(
        "--recovery-warmup", type=int, metavar="N", help="Steps over which the rate rises at the beginning. [default: 0]"
    ),
    click.option("--recovery-checks", type=int, metavar="N", help="How often the held-out text is looked at. [default: 8]"),
    click.option("--recovery-patience", type=int, metavar="N", help="Stop after N checks without progress. [default: 3]"),
    click.option(
        "--recovery-precision",
        type=PRECISIONS,
        help="What matrices are multiplied in. [default: bfloat16 on a CPU with AMX, else float32]",
    ),
)
_Command = TypeVar("_Command", bound=Callable[..., Any])


def level_options(command: _Command) -> _Command:
    """Options that change what `--effort` means, level by level."""
    for option in reversed(_LEVEL_OPTIONS):
        command = option(command)
    return command


def levels_from(options: dict[str, Any]) -> dict[str, Any]:
    """The options of a command with those of one level, `blockwise_epochs` and so on, gathered in a mapping for each."""
    levels: dict[str, dict[str, Any]] = {"blockwise": {}, "recovery": {}}
    others = {}
    for name, value in options.items():
        level, _, setting = name.partition("_")
        if level in levels:
            levels[level][setting] = value
        else:
            others[name] = value
    return others | levels
