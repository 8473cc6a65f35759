"""Warnings and errors of the library, in the words of the command line."""

from __future__ import annotations

import re

import click

from cluscomp_export.cli.terminal import print_json, say
from cluscomp_formats.errors import ClusCompError, grouped

__all__ = ["FLAGS", "report_error", "warn", "with_flags"]

FLAGS: dict[str, click.Option] = {}
"""The options of all commands, by the names that the library has for them."""


def with_flags(text: str) -> str:
    """A message of the library in the words of the command line: `` `dim` `` becomes --dim, `` `share='none'` `` --share none.

    The library names options as Python does, in backquotes. What is not an option of a command stays as it is.
    """

    def flag(match: re.Match[str]) -> str:
        param, value = FLAGS.get(match[1]), match[2]
        if param is None:
            return match[0]
        if value == "False" and param.secondary_opts:
            return param.secondary_opts[0]
        name = max(param.opts, key=len)
        return name if value is None or param.is_flag else f"{name} {value.strip(chr(39))}"

    return re.sub(r"`(\w+)(?:=([^`]*))?`", flag, text)


def warn(text: str) -> None:
    """Show a warning of the library."""
    say(f"warning: {with_flags(text)}")


def report_error(error: ClusCompError, *, as_json: bool, exit_code: int) -> None:
    """Show an error: as text on standard error, or as JSON, in the library's own words, on standard output."""
    if as_json:
        print_json({"exit_code": exit_code, "problems": [problem.as_dict() for problem in error.problems]})
    else:
        for problem in grouped(error.problems):
            say(f"error: {with_flags(str(problem))}")
