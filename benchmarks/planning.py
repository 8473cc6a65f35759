"""What measured sensitivities bring: quality at equal size with and without them, and of embeddings that join the allocation.

    .venv/bin/python benchmarks/planning.py MODEL --text wikitext2-raw-test.txt --bits 3 2.5 --budget 55MB
    .venv/bin/python benchmarks/planning.py MODEL --text wikitext2-raw-test.txt --probes 12

Sensitivities are measured once. Every plan is converted, passes its self-test and is scored as by `cluscomp-export eval`; its
predicted loss stands beside the measured divergence. `--probes` instead puts noise on single matrices, some of each kind spread
over the layers, and compares the measured divergence with the predicted one.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cluscomp_export.calibration.activations import calibration_tokens, calibration_windows, read_text, shipped_text
from cluscomp_export.calibration.fisher import WINDOWS
from cluscomp_export.calibration.sensitivity import measure_sensitivities
from cluscomp_export.cli.terminal import print_table, say
from cluscomp_export.conversion.convert import ConversionOptions, convert, prepare
from cluscomp_export.evaluation.evaluate import evaluate, tokenize, tokenizer_of
from cluscomp_export.evaluation.protocols import choose_protocol
from cluscomp_export.planning import Plan, Sensitivity, embedding_tensors, plan_bits, plan_budget
from cluscomp_export.planning.plan_file import write_plan
from cluscomp_export.planning.sizes import parse_bytes
from cluscomp_export.sources import open_source
from cluscomp_export.sources.linears import kind
from cluscomp_formats.ir import Array, DenseTensor, Model
from cluscomp_runtime import LanguageModel, load


def plans(
    source: Model, path: Path, losses: Mapping[str, Sensitivity], arguments: argparse.Namespace
) -> Iterator[tuple[str, Plan]]:
    """Pairs of plans of one size, by name."""
    for bits in arguments.bits:
        for name, sensitivities in (("equal", None), ("measured", losses)):
            yield (
                f"{bits:g} bits, {name}",
                plan_bits(source, bits=bits, share=None, embedding_bits=16, sensitivities=sensitivities),
            )
    if arguments.budget is None:
        return

    def size_of(plan: Plan) -> int:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "plan.json"
            write_plan(plan, file)
            size = prepare(path, ConversionOptions(plan=file, effort=arguments.effort)).file_bytes
        assert size is not None
        return size

    stored = source.provenance.get("stored_bits", {})
    width = max((stored.get(name, 16.0) for name in embedding_tensors(source)), default=16.0)
    low, high = 0.5, 8.0
    while high - low > 0.005:
        bits = (low + high) / 2
        plan = plan_bits(source, bits=bits, share=None, embedding_bits=width, sensitivities=losses)
        low, high = (bits, high) if size_of(plan) <= arguments.budget else (low, bits)
    kept = plan_bits(source, bits=low, share=None, embedding_bits=width, sensitivities=losses)
    yield f"{arguments.budget / 1e6:g} MB, embedding at {width:g} bits", kept
    for name, sensitivities in (("equal", None), ("measured", losses)):
        joint = plan_budget(source, budget=arguments.budget, size_of=size_of, share=None, sensitivities=sensitivities)
        yield f"{arguments.budget / 1e6:g} MB, joint, {name}", joint


def measured(
    path: Path, plan: Plan, losses: Mapping[str, Sensitivity], arguments: argparse.Namespace, reference: LanguageModel
) -> Any:
    """Convert by the plan and score the result."""
    with tempfile.TemporaryDirectory() as folder:
        file, output = Path(folder) / "plan.json", Path(folder) / "model.clus"
        write_plan(plan, file)
        started = time.perf_counter()
        calibration = None if arguments.calibration is None else str(arguments.calibration)
        options = ConversionOptions(plan=file, effort=arguments.effort, calibration=calibration, threads=arguments.threads)
        report = convert(path, output, options)
        seconds = time.perf_counter() - started
        windows = cut(reference, arguments)
        quality = evaluate(load(output, kernel="dense", selftest=True), windows, reference=reference)
    predicted = sum(
        losses[name].cost(row_scale=scheme.row_scale) * plan.expected_error(name) for name, scheme in plan.schemes.items()
    )
    return {
        "linears": report.bits_per_weight["linears"],
        "codebooks": len(plan.codebooks),
        "file_bytes": report.file_bytes,
        "predicted": predicted,
        "kl": quality.kl,
        "perplexity": quality.perplexity,
        "top1": quality.top1,
        "seconds": seconds,
    }


def cut(model: LanguageModel, arguments: argparse.Namespace) -> list[list[int]]:
    """The windows to score."""
    protocol = choose_protocol()
    token_ids, bos_id = tokenize(tokenizer_of(model, arguments.model), read_text(arguments.text), protocol)
    return protocol.windows(token_ids, count=arguments.windows, bos_id=bos_id)


def probe(source: Model, sensitivities: Mapping[str, Sensitivity], arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Measured and predicted divergence of the model with noise of relative squared error 0.01 on one matrix at a time."""
    kinds: dict[str, list[str]] = defaultdict(list)
    for name in sensitivities:
        kinds[kind(name)].append(name)
    share = max(1, arguments.probes // len(kinds))
    chosen = [
        same[number * len(same) // min(share, len(same))] for same in kinds.values() for number in range(min(share, len(same)))
    ]
    reference = LanguageModel.from_model(source)
    generator = np.random.default_rng(0)
    rows = []
    for name in chosen:
        weight = source.tensors[name].decode()
        rms = np.sqrt(np.mean(np.square(weight, dtype=np.float64), axis=1, keepdims=True))
        noisy = (weight + 0.1 * rms * generator.standard_normal(weight.shape)).astype(np.float32)
        tensors = {**source.tensors, name: DenseTensor(name, Array.of(noisy))}
        model = LanguageModel.from_model(Model(source.config, tensors, source.files))
        kl = evaluate(model, cut(reference, arguments), reference=reference).kl
        rows.append({"name": name, "predicted": 0.01 * sensitivities[name].relative, "kl": kl})
        say(json.dumps(rows[-1]))
    return rows


def rank_correlation(a: list[float], b: list[float]) -> float:
    """Spearman's, for values without ties."""
    ranks = [np.argsort(np.argsort(values)) for values in (a, b)]
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True, help="to evaluate with")
    parser.add_argument("--windows", type=int, default=20, help="windows of 512 tokens")
    parser.add_argument("--calibration", type=Path, help="text for all of that [default: the one the package ships]")
    parser.add_argument("--bits", type=float, nargs="*", default=[3.0, 2.5])
    parser.add_argument("--budget", type=parse_bytes)
    parser.add_argument("--effort", default="fast")
    parser.add_argument("--probes", type=int, help="how many matrices to put noise on")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    source = open_source(arguments.model)
    text = shipped_text() if arguments.calibration is None else read_text(arguments.calibration)
    started = time.perf_counter()
    sensitivities = measure_sensitivities(source, calibration_windows(calibration_tokens(source, text), WINDOWS))
    say(f"measured sensitivities in {time.perf_counter() - started:.0f} s")
    if arguments.probes:
        rows = probe(source, sensitivities, arguments)
        predicted, found = [row["predicted"] for row in rows], [row["kl"] for row in rows]
        factors = np.array([kl / loss for loss, kl in zip(predicted, found, strict=True)])
        print_table(
            ("matrix", "predicted", "KL", "factor"),
            [
                (row["name"], f"{row['predicted']:.2e}", f"{row['kl']:.2e}", f"{factor:.2f}")
                for row, factor in zip(rows, factors, strict=True)
            ],
        )
        spread = math.exp(float(np.log(factors).std()))
        print(
            f"rank correlation {rank_correlation(predicted, found):.3f}, median factor {np.median(factors):.2f}, "
            f"standard deviation a factor of {spread:.2f}"
        )
        return
    reference = LanguageModel.from_model(source)
    table = []
    for name, plan in plans(source, arguments.model, sensitivities, arguments):
        row = measured(arguments.model, plan, sensitivities, arguments, reference)
        say(json.dumps({"plan": name, "load": os.getloadavg()[1], **row}))
        figures = (f"{row['predicted']:.3f}", f"{row['kl']:.3f}", f"{row['perplexity']:.2f}", f"{100 * row['top1']:.1f}")
        table.append(
            (
                name,
                f"{row['linears']:.2f}",
                row["codebooks"],
                f"{row['file_bytes'] / 1e6:.1f}",
                *figures,
                f"{row['seconds']:.0f}",
            )
        )
    print_table(("plan", "linears", "codebooks", "MB", "predicted", "KL", "perplexity", "top-1 %", "seconds"), table)


if __name__ == "__main__":
    main()
