"""Options that several commands take."""

from __future__ import annotations

from pathlib import Path

import click
from click.shell_completion import CompletionItem

__all__ = ["DEVICE", "GGUF_TYPE", "JSON", "PATH", "OutputFormat"]

PATH = click.Path(path_type=Path)
JSON = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on standard output.")
DEVICE = click.option("--device", default="cpu", show_default=True, help="Where to compute: cpu, cuda, cuda:1, ...")
GGUF_TYPE = click.option(
    "--gguf-type",
    type=click.Choice(["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"]),
    help="With --to gguf: decode and store as this type, for stock llama.cpp. [default: codebooks and codes]",
)


def _output_formats() -> tuple[str, ...]:
    from cluscomp_export.writers import output_formats

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
