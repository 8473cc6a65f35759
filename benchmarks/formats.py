"""One model in every format, in every program that runs it: `python benchmarks/formats.py MODEL [--json FILE]`.

- programs: for every format, in each program that runs it, in a process of its own: size on disk, seconds to load, tokens per
  second of greedy decoding (batch 1), peak resident memory, what of it the empty program takes, and the largest difference of
  the logits after the prompt from ours in float64, where the program gives logits.
- conversions: from every format of ours to every other, against `cp -r` and fsync of the result.

MODEL is anything the tool converts. The JavaScript programs are those of `tests/programs`: run `make programs` first.
Correctness comes first: all digests are equal, every conversion gives the same bytes, and every program that computes with the
same weights says the same tokens. Programs take turns; medians and ranges over `--repetitions` are given.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from measuring import copy_and_sync, spread, summary, timed

from cluscomp_export.conversion.convert import ConversionOptions, convert
from cluscomp_export.conversion.output_format import output_format
from cluscomp_export.sources import open_source
from cluscomp_formats.format import Format
from cluscomp_formats.progress import silent
from cluscomp_runtime import LanguageModel

sys.path.append(str(Path(__file__).parents[1] / "tests" / "programs"))
import browser
import node_programs

FORMATS = ("packed", "hf", "gguf", "onnx")
PROMPT = "The capital of France is"

ROWS = (
    ("packed", "ours"),
    ("hf", "ours"),
    ("gguf", "ours"),
    ("onnx", "ours"),
    ("hf", "transformers"),
    ("onnx", "onnxruntime"),
    ("onnx", "onnxruntime, compact"),
    ("onnx", "transformers.js, node"),
    ("onnx", "onnxruntime-web, node"),
    ("onnx", "onnxruntime-web, Chromium"),
    ("gguf, f16", "llama.cpp"),
    ("gguf, q8_0", "llama.cpp"),
)
SCRIPTS = {
    "onnxruntime-web, node": "onnxruntime_web.mjs",
    "transformers.js, node": "transformers_js.mjs",
    "llama.cpp": "llama_cpp.mjs",
}
PAGES = {"onnxruntime-web, Chromium": "onnxruntime_web.html"}


def artefacts(source: Path, folder: Path, bits: float) -> dict[str, Path]:
    """The model in every format, by name of the row."""
    made = {name: folder / name for name in FORMATS}
    convert(source, made["packed"], ConversionOptions(bits=bits))
    for name in FORMATS[1:]:
        convert(made["packed"], made[name], ConversionOptions(to=name))
    digests = {name: open_source(path).digest() for name, path in made.items()}
    assert len(set(digests.values())) == 1, f"the digests differ: {digests}"
    for gguf_type in ("f16", "q8_0"):
        made[f"gguf, {gguf_type}"] = folder / f"{gguf_type}.gguf"
        convert(made["packed"], made[f"gguf, {gguf_type}"], ConversionOptions(to="gguf", gguf_type=gguf_type))
    return made


def contents(path: Path) -> dict[str, bytes]:
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    return {str(file.relative_to(path)): file.read_bytes() for file in files}


def conversions(made: dict[str, Path], folder: Path, repetitions: int) -> list[dict[str, Any]]:
    """Every pair of formats against `cp -r`. Opening the source and syncing the result count, starting the tool does not."""
    rows = []
    for source, target in itertools.product(FORMATS, FORMATS):
        output, copy = folder / "converted", folder / "copied"
        fmt = output_format(target)

        def run(source: str = source, fmt: Format = fmt, output: Path = output) -> None:
            fmt.write(open_source(made[source]), output, force=False, self_test=None, on_progress=silent)

        times: dict[str, list[float]] = {"convert": [], "cp": []}
        for repetition in range(repetitions):
            os.sync()
            times["convert"].append(timed(run))
            if repetition == 0:
                assert contents(output) == contents(made[target]), f"{source} to {target} gives other bytes"
            times["cp"].append(timed(lambda target=target, copy=copy: copy_and_sync(made[target], copy)))
            for path in (output, copy):
                subprocess.run(["rm", "-r", path], check=True)
        rows.append({"from": source, "to": target, **summary(times["convert"], times["cp"])})
    return rows


def run_program(program: str, request: dict[str, Any]) -> dict[str, Any]:
    """Run a program on a request in a process of its own."""
    answer: dict[str, Any]
    if program in PAGES:
        answer = browser.run_page(find_chromium(), PAGES[program], Path(request["folder"]), request)
    elif program in SCRIPTS:
        answer = node_programs.run(SCRIPTS[program], request)
    else:
        command = [sys.executable, str(Path(__file__).with_name("run_program.py")), program]
        done = subprocess.run(command, input=json.dumps(request), capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{program} failed:\n{done.stderr}")
        answer = json.loads(done.stdout.splitlines()[-1])
    return answer


def find_chromium() -> str:
    found = next(filter(None, map(shutil.which, browser.CHROMIUM)), None)
    if found is None:
        raise SystemExit("needs a Chromium: apt-get install chromium")
    return found


def programs(made: dict[str, Path], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Every row of `ROWS`, its process started once per repetition, all rows in turn."""
    model = open_source(made["packed"])
    ours = LanguageModel.from_model(model)
    assert ours.tokenizer is not None, "the model has no tokenizer"
    prompt = ours.tokenizer.encode(PROMPT)
    exact = LanguageModel.from_model(model, dtype=torch.float64, kernel="reference").forward(torch.tensor([prompt]))[0, -1]
    ours.end_tokens = frozenset()
    expected = ours.generate(prompt, max_new_tokens=options.tokens)
    answers: dict[tuple[str, str], list[dict[str, Any]]] = {row: [] for row in ROWS}
    for repetition, (name, program) in itertools.product(range(options.repetitions), ROWS):
        request = {
            "folder": str(made[name]),
            "path": str(made[name]),
            "prompt": PROMPT,
            "prompt_ids": prompt,
            "new_tokens": options.tokens,
            "session_options": {"intraOpNumThreads": options.threads},
            "threads": options.threads,
            "text": PROMPT,
            "windows": [],
        }
        answer = run_program(program, request)
        answers[name, program].append(answer)
        # A dense GGUF is another model, of rounded weights.
        if repetition == 0 and not name.startswith("gguf,"):
            said = answer.get("ids", answer.get("text"))
            assert said == (list(expected.token_ids) if "ids" in answer else expected.text), f"{program} says something else"
    return [_program_row(name, program, answers[name, program], made[name], exact) for name, program in ROWS]


