"""What finetuning a compressed model gives on a text, how small its delta is, and that it is the same in every format.

    .venv/bin/python benchmarks/tuning.py model.clus --train train.txt --text valid.txt

MODEL is a codebook model. Its perplexity on the second text is measured before, with the delta swapped in, and from the merged
model in every format; all of these must be the same model by digest, pass their self-tests (in onnxruntime, too) and give the
same perplexity. Texts are other people's: they are arguments, and must not overlap.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from cluscomp_export.cli.terminal import ProgressDisplay, print_table, say
from cluscomp_export.conversion.merge import merge
from cluscomp_export.evaluation.evaluate import evaluate_files
from cluscomp_export.inspection.verify import verify
from cluscomp_export.training.finetuning import TuneOptions, tune

FORMATS = {"packed": "merged.clus", "gguf": "merged.gguf", "hf": "merged-hf", "onnx": "merged-onnx"}


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Everything the table shows; a format that is not the same model ends the benchmark."""
    options = TuneOptions(
        text=arguments.train,
        context=arguments.context,
        steps=arguments.steps,
        batch=arguments.batch,
        lr=arguments.lr,
    )
    delta = arguments.delta or folder / "tuned.delta"
    with ProgressDisplay() as progress:

        def perplexity(model: Path, change: Path | None = None) -> float:
            figures = evaluate_files(model, text=arguments.text, windows=arguments.windows, delta=change, on_progress=progress)
            return figures.perplexity

        result: dict[str, Any] = {"load": os.getloadavg()[1], "before": perplexity(arguments.model)}
        started = time.perf_counter()
        report = tune(arguments.model, delta, options, on_progress=progress)
        result |= {"tune": vars(report), "tune_seconds": time.perf_counter() - started}
        result["swapped_in"] = perplexity(arguments.model, delta)
        for name, output in FORMATS.items():
            merged = merge(arguments.model, [delta], folder / output, to=name, on_progress=progress)
            assert merged.digest == report.result
            checked = verify(folder / FORMATS["packed"], folder / output, on_progress=progress)
            assert checked.verdict == "equal", checked.reasons
            assert all(test["passed"] for test in checked.self_tests.values()), checked.self_tests
            result[name] = {"bytes": merged.file_bytes, "perplexity": perplexity(folder / output)}
            assert result[name]["perplexity"] == result["swapped_in"]
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--train", type=Path, required=True, help="text to train on")
    parser.add_argument("--text", type=Path, required=True, help="text to evaluate with")
    parser.add_argument("--windows", type=int, default=20, help="windows of 512 tokens to evaluate with")
    parser.add_argument("--steps", type=int, default=48)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--delta", type=Path, help="keep the delta there; an interrupted training goes on from beside it")
    parser.add_argument("--json", action="store_true", help="print the figures for machines")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(arguments, Path(folder))
    if arguments.json:
        print(json.dumps(result, indent=2))
        return
    report = result["tune"]
    rows = [
        ("model", f"{report['file_bytes'] / report['share_of_model'] / 1e6:.1f}", f"{result['before']:.4f}"),
        ("model + delta", f"+ {report['file_bytes'] / 1e6:.2f}", f"{result['swapped_in']:.4f}"),
        *((name, f"{result[name]['bytes'] / 1e6:.1f}", f"{result[name]['perplexity']:.4f}") for name in FORMATS),
    ]
    print_table(("", "MB", "perplexity"), rows)
    say(f"delta: {report['share_of_model']:.2%} of the model, {report['steps']} steps in {result['tune_seconds']:.0f} s")
    for entry in report["curve"]:
        say(json.dumps(entry))


if __name__ == "__main__":
    main()
