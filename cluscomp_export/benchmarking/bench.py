"""Time models against each other, each measurement in a process of its own; `docs/bench.md` defines the figures."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cluscomp_export.benchmarking.process import Measurement, Request
from cluscomp_export.benchmarking.traffic import weight_bytes
from cluscomp_export.ranges import MOST, check_range
from cluscomp_export.sources import open_source, source_bytes
from cluscomp_export.threads import check_threads
from cluscomp_formats import errors
from cluscomp_formats.architectures import check_tensors, describe
from cluscomp_formats.errors import ClusCompError, InvalidRequestError, Problem, WorkersLostError, printable
from cluscomp_formats.progress import Progress, silent

__all__ = ["NEW_TOKENS", "PROMPT_TOKENS", "REPETITIONS", "Speed", "Spread", "bench", "default_threads", "run_process"]

PROMPT_TOKENS, NEW_TOKENS, REPETITIONS = 512, 128, 5

_PROCESS = "cluscomp_export.benchmarking.process"


@dataclass(frozen=True)
class Spread:
    """Median and range over the repetitions."""

    median: float
    min: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True)
class Speed:
    """One model on one number of threads. Figures are medians over the repetitions; sizes are in bytes.

    `resident_bytes` is the memory of the process while it generates, mapped files and libraries included; `peak_bytes` the most
    it had until then (None where the system does not tell). `gigabytes_per_second` are the bytes of weights that a token reads,
    `weight_bytes`, times the tokens per second of decoding; `bandwidth_share` is that divided by
    `memory_gigabytes_per_second`, which as many threads reach when they read a buffer of that size and do nothing else.

    Ratios are relative to the first model on the same number of threads, repetition by repetition; None for the first model.
    `self_test` is "passed", or "none" if the model has no record.
    """

    path: str
    threads: int
    engine: str
    kernels: str
    self_test: str
    decode_tokens_per_second: float
    decode_spread: Spread
    decode_ratio: Spread | None
    prefill_tokens_per_second: float
    prefill_spread: Spread
    prefill_ratio: Spread | None
    load_seconds: float
    import_seconds: float
    resident_bytes: int
    peak_bytes: int | None
    file_bytes: int
    weight_bytes: int
    gigabytes_per_second: float
    memory_gigabytes_per_second: float
    bandwidth_share: float
    prompt_tokens: int
    new_tokens: int
    repetitions: int


@dataclass(frozen=True)
class _Subject:
    path: Path
    file_bytes: int
    weight_bytes: int
    positions: int
    has_self_test: bool


def bench(
    models: Sequence[Path],
    *,
    threads: Sequence[int] | None = None,
    prompt_tokens: int | None = None,
    new_tokens: int | None = None,
    repetitions: int = REPETITIONS,
    on_progress: Progress = silent,
    on_warning: Callable[[str], None] = lambda text: None,
) -> list[Speed]:
    """Time every model with every number of threads; the results are in that order.

    A repetition measures each model once, in turn, so that other jobs of the machine slow down all of them alike. Models that
    have a self-test record must pass the self-test first. A number of tokens that is None is 512 for the prompt and 128 for new
    tokens, or fewer if the models were not made for so many. `threads` defaults to 1 and all cores.

    Raises InvalidRequestError for options out of range, SelfTestError, InvalidFileError, UnsupportedError, and WorkersLostError
    if a process that measures dies.
    """
    counts = list(dict.fromkeys(default_threads() if threads is None else threads))
    for count in counts:
        check_threads(count)
    check_range("repetitions", repetitions, 1, MOST)
    subjects = [_subject(path) for path in models]
    positions = min(subject.positions for subject in subjects)
    prompt_tokens = _tokens("prompt_tokens", prompt_tokens, PROMPT_TOKENS, positions)
    new_tokens = _tokens("new_tokens", new_tokens, NEW_TOKENS, positions - 1)

    def request(subject: _Subject, count: int, *, selftest: bool = False) -> Request:
        path = str(subject.path.absolute())
        return Request(path, count, prompt_tokens, new_tokens, subject.weight_bytes, selftest)

    for number, subject in enumerate(subjects):
        on_progress("self-tests", number, len(subjects))
        if subject.has_self_test:
            run_process(request(subject, max(counts), selftest=True))
        else:
            on_warning(f"{subject.path} has no self-test record: whether it computes the right thing was not checked")
    on_progress("self-tests", len(subjects), len(subjects))

    runs: dict[tuple[int, int], list[Measurement]] = {
        (number, count): [] for number in range(len(subjects)) for count in counts
    }
    done, total = 0, repetitions * len(runs)
    for _ in range(repetitions):
        for count in counts:
            for number, subject in enumerate(subjects):
                on_progress("measuring", done, total)
                runs[number, count].append(Measurement(**run_process(request(subject, count))))
                done += 1
    on_progress("measuring", done, total)
    said = {(run_warning, number) for (number, _), measured in runs.items() for run in measured for run_warning in run.warnings}
    for text, number in sorted(said):
        on_warning(f"{subjects[number].path}: {text}")
    shape = {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "repetitions": repetitions}
    return [
        _speed(subjects[number], count, measured, None if number == 0 else runs[0, count], shape)
        for (number, count), measured in runs.items()
    ]


def default_threads() -> list[int]:
    """1, and as many as there are cores for this process."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return [1, cores] if cores > 1 else [1]