def _program_row(name: str, program: str, answers: list[dict[str, Any]], path: Path, exact: torch.Tensor) -> dict[str, Any]:
    logits = answers[0].get("logits")
    return {
        "format": name,
        "program": program,
        "file_bytes": sum(len(content) for content in contents(path).values()),
        "load_seconds": spread([answer["load_seconds"] for answer in answers]),
        "tokens_per_second": spread([answer["tokens_per_second"] for answer in answers]),
        # A browser does not tell.
        "peak_bytes": max((answer["peak_bytes"] for answer in answers), key=lambda count: count or 0),
        "base_bytes": max((answer["base_bytes"] for answer in answers), key=lambda count: count or 0),
        "largest_difference": None if logits is None else float((torch.tensor(logits).double() - exact).abs().max()),
    }


def report(result: dict[str, Any]) -> str:
    """Markdown, as in docs/results.md."""
    lines = [
        "| format | program | MB | load, s | tokens/s | peak MB | empty MB | logits differ by |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in result["programs"]:
        load, rate = row["load_seconds"], row["tokens_per_second"]
        cells = [
            row["format"],
            row["program"],
            f"{row['file_bytes'] / 1e6:.1f}",
            f"{load['median']:.2f} ({load['min']:.2f} to {load['max']:.2f})",
            f"{rate['median']:.1f} ({rate['min']:.1f} to {rate['max']:.1f})",
            *("" if row[key] is None else f"{row[key] / 1e6:.0f}" for key in ("peak_bytes", "base_bytes")),
            "" if row["largest_difference"] is None else f"{row['largest_difference']:.1e}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", f"| from \\ to | {' | '.join(FORMATS)} |", "|---" * (len(FORMATS) + 1) + "|"]
    pairs = {(row["from"], row["to"]): row for row in result["conversions"]}
    for source in FORMATS:
        cells = ["{ratio:.2f} ({ratio_min:.2f} to {ratio_max:.2f})".format(**pairs[source, target]) for target in FORMATS]
        lines.append(f"| {source} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--bits", type=float, default=3.0)
    parser.add_argument("--tokens", type=int, default=64, help="tokens to generate (default 64)")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument(
        "--folder", type=Path, help="where the files go; on the disk to be measured (default: a temporary folder)"
    )
    parser.add_argument("--json", type=Path, help="also write everything there")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        made = artefacts(options.model, Path(name), options.bits)
        result = {
            "conversions": conversions(made, Path(name), options.repetitions),
            "programs": programs(made, options),
        }
    if options.json:
        options.json.write_text(json.dumps(result, indent=1), encoding="utf-8")
    print(report(result))


if __name__ == "__main__":
    main()
