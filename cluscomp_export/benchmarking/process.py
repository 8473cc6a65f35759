"""The process that loads a model and times it: `python -m cluscomp_export.benchmarking.process`.

It reads a `Request` as JSON from standard input and prints the answer as one line of JSON: the members of a `Measurement`, or
`{"error": NAME, "problems": [...]}` for an error of this project. Nothing runs in it before or beside the model, so what the
caller has imported or holds in memory affects no figure. The number of threads is `OMP_NUM_THREADS` of its environment.
"""

from __future__ import annotations

import json
import random
import sys
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cluscomp_formats.errors import ClusCompError

if TYPE_CHECKING:
    from cluscomp_runtime import LanguageModel

__all__ = ["Measurement", "Request"]

_WARM_UP_PROMPT, _WARM_UP_TOKENS = 64, 5


@dataclass(frozen=True)
class Request:
    """What to measure: a prompt of `prompt_tokens` at once, and `new_tokens` one by one.

    With `selftest`, only the self-test of the model is run. The speed of memory is measured on `weight_bytes`.
    """

    path: str
    threads: int
    prompt_tokens: int
    new_tokens: int
    weight_bytes: int
    selftest: bool = False


@dataclass(frozen=True)
class Measurement:
    """What a process measured. Sizes are in bytes.

    `resident_bytes` are resident when the last token has been generated, mapped files and libraries included. `peak_bytes` is
    the most that was resident until then; None where the system does not tell.
    """

    engine: str
    kernels: str
    import_seconds: float
    load_seconds: float
    decode_tokens_per_second: float
    prefill_tokens_per_second: float
    resident_bytes: int
    peak_bytes: int | None
    memory_gigabytes_per_second: float
    warnings: list[str]


def measure(request: Request) -> Measurement:
    """Load the model, warm up, decode, look at the memory, prefill, then time plain reads of memory."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        start = time.perf_counter()
        import cluscomp_runtime  # noqa: F401

        imported = time.perf_counter()
        model = _load(request)
        loaded = time.perf_counter()
        # A benchmark does not end early.
        model.end_tokens = frozenset()
        prompt = _prompt(request.prompt_tokens, model.description.vocab_size)
        model.generate(prompt[:_WARM_UP_PROMPT], max_new_tokens=min(_WARM_UP_TOKENS, request.new_tokens))
        memory: list[tuple[int, int | None]] = []
        tokens = 0

        def look(_: int) -> None:
            nonlocal tokens
            tokens += 1
            if tokens > request.new_tokens:
                memory.append((_resident_bytes(), _peak_bytes()))

        # The first token counts as prefill.
        decoded = model.generate(prompt[:1], max_new_tokens=request.new_tokens + 1, on_token=look)
        prefilled = model.generate(prompt, max_new_tokens=1)
    resident, peak = memory[0]
    return Measurement(
        engine=model.engine,
        kernels=model.kernel_summary,
        import_seconds=imported - start,
        load_seconds=loaded - imported,
        decode_tokens_per_second=request.new_tokens / decoded.decode_seconds,
        prefill_tokens_per_second=request.prompt_tokens / prefilled.prefill_seconds,
        resident_bytes=resident,
        peak_bytes=peak,
        memory_gigabytes_per_second=_memory_speed(request),
        warnings=[str(warning.message) for warning in caught],
    )


def _load(request: Request) -> LanguageModel:
    from cluscomp_formats import registry
    from cluscomp_runtime import LanguageModel, load

    path, context = Path(request.path), max(request.prompt_tokens, request.new_tokens + 1)
    if registry.detect(path) is not None:
        return load(path, context=context, selftest=request.selftest)
    from cluscomp_export.sources import open_source

    return LanguageModel.from_model(open_source(path), context=context)


def _prompt(tokens: int, vocab_size: int) -> list[int]:
    # Not numpy's generator, which would count as memory of the model.
    return random.Random(0).choices(range(vocab_size), k=tokens)  # noqa: S311


def _memory_speed(request: Request) -> float:
    from cluscomp_export.benchmarking.traffic import read_gigabytes_per_second

    return read_gigabytes_per_second(request.weight_bytes, request.threads)


def _resident_bytes() -> int:
    import psutil

    return int(psutil.Process().memory_info().rss)


def _peak_bytes() -> int | None:
    # Not getrusage: its ru_maxrss starts at what the parent process had.
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    except (OSError, IndexError):
        return None


def main() -> None:
    request = Request(**json.load(sys.stdin))
    try:
        if request.selftest:
            _load(request)
            answer = {}
        else:
            answer = asdict(measure(request))
    except ClusCompError as error:
        answer = {"error": type(error).__name__, "problems": [problem.as_dict() for problem in error.problems]}
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
