"""Times the compressed linear operator on the CPU against torch's dense ones, as ratios within one run.

    python benchmarks/clus_linear.py [--threads 1 2] [--repetitions 31] [--sets 8] [--only TEXT] [--json FILE]

Every case first checks the results it is about to time against a product in float64. The competitors take turns, one call
each per repetition, and every repetition takes the next of several sets of weights: nothing is timed on a matrix that the
call before left in a small cache. A last-level cache of hundreds of megabytes still holds all sets; compare ratios, not
bandwidths. Times are medians; the spread is the range from the first to the third quartile.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cluscomp_kernels.clus_linear import choose_path, native_kernel, prepare, prepare_codebook, reference


class Case(NamedTuple):
    in_features: int
    out_features: int
    dim: int
    clusters: int
    tokens: int

    def __str__(self) -> str:
        shape = f"{self.in_features}x{self.out_features}"
        return f"{shape} dim {self.dim} n {self.clusters} tokens {self.tokens}"


CASES = (
    *(Case(4096, 4096, dim, clusters, 1) for dim in (4, 6, 8, 16) for clusters in (65536, 4096)),
    *(Case(4096, 4096, 8, 65536, tokens) for tokens in (2, 4, 8, 16, 32, 512)),
    *(Case(576, 1536, dim, 65536, tokens) for dim in (4, 8) for tokens in (1, 512)),
    Case(576, 49152, 1, 256, 1),
)


def competitors(case: Case, sets: int) -> dict[str, list[Callable[[Tensor], Tensor]]]:
    """For each competitor one callable per set of weights, checked."""
    generator = torch.Generator().manual_seed(0)
    codebook = torch.randn(case.clusters, case.dim, generator=generator).half()
    shared = {path: prepare_codebook(codebook, path=path) for path in ("native", "embedding_bag") if path in _wanted(case)}
    found: dict[str, list[Callable[[Tensor], Tensor]]] = {}
    x = torch.randn(case.tokens, case.in_features, generator=generator)
    for _ in range(sets):
        groups = -(-case.out_features // case.dim)
        codes = torch.randint(0, case.clusters, (case.in_features, groups), generator=generator).to(torch.uint16)
        dense = reference.decode(codebook.float(), codes, case.out_features).t().contiguous()
        half = dense.bfloat16()
        calls: dict[str, Callable[[Tensor], Tensor]] = {
            "torch float32": lambda x, w=dense: torch.nn.functional.linear(x, w),
            "torch bfloat16": lambda x, w=half: torch.nn.functional.linear(x.bfloat16(), w),
        }
        for path, prepared in shared.items():
            calls[path] = prepare(prepared, codes, case.out_features).linear
        check(case, x, dense, calls)
        for name, call in calls.items():
            found.setdefault(name, []).append(call)
    return found


def _wanted(case: Case) -> tuple[str, ...]:
    """embedding_bag is timed where it is meant to be used: for one token."""
    return (choose_path("cpu"), "embedding_bag") if case.tokens == 1 else (choose_path("cpu"),)


def check(case: Case, x: Tensor, dense: Tensor, calls: dict[str, Callable[[Tensor], Tensor]]) -> None:
    """Raise unless every competitor is within the rounding error of its type of the product in float64."""
    x, dense = x[:4], dense[:4096]
    expected = x.double() @ dense.double().t()
    magnitude = x.double().abs() @ dense.double().abs().t()
    for name, call in calls.items():
        eps = 2.0**-8 if "bfloat16" in name else 2.0**-24 * (case.in_features + 2)
        error = (call(x)[:, : dense.shape[0]].double() - expected).abs()
        if not bool((error <= 4 * eps * magnitude).all()):
            raise SystemExit(f"{case}: {name} is wrong by {float(error.max())}; nothing is timed")


def measure(case: Case, threads: int, repetitions: int, sets: int) -> dict[str, Any]:
    torch.set_num_threads(threads)
    calls = competitors(case, sets)
    x = torch.randn(case.tokens, case.in_features, generator=torch.Generator().manual_seed(1))
    times: dict[str, list[float]] = {name: [] for name in calls}
    for repetition in range(-2, repetitions):
        for name, variants in calls.items():
            start = time.perf_counter()
            variants[repetition % sets](x)
            if repetition >= 0:
                times[name].append(time.perf_counter() - start)
    baseline = times["torch float32"]
    result: dict[str, Any] = {"case": case._asdict(), "threads": threads, "results": {}}
    for name, taken in times.items():
        ratios = [dense / own for dense, own in zip(baseline, taken, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        result["results"][name] = {"ms": 1e3 * statistics.median(taken), "speedup": middle, "quartiles": [low, high]}
    return result


def overhead() -> Iterator[str]:
    """Cost of a call whose arithmetic is negligible."""
    codes = torch.zeros(1, 1, dtype=torch.uint16)
    prepared = prepare(torch.ones(1, 1), codes, 1)
    x = torch.ones(1, 1)
    rounds = 20000
    for name, mode in (("inference_mode", torch.inference_mode()), ("no_grad", torch.no_grad())):
        with mode:
            start = time.perf_counter()
            for _ in range(rounds):
                prepared(x)
            yield f"one call under {name}: {1e6 * (time.perf_counter() - start) / rounds:.1f} us"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repetitions", type=int, default=31)
    parser.add_argument("--sets", type=int, default=8, help="distinct weights to rotate")
    parser.add_argument("--only", default="", help="run the cases whose description contains this text")
    parser.add_argument("--json", type=Path, help="also write the results here")
    arguments = parser.parse_args()
    variant = native_kernel.cpu_variant() if choose_path("cpu") == "native" else "none"
    print(f"{platform.machine()}, native variant {variant}, torch {torch.__version__}")
    print(*overhead(), sep="\n")
    results = []
    with torch.inference_mode():
        for case in (case for case in CASES if arguments.only in str(case)):
            for threads in arguments.threads:
                result = measure(case, threads, arguments.repetitions, arguments.sets)
                results.append(result)
                print(f"{case}, {threads} threads")
                for name, figures in result["results"].items():
                    low, high = figures["quartiles"]
                    print(
                        f"  {name:15} {figures['ms']:8.3f} ms  {figures['speedup']:5.2f}x  ({low:.2f} to {high:.2f})",
                        flush=True,
                    )
    if arguments.json:
        arguments.json.write_text(json.dumps({"variant": variant, "torch": torch.__version__, "results": results}, indent=1))


if __name__ == "__main__":
    main()
