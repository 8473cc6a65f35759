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
from typing import TextIO

import click

from cluscomp_export.cli.bench import bench
from cluscomp_export.cli.convert import convert, plan
from cluscomp_export.cli.evaluate import evaluate
from cluscomp_export.cli.generate import generate
from cluscomp_export.cli.inspect import inspect, verify
from cluscomp_export.cli.messages import report_error, warn
from cluscomp_export.cli.terminal import say
from cluscomp_export.cli.tune import merge, tune
from cluscomp_formats.errors import ClusCompError
from cluscomp_formats.files.atomic import storage_error
from cluscomp_formats.version import __version__

__all__ = ["main"]

INTERRUPTED = 130


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="cluscomp-export")
def cli() -> None:
    """Turn a language model into a ClusComp codebook model, and run it.

    \b
    A typical session:
      cluscomp-export plan MODEL --bits 3                            preview layout and file size
      cluscomp-export convert MODEL model.clus --bits 3              compress it
      cluscomp-export verify MODEL model.clus                        check the result
      cluscomp-export bench model.clus                               measure its speed and memory
      cluscomp-export generate model.clus "The capital of France is"
      cluscomp-export tune model.clus my.delta --text my.txt         train its codebooks on a text
      cluscomp-export merge model.clus my.delta tuned.clus           a model like any other

    MODEL is a Hugging Face folder with safetensors, a GGUF file, a checkpoint of the ClusComp authors, or a file that convert
    made. Nothing is ever downloaded.

    Tab completion: eval "$(_CLUSCOMP_EXPORT_COMPLETE=bash_source cluscomp-export)" (or zsh_source, fish_source).
    """


for each in (convert, plan, inspect, verify, evaluate, bench, generate, tune, merge):
    cli.add_command(each)


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
        warn(str(message))

    if isinstance(sys.stdout, io.TextIOWrapper):
        # Names of files need not be text, and not every stream can encode every text.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with warnings.catch_warnings():
            warnings.showwarning = show_warning
            code = cli.main(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except ClusCompError as error:
        report_error(error, as_json=as_json, exit_code=error.exit_code)
        code = error.exit_code
    except OSError as error:
        # A file that disappeared meanwhile, for instance.
        refused = storage_error(Path(os.fsdecode(error.filename)) if isinstance(error.filename, str | bytes) else None, error)
        report_error(refused, as_json=as_json, exit_code=refused.exit_code)
        code = refused.exit_code
    except (KeyboardInterrupt, click.Abort):
        say("interrupted; no output was written")
        code = INTERRUPTED
    sys.exit(code if isinstance(code, int) else 0)


if __name__ == "__main__":
    main()
