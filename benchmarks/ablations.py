"""What was left out of the format, and why: ways to store weights that could beat a codebook, at equal bits.

    .venv/bin/python benchmarks/ablations.py MODEL [--kind down_proj] [--matrices 8] [--artefact model.clus ...] [--json]

The first matrices of a kind, rows scaled to unit variance, are clustered as if all of the kind shared the codebook, by the same
k-means for every way. Each way stands beside one codebook at the bits it takes, interpolated (the logarithm of the error is a
line in the bits) between codebooks of the same number of clusters and neighbouring dimensions. Codes and codebooks of float16
count. Errors are squared, relative to the weights' squares; nothing is calibrated.

- residual: what one codebook errs is clustered again, with a codebook of its own.
- outliers: the largest weights are kept apart, in float16 with the least that any code for their places takes (their entropy).
- rotated: input channels go through a random rotation, a Hadamard matrix with random signs, which makes weights Gaussian.
- along inputs: a vector takes neighbouring input channels of one row, not neighbouring rows of one input channel.

With `--artefact`, how many bits the codes of a model would take if each codebook's were entropy-coded by how often they occur.
Results are checked first: decoded vectors against their codes' centroids, a rotation against its inverse.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cluscomp_export.cli.terminal import print_table, say
from cluscomp_export.sources import open_source
from cluscomp_export.sources.linears import linear_tensors
from cluscomp_formats.ir import Model
from cluscomp_kernels.kmeans import kmeans

Floats = npt.NDArray[np.float32]

CLUSTERS = 65536
DIMS = (3, 4, 5, 6, 8, 10, 12, 16)
RESIDUAL = (8, 12, 16)
"""Dimensions of two codebooks: 4, 2.7 and 2 bits per weight."""
OUTLIERS = (0.0005, 0.002, 0.01)


@dataclass(frozen=True)
class Way:
    """How some weights can be stored: what for, bits per weight, and relative squared error."""

    name: str
    bits: float
    error: float


def scaled(model: Model, kind: str, count: int) -> tuple[list[Floats], int]:
    """The first matrices of a kind, `[out_features, in_features]`, every row with a mean square of 1; the weights of all."""
    names = [name for name in linear_tensors(model) if f".{kind}." in name]
    matrices = [model.tensors[name].decode().astype(np.float32) for name in names[:count]]
    rows = [matrix / np.sqrt(np.mean(np.square(matrix), axis=1, keepdims=True)) for matrix in matrices]
    return rows, sum(model.tensors[name].num_weights for name in names)


def vectors(matrices: Sequence[Floats], dim: int, *, along_inputs: bool = False) -> Floats:
    """All vectors `[count, dim]`; rows (or input channels) that fill none are left out."""
    turned = [matrix if along_inputs else matrix.T for matrix in matrices]
    pieces = [np.ascontiguousarray(matrix[:, : matrix.shape[1] // dim * dim]).reshape(-1, dim) for matrix in turned]
    return np.concatenate(pieces)


def clustered(points: Floats, threads: int | None) -> Floats:
    """The points as one codebook gives them."""
    result = kmeans(points, CLUSTERS, threads=threads)
    decoded: Floats = result.centroids.astype(np.float16).astype(np.float32)[result.codes]
    assert decoded.shape == points.shape
    return decoded


def book_bits(dim: int, weights: int) -> float:
    """Bits per weight of codes and codebook."""
    return math.log2(CLUSTERS) / dim + 16 * CLUSTERS * dim / weights


def relative(points: Floats, decoded: Floats) -> float:
    return float(np.square(points - decoded, dtype=np.float64).sum() / np.square(points, dtype=np.float64).sum())


def rotation(channels: int) -> Floats:
    """An orthogonal matrix: Hadamard's with random signs, for each of the largest blocks of a power of two."""
    signs = np.random.default_rng(0).choice([-1.0, 1.0], channels)
    size = channels & -channels
    block = np.ones((1, 1))
    while len(block) < size:
        block = np.kron(block, [[1, 1], [1, -1]]) / math.sqrt(2)
    turn: Floats = (np.kron(np.eye(channels // size), block) * signs).astype(np.float32)
    assert np.allclose(turn @ turn.T, np.eye(channels), atol=1e-5)
    return turn


def beside(ways: Sequence[Way], singles: Sequence[Way]) -> list[float]:
    """The error of one codebook at the bits of each way."""
    ordered = sorted(singles, key=lambda way: way.bits)
    bits, errors = [way.bits for way in ordered], [math.log(way.error) for way in ordered]
    return [math.exp(np.interp(way.bits, bits, errors)) for way in ways]


def measure(matrices: Sequence[Floats], weights: int, threads: int | None) -> tuple[list[Way], list[Way]]:
    """What is compared, and the single codebooks it is compared with; `weights` share a codebook."""
    singles, ways = [], []
    for dim in DIMS:
        points = vectors(matrices, dim)
        decoded = clustered(points, threads)
        singles.append(Way(f"one, dim {dim}", book_bits(dim, weights), relative(points, decoded)))
        say(str(singles[-1]))
        if dim in RESIDUAL:
            error = relative(points, decoded + clustered(points - decoded, threads))
            ways.append(Way(f"residual, dim {dim}", 2 * book_bits(dim, weights), error))
    for dim in (4, 8):
        points = vectors(matrices, dim)
        for share in OUTLIERS:
            limit = np.quantile(np.abs(points), 1 - share)
            kept = np.abs(points) > limit
            rest = np.where(kept, np.float32(0), points)
            decoded = np.where(kept, points.astype(np.float16).astype(np.float32), clustered(rest, threads))
            places = -share * math.log2(share) - (1 - share) * math.log2(1 - share)
            bits = book_bits(dim, weights) + 16 * share + places
            ways.append(Way(f"outliers {share:.2%}, dim {dim}", bits, relative(points, decoded)))
            say(str(ways[-1]))
        for name, turned, along in (
            ("rotated", [matrix @ rotation(matrix.shape[1]) for matrix in matrices], False),
            ("along inputs", matrices, True),
        ):
            points = vectors(turned, dim, along_inputs=along)
            ways.append(Way(f"{name}, dim {dim}", book_bits(dim, weights), relative(points, clustered(points, threads))))
            say(str(ways[-1]))
    return ways, singles


def entropies(model: Model) -> tuple[float, float]:
    """Bits per code as stored and entropy-coded, over all codes of the linear layers."""
    counts: dict[str, npt.NDArray[np.int64]] = defaultdict(lambda: np.zeros(1 << 16, dtype=np.int64))
    widths: dict[str, int] = {}
    linears = set(linear_tensors(model))
    for name, weight in model.clustered.items():
        if name in linears:
            for stage in weight.stages:
                counts[stage.codebook.name] += np.bincount(stage.codes.read().reshape(-1), minlength=1 << 16)
                widths[stage.codebook.name] = stage.codebook.code_bits
    stored = sum(int(count.sum()) * widths[name] for name, count in counts.items())
    coded = 0.0
    for count in counts.values():
        used = count[count > 0]
        coded -= float((used * np.log2(used / used.sum())).sum())
    codes = sum(int(count.sum()) for count in counts.values())
    return stored / codes, coded / codes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--kind", default="down_proj", help="kind of matrix (default down_proj)")
    parser.add_argument("--matrices", type=int, default=8, help="how many of it (default 8)")
    parser.add_argument("--artefact", type=Path, nargs="*", default=[], help="models whose codes to count")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    ways, singles = measure(*scaled(open_source(options.model), options.kind, options.matrices), options.threads)
    others = beside(ways, singles)
    codes = {str(path): entropies(open_source(path)) for path in options.artefact}
    if options.json:
        rows = [{**asdict(way), "one codebook": other} for way, other in zip(ways, others, strict=True)]
        document = {"ways": rows, "singles": [asdict(way) for way in singles], "bits per code": codes}
        print(json.dumps(document, indent=1))
        return
    cells = [
        (way.name, f"{way.bits:.3f}", f"{way.error:.4f}", f"{other:.4f}", f"{way.error / other:.3f}")
        for way, other in zip(ways, others, strict=True)
    ]
    print_table(("way", "bits", "error", "one codebook", "ratio"), cells)
    for path, (stored, coded) in codes.items():
        print(f"{path}: {stored:.2f} bits per code as stored, {coded:.2f} entropy-coded ({1 - coded / stored:.1%} less)")


if __name__ == "__main__":
    main()