def run_process(request: Request, command: Sequence[str] = ("-P", "-m", _PROCESS)) -> dict[str, Any]:
    """The answer of a new process to a request. `command` is what the Python interpreter is started with.

    Raises the error that the process reports, WorkersLostError if it gives no answer.
    """
    path = os.pathsep.join(entry for entry in sys.path if entry)
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": str(request.threads)}
    done = subprocess.run(
        [sys.executable, *command],
        input=json.dumps(asdict(request)),
        capture_output=True,
        encoding="utf-8",
        errors="backslashreplace",
        env=environment,
        check=False,
    )
    if done.returncode or not done.stdout:
        last = next(reversed(done.stderr.strip().splitlines()), "")
        message = "the process that was to measure the model died"
        found = f"exit code {done.returncode}" + (f", {printable(last)[:200]}" if last else "")
        remedy = "if the machine ran out of memory (exit code -9), close other programs or use a smaller model"
        raise WorkersLostError(Problem("process_died", message, request.path, found=found, remedy=remedy))
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    if "error" in answer:
        kind: type[ClusCompError] = getattr(errors, answer["error"])
        problems = [Problem(**problem) for problem in answer["problems"]]
        raise kind([Problem(**{**asdict(problem), "file": problem.file or request.path}) for problem in problems])
    return answer


def _subject(path: Path) -> _Subject:
    model = open_source(path)
    description = describe(model.config)
    check_tensors(model, description)
    return _Subject(
        path,
        source_bytes(path),
        weight_bytes(model, description),
        description.max_position_embeddings,
        model.self_test is not None,
    )


def _tokens(option: str, asked: int | None, default: int, most: int) -> int:
    if asked is None:
        return max(1, min(default, most))
    if not 1 <= asked <= most:
        expected = f"1 to {most}, for which the models were made"
        raise InvalidRequestError(Problem("bad_option", f"`{option}` is out of range", found=str(asked), expected=expected))
    return asked


def _speed(
    subject: _Subject, threads: int, runs: Sequence[Measurement], first: Sequence[Measurement] | None, shape: dict[str, int]
) -> Speed:
    def median(values: Sequence[float]) -> float:
        return statistics.median(values)

    def ratio(member: str) -> Spread | None:
        if first is None:
            return None
        return Spread.of([getattr(ours, member) / getattr(other, member) for ours, other in zip(runs, first, strict=True)])

    decode = Spread.of([run.decode_tokens_per_second for run in runs])
    prefill = Spread.of([run.prefill_tokens_per_second for run in runs])
    peaks = [run.peak_bytes for run in runs if run.peak_bytes is not None]
    memory_speed = median([run.memory_gigabytes_per_second for run in runs])
    gigabytes_per_second = subject.weight_bytes * decode.median / 1e9
    return Speed(
        path=str(subject.path),
        threads=threads,
        engine=runs[0].engine,
        kernels=runs[0].kernels,
        self_test="passed" if subject.has_self_test else "none",
        decode_tokens_per_second=decode.median,
        decode_spread=decode,
        decode_ratio=ratio("decode_tokens_per_second"),
        prefill_tokens_per_second=prefill.median,
        prefill_spread=prefill,
        prefill_ratio=ratio("prefill_tokens_per_second"),
        load_seconds=median([run.load_seconds for run in runs]),
        import_seconds=median([run.import_seconds for run in runs]),
        resident_bytes=round(median([run.resident_bytes for run in runs])),
        peak_bytes=round(median(peaks)) if peaks else None,
        file_bytes=subject.file_bytes,
        weight_bytes=subject.weight_bytes,
        gigabytes_per_second=gigabytes_per_second,
        memory_gigabytes_per_second=memory_speed,
        bandwidth_share=gigabytes_per_second / memory_speed,
        **shape,
    )
