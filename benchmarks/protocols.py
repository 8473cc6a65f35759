"""What a protocol does to perplexity: one model and one text under each, with each of the differences by itself.

    .venv/bin/python benchmarks/protocols.py MODEL --text wiki.test.raw --windows 4

`--windows` counts 2048 tokens; all protocols get as many tokens. With `--json` the figures come with what is needed to repeat
them. The tests hold every protocol against an independent computation.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from cluscomp_export.cli.terminal import print_table, say
from cluscomp_export.evaluation.evaluate import evaluate_files

VARIANTS: dict[str, dict[str, Any]] = {
    "llama.cpp": {},
    "llama.cpp, lines joined": {"join": "rows"},
    "gptq at 512": {"protocol": "gptq", "context": 512},
    "gptq at 2048": {"protocol": "gptq", "context": 2048},
    "gptq at 2048, not joined": {"protocol": "gptq", "context": 2048, "join": "none"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=4, help="of 2048 tokens")
    parser.add_argument("--json", action="store_true", help="print the figures for machines")
    arguments = parser.parse_args()
    found = {}
    for name, options in VARIANTS.items():
        windows = arguments.windows * 2048 // options.get("context", 512)
        found[name] = vars(evaluate_files(arguments.model, text=arguments.text, windows=windows, **options))
        say(f"{name}: {found[name]['perplexity']:.3f}")
    if arguments.json:
        print(json.dumps(found, indent=2))
        return
    rows = [
        (name, row["scored_tokens"], f"{row['perplexity']:.2f}", f"{row['perplexity_error']:.2f}")
        for name, row in found.items()
    ]
    print_table(("protocol", "tokens scored", "perplexity", "+/-"), rows)


if __name__ == "__main__":
    main()
