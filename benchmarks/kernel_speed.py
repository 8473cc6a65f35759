"""Blocks as large as those of a 7B model in the engine: time per token and its parts, GB/s of weights, against torch.

    .venv/bin/python benchmarks/kernel_speed.py [--settings 2x256 4x4096 6x65536] [--threads 1 2] [--layers 4] [--json FILE]

The weights are random, in the shapes of Mistral-7B: hidden size 4096, inner size 14336, 32 heads, 8 of keys and values. A
setting is DIMxCLUSTERS: the entries of a codebook, int8, shared by all matrices of the model, lie in registers (up to 256
clusters), in the first-level cache (4096) or in the second (65536). Each block has codes of its own, so small caches hold
nothing but the codebook; several blocks are larger than most last-level caches.

Correctness first: each setting is checked on a small matrix against a product in float64. Then, in turn:

- every matrix of a block by itself, the next block's each time: ms per block, GB/s of what it reads (codes, scales), and its
  speed as a multiple of torch's product in bfloat16, call by call;
- whole steps of decoding: ms per block, and what of it is not matrices (norms, attention, activations, hand-overs);
- the token of a model of 32 such blocks and a head of 32000 x 4096 (dim 1, 256 clusters).

Beside GB/s stands what as many threads reach that only read as many bytes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import spread

from cluscomp_export.benchmarking.traffic import read_gigabytes_per_second
from cluscomp_export.cli.terminal import say
from cluscomp_formats.sections.tiles import tile_codes
from cluscomp_kernels.engine import (
    VARIANTS,
    Attention,
    Branch,
    Codebook,
    EngineLinear,
    EngineNorm,
    FeedForward,
    Pool,
    Program,
    Stage,
    best_variant,
    tiled_bytes,
)

HIDDEN, INNER, HEADS, KV_HEADS, HEAD_DIM, VOCABULARY = 4096, 14336, 32, 8, 128, 32000
MODEL_LAYERS = 32
POSITIONS = 256
SHAPES = {
    "q": (HEADS * HEAD_DIM, HIDDEN),
    "k": (KV_HEADS * HEAD_DIM, HIDDEN),
    "v": (KV_HEADS * HEAD_DIM, HIDDEN),
    "o": (HIDDEN, HEADS * HEAD_DIM),
    "gate": (INNER, HIDDEN),
    "up": (INNER, HIDDEN),
    "down": (HIDDEN, INNER),
}
"""`(out_features, in_features)` of the matrices of a block."""

HEAD_SETTING = (1, 256)

Setting = tuple[int, int]
Block = dict[str, EngineLinear]


def parse_setting(text: str) -> Setting:
    dim, clusters = (int(part) for part in text.split("x"))
    if clusters & (clusters - 1) or clusters < 2:
        raise argparse.ArgumentTypeError(f"{clusters} clusters: random codes need a power of two")
    return dim, clusters


def random_codebook(setting: Setting, random: np.random.Generator) -> Codebook:
    dim, clusters = setting
    values = np.clip(np.rint(random.standard_normal((clusters, dim)) * 40), -127, 127).astype(np.int8)
    return Codebook(values, best_variant())


def random_linear(shape: tuple[int, int], codebook: Codebook, random: np.random.Generator) -> EngineLinear:
    """A matrix of random codes; the row scale keeps products about as large as the input."""
    out_features, in_features = shape
    size = tiled_bytes(in_features, out_features, codebook.cluster_dim, codebook.bits)
    scale = np.full(out_features, 1 / (40 * in_features**0.5), dtype=np.float32)
    return EngineLinear(shape, stages=[Stage(random.integers(0, 256, size, dtype=np.uint8), codebook, scale)])


def check(setting: Setting, threads: int, random: np.random.Generator) -> None:
    """Raises SystemExit unless a small matrix multiplies as in float64, but for the rounding that the engine promises."""
    dim, clusters = setting
    shape = (200, 320)
    values = np.clip(np.rint(random.standard_normal((clusters, dim)) * 40), -127, 127).astype(np.int8)
    codes = random.integers(0, clusters, (shape[1], -(-shape[0] // dim))).astype(np.uint16)
    codebook = Codebook(values, best_variant())
    scale = random.uniform(0.5, 2, shape[0]).astype(np.float32)
    linear = EngineLinear(shape, stages=[Stage(tile_codes(codes, codebook.bits), codebook, scale)])
    x = random.standard_normal((3, shape[1])).astype(np.float32)
    weight = values[codes].reshape(shape[1], -1)[:, : shape[0]].T.astype(np.float64) * scale[:, None]
    found = Pool(threads=threads).apply(linear, x)
    # Half a step of an activation, a 65,024th of the largest of its 64 channels; and float32 sums.
    allowed = np.abs(x).max(axis=1, keepdims=True) * np.abs(weight).sum(axis=1) / 65024
    allowed += 8 * np.finfo(np.float32).eps * (np.abs(x) @ np.abs(weight).T)
    if not bool((np.abs(found - x.astype(np.float64) @ weight.T) <= allowed).all()):
        raise SystemExit(f"{dim}x{clusters}: the engine computes something else; nothing is timed")


def random_program(blocks: Sequence[Block], threads: int) -> Program:
    """The blocks as a decoder with a small vocabulary, so that a step is little but its blocks."""

    def norm() -> EngineNorm:
        return EngineNorm(np.ones(HIDDEN, dtype=np.float32), 1e-5)

    branches = []
    for block in blocks:
        attention = Attention(
            block["q"], block["k"], block["v"], block["o"], HEADS, KV_HEADS, HEAD_DIM, scale=HEAD_DIM**-0.5, rope=0
        )
        branches += [
            Branch(norm(), attention),
            Branch(norm(), FeedForward(block["gate"], block["up"], block["down"], "silu")),
        ]
    table = np.random.default_rng(1).standard_normal((16, HIDDEN)).astype(np.float16)
    vocabulary = EngineLinear((16, HIDDEN), values=table, value_type="float16")
    return Program(
        embedding=vocabulary,
        branches=branches,
        norm=norm(),
        head=vocabulary,
        ropes=[10000.0 ** (-np.arange(0, HEAD_DIM, 2) / HEAD_DIM)],
        variant=best_variant(),
        threads=threads,
    )


def torch_products(layers: int) -> dict[str, list[Callable[[], object]]]:
    """The same products in bfloat16, one per block."""
    generator = torch.Generator().manual_seed(0)
    calls: dict[str, list[Callable[[], object]]] = {}
    for name, (out_features, in_features) in SHAPES.items():
        x = torch.randn(1, in_features, generator=generator).bfloat16()
        weights = [torch.randn(out_features, in_features, generator=generator).bfloat16() for _ in range(layers)]
        calls[name] = [lambda x=x, weight=weight: torch.nn.functional.linear(x, weight) for weight in weights]
    return calls


def seconds_of(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measure(
    setting: Setting, threads: int, layers: int, repetitions: int, peers: Mapping[str, Sequence[Callable[[], object]]]
) -> dict[str, Any]:
    """All figures of a setting, in seconds and GB/s."""
    random = np.random.default_rng(0)
    check(setting, threads, random)
    codebook = random_codebook(setting, random)
    blocks = [{name: random_linear(shape, codebook, random) for name, shape in SHAPES.items()} for _ in range(layers)]
    head = random_linear((VOCABULARY, HIDDEN), random_codebook(HEAD_SETTING, random), random)
    pool, program = Pool(threads=threads), random_program(blocks, threads)
    cache = program.cache(POSITIONS, "float16")
    inputs = {size: random.standard_normal((1, size)).astype(np.float32) for size in (HIDDEN, INNER)}
    torch.set_num_threads(threads)
    own: dict[str, list[float]] = {name: [] for name in SHAPES}
    ratios: dict[str, list[float]] = {name: [] for name in SHAPES}
    steps: list[float] = []
    heads: list[float] = []
    memory: list[float] = []
    step_bytes = sum(linear.nbytes for block in blocks for linear in block.values())
    program.logits([1], cache)
    for repetition in range(repetitions):
        if cache.length == POSITIONS:
            cache.truncate(1)
        steps.append(seconds_of(lambda: program.logits([2], cache)) / layers)
        heads.append(seconds_of(lambda: pool.apply(head, inputs[HIDDEN])))
        memory.append(read_gigabytes_per_second(step_bytes, threads))
        layer = repetition % layers
        for name, (_, in_features) in SHAPES.items():
            taken = seconds_of(partial(pool.apply, blocks[layer][name], inputs[in_features]))
            own[name].append(taken)
            if peers:
                ratios[name].append(seconds_of(peers[name][layer]) / taken)
    parts = {
        name: {
            "seconds": spread(own[name]),
            "gigabytes_per_second": blocks[0][name].nbytes / statistics.median(own[name]) / 1e9,
            "times_torch_bfloat16": spread(ratios[name]) if peers else None,
        }
        for name in SHAPES
    }
    block_seconds, head_seconds = statistics.median(steps), statistics.median(heads)
    token = MODEL_LAYERS * block_seconds + head_seconds
    return {
        "setting": f"{setting[0]}x{setting[1]}",
        "bits": codebook.bits / codebook.cluster_dim,
        "threads": threads,
        "block": spread(steps),
        "parts": parts,
        "rest_seconds": block_seconds - sum(statistics.median(own[name]) for name in SHAPES),
        "head_seconds": head_seconds,
        "tokens_per_second": 1 / token,
        "gigabytes_per_second": (MODEL_LAYERS * step_bytes / layers + head.nbytes) / token / 1e9,
        "memory_gigabytes_per_second": statistics.median(memory),
    }


def report(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: a row per setting and number of threads."""
    header = ["dim x clusters", "bits", "threads", "tokens/s", "GB/s", "reading", "ms per block", *SHAPES, "rest", "head, ms"]
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for row in rows:
        block = row["block"]
        cells = [
            row["setting"],
            f"{row['bits']:.2f}",
            str(row["threads"]),
            f"{row['tokens_per_second']:.2f}",
            f"{row['gigabytes_per_second']:.1f}",
            f"{row['memory_gigabytes_per_second']:.1f}",
            f"{1e3 * block['median']:.2f} ({1e3 * block['min']:.2f} to {1e3 * block['max']:.2f})",
        ]
        for part in row["parts"].values():
            ratio = part["times_torch_bfloat16"]
            times = "" if ratio is None else f", {ratio['median']:.1f}x"
            cells.append(f"{1e3 * part['seconds']['median']:.2f} ({part['gigabytes_per_second']:.1f}{times})")
        cells += [f"{1e3 * row['rest_seconds']:.2f}", f"{1e3 * row['head_seconds']:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "Parts: ms (GB/s, times as fast as torch in bfloat16). Reading: GB/s of as many threads that only read."]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--settings",
        type=parse_setting,
        nargs="+",
        default=[(2, 64), (2, 256), (3, 256), (4, 256), (3, 4096), (4, 4096), (4, 65536), (6, 65536)],
        help="DIMxCLUSTERS, clusters a power of two",
    )
    parser.add_argument("--threads", type=int, nargs="+", default=sorted({1, os.cpu_count() or 1}))
    parser.add_argument("--layers", type=int, default=4, help="distinct blocks")
    parser.add_argument("--repetitions", type=int, default=21)
    parser.add_argument("--without-torch", action="store_true", help="leave out the peer, which needs 440 MB per block")
    parser.add_argument("--json", type=Path, help="also write everything there")
    options = parser.parse_args()
    peers = {} if options.without_torch else torch_products(options.layers)
    rows = []
    for setting in options.settings:
        for threads in options.threads:
            rows.append(measure(setting, threads, options.layers, options.repetitions, peers))
            say(f"{rows[-1]['setting']}, {threads} threads: {rows[-1]['tokens_per_second']:.2f} tokens/s")
    if options.json:
        document = {"variant": VARIANTS[best_variant()], "torch": torch.__version__, "rows": rows}
        options.json.write_text(json.dumps(document, indent=1), encoding="utf-8")
    print(report(rows))


if __name__ == "__main__":
    main()
