"""What the options of several commands are made of: types, and help under headings."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click
from click.shell_completion import CompletionItem

from cluscomp_export.cli.messages import FLAGS
from cluscomp_formats.errors import printable

__all__ = [
    "DEVICE",
    "GGUF_TYPE",
    "JSON",
    "OUTPUT",
    "PATH",
    "PRECISIONS",
    "RESOURCES",
    "SCHEDULES",
    "Command",
    "Decorator",
    "OutputFormat",
    "command",
    "option",
]

RESOURCES, OUTPUT = "Resources", "Output"
"""Headings that several commands have."""

AnyFunction = TypeVar("AnyFunction", bound=Callable[..., Any])
Decorator = Callable[[AnyFunction], AnyFunction]


class _Option(click.Option):
    def __init__(self, *names: Any, heading: str, **settings: Any) -> None:
        super().__init__(*names, **settings)
        self.heading = heading
        FLAGS[str(self.name)] = self


class Command(click.Command):
    """A command whose help lists its options under headings, in the order in which they are declared."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        headings: dict[str, list[tuple[str, str]]] = {"Options": []}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            # Arguments, which newer releases of click have records of, are explained in the text.
            if record is not None and isinstance(param, click.Option):
                headings.setdefault(getattr(param, "heading", "Options"), []).append(record)
        for heading, records in headings.items():
            with formatter.section(heading):
                formatter.write_dl(records)


def command(name: str | None = None) -> Callable[[Callable[..., Any]], Command]:
    """`click.command`, with headings."""
    return click.command(name, cls=Command)


def option(*names: str, heading: str = "Options", **settings: Any) -> Decorator[Any]:
    """`click.option`, under a heading of the help."""
    return click.option(*names, cls=_Option, heading=heading, **settings)


class _AnyPath(click.Path):
    """A path, whatever it leads to: the command says what is wrong with that."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            return super().convert(value, param, ctx)
        except ValueError as error:
            # It looks even at what need not exist.
            self.fail(f"{printable(str(value))} is a name no file can have: {error}.", param, ctx)


PATH = _AnyPath(path_type=Path)
SCHEDULES = click.Choice(["cosine", "linear", "constant"])
PRECISIONS = click.Choice(["float32", "bfloat16"])


def _output_formats() -> tuple[str, ...]:
    from cluscomp_export.conversion.output_format import output_formats

    return output_formats()


class OutputFormat(click.types.StringParamType):
    """The name of a format that can be written; plug-ins are not looked up before somebody asks."""

    name = "format"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if value not in _output_formats():
            self.fail(f"{value!r} is not one of {', '.join(_output_formats())}.", param, ctx)
        return value

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        return f"[{'|'.join(_output_formats())}]"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return [CompletionItem(name) for name in _output_formats() if name.startswith(incomplete)]


JSON = option("--json", "as_json", is_flag=True, help="Print the result as JSON on standard output.")
DEVICE = option("--device", default="cpu", show_default=True, help="Where to compute: cpu, cuda, cuda:1, ...")
GGUF_TYPE = option(
    "--gguf-type",
    type=click.Choice(["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"]),
    help="With --to gguf: decode, and store as this type for stock llama.cpp. [default: codebooks and codes]",
)
