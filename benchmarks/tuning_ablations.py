"""What of a codebook model is worth training: parts of it, block by block and in recovery, and codes chosen again in between.

    .venv/bin/python benchmarks/tuning_ablations.py MODEL --text wikitext2-raw-test.txt --calibration wikitext2-valid.txt
    .venv/bin/python benchmarks/tuning_ablations.py MODEL --text ... --calibration ... --artefact model.clus

The first blocks of MODEL in the paper's setting (a codebook for each matrix, no row scales, nearest centroids), tuned in order,
each on what the blocks before it give. Reported is the error of the residual stream behind them, relative to each token's
energy, on the text tuned on and on the other. "Codes again" gives every vector the nearest of the tuned centroids and then goes
on training, beside a training of the same length that keeps the codes.

With `--artefact`, which was made of MODEL and not recovered: its recovery, with some kinds of its parameters. Reported is the
divergence from MODEL on the text. Texts must differ.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from measuring import quality_cells, quality_parser

from cluscomp_export.calibration.activations import calibration_tokens, calibration_windows, read_text, shipped_text
from cluscomp_export.cli.terminal import print_table, say
from cluscomp_export.compression.pipeline import compress
from cluscomp_export.evaluation.evaluate import evaluate, tokenize, tokenizer_of
from cluscomp_export.evaluation.protocols import choose_protocol
from cluscomp_export.planning import Plan, plan_fixed
from cluscomp_export.sources import open_source
from cluscomp_export.sources.linears import block_index
from cluscomp_export.threads import torch_threads
from cluscomp_export.training import RecoveryOptions, TrainableModel, recover
from cluscomp_export.training.blockwise import BlockwiseOptions, relative_error, tune_block
from cluscomp_export.training.loop import fast_precision
from cluscomp_formats.ir import Array, ClusteredWeight, Model
from cluscomp_formats.packed import write_packed
from cluscomp_formats.parameters import KINDS, kind_of
from cluscomp_kernels.kmeans import assign
from cluscomp_runtime.blocks import BlockRunner
from cluscomp_runtime.language_model import LanguageModel

BATCH = 4
DIM, CLUSTERS = 4, 1024
BOTH = ("codebook", "norm")
RECOVERIES = {
    "codebooks": ("codebook",),
    "row scales and norms": ("row_scale", "norm"),
    "all": KINDS,
}


@dataclass(frozen=True)
class Way:
    """How a block is tuned: what of it, for how many epochs in each of some rounds, with codes chosen again between rounds."""

    name: str
    kinds: Sequence[str] = BOTH
    rounds: Sequence[int] = ()
    codes_again: bool = False


WAYS = [
    Way("nothing"),
    Way("codebooks, 2 epochs", ("codebook",), (2,)),
    Way("codebooks and norms, 2 epochs", BOTH, (2,)),
    Way("codebooks and norms, 2 + 2 epochs", BOTH, (2, 2)),
    Way("the same, codes again after 2", BOTH, (2, 2), codes_again=True),
]


def with_nearest_codes(model: Model, source: Model) -> Model:
    """The model with the nearest centroid of its codebooks for every vector of the source."""

    def nearest(weight: ClusteredWeight) -> ClusteredWeight:
        stage = weight.stages[0]
        centroids = stage.codebook.values.to_float32()
        matrix = source.tensors[weight.name].decode().astype(np.float32)
        padded = np.zeros((matrix.shape[1], stage.codes.shape[1] * centroids.shape[1]), dtype=np.float32)
        padded[:, : len(matrix)] = matrix.T
        codes = assign(padded.reshape(-1, centroids.shape[1]), centroids).reshape(stage.codes.shape)
        return replace(weight, stages=(replace(stage, codes=Array.of(codes.astype(np.uint16))),))

    changed = {name: nearest(tensor) for name, tensor in model.clustered.items()}
    return replace(model, tensors={**model.tensors, **changed})


def first_blocks(source: Model, blocks: int, path: Path) -> Model:
    """The source with its first blocks clustered, in a file, so that nothing is computed twice."""
    plan = plan_fixed(source, cluster_dim=DIM, num_clusters=CLUSTERS, share="none", embedding_bits=16)
    chosen = {}
    for name, scheme in plan.schemes.items():
        index = block_index(name)
        if index is not None and index < blocks:
            chosen[name] = scheme
    write_packed(compress(source, Plan(chosen)).model, path)
    return open_source(path)


def compare_ways(
    source: Model, clustered: Model, calibration: torch.Tensor, judge: torch.Tensor, blocks: int
) -> list[dict[str, Any]]:
    """The error behind every block, for every way, on what was trained on and on the text to judge by."""
    runner = BlockRunner(source)
    wanted = [list(torch.split(runner.embed(windows), BATCH)) for windows in (calibration, judge)]
    given = {way.name: wanted for way in WAYS}
    rows = []
    for index in range(blocks):
        behind = [runner.past(index, source.tensors, streams) for streams in wanted]
        for way in WAYS:
            model = runner.block(index, clustered.tensors)
            for number, epochs in enumerate(way.rounds):
                if number and way.codes_again:
                    model = with_nearest_codes(model, source)
                options = BlockwiseOptions(epochs=epochs, seed=number)
                with patch("cluscomp_export.training.parameters.KINDS", tuple(way.kinds)):
                    tuned = tune_block(runner, index, model.tensors, given[way.name][0], behind[0], options)
                assert tuned is not None
                assert {kind_of(name) for name in tuned.values} == set(way.kinds)
                model = tuned.model
            given[way.name] = [runner.past(index, model.tensors, streams) for streams in given[way.name]]
            errors = [float(relative_error(torch.cat(f), torch.cat(w))) for f, w in zip(given[way.name], behind, strict=True)]
            rows.append({"way": way.name, "blocks": index + 1, "error_trained": errors[0], "error": errors[1]})
            say(json.dumps(rows[-1]))
        wanted = behind
    return rows


def compare_recoveries(
    source: Model,
    original: LanguageModel,
    artefact: Model,
    token_ids: Sequence[int],
    judge: Sequence[Sequence[int]],
    options: RecoveryOptions,
) -> list[dict[str, Any]]:
    """The divergence of an artefact from the original on windows of a text: as it is, and recovered in several ways."""
    rows: list[dict[str, Any]] = []

    def report(way: str, model: Model, **training: Any) -> None:
        scores = evaluate(LanguageModel.from_model(model), judge, reference=original)
        rows.append({"way": way, **asdict(scores), **training})
        say(json.dumps({key: rows[-1][key] for key in ("way", "kl", "kl_error", "perplexity")}))

    report("nothing", artefact)
    for name, kinds in RECOVERIES.items():
        trained = recover(TrainableModel(artefact, kinds), source, token_ids, options)
        assert {kind_of(name) for name in trained.values} <= set(kinds)
        report(name, trained.model, **trained.record())
    return rows


def main() -> None:
    parser = quality_parser(__doc__)
    parser.add_argument("--artefact", type=Path, help="train this one's parameters in recovery")
    parser.add_argument("--blocks", type=int, default=4, help="how many blocks to tune")
    parser.add_argument("--calibration-windows", type=int, default=64, help="windows of 512 tokens that blocks are tuned on")
    parser.add_argument("--steps", type=int, default=48, help="steps of a recovery")
    arguments = parser.parse_args()
    source = open_source(arguments.model)
    text = read_text(arguments.calibration) if arguments.calibration else shipped_text()
    token_ids = calibration_tokens(source, text)
    judge_text = read_text(arguments.text)
    with torch_threads(arguments.threads):
        if arguments.artefact is not None:
            options = RecoveryOptions(steps=arguments.steps, precision=fast_precision())
            original = LanguageModel.from_model(source)
            protocol = choose_protocol()
            judge_ids, bos_id = tokenize(tokenizer_of(original, arguments.model), judge_text, protocol)
            windows = protocol.windows(judge_ids, count=arguments.windows, bos_id=bos_id)
            rows = compare_recoveries(source, original, open_source(arguments.artefact), token_ids, windows, options)
        else:
            calibration = calibration_windows(token_ids, arguments.calibration_windows)
            judge = calibration_windows(calibration_tokens(source, judge_text), arguments.windows)
            with tempfile.TemporaryDirectory() as folder:
                clustered = first_blocks(source, arguments.blocks, Path(folder) / "clustered.clus")
                rows = compare_ways(source, clustered, calibration, judge, arguments.blocks)
    if arguments.json:
        print(json.dumps(rows, indent=2))
    elif arguments.artefact is not None:
        print_table(("trained", "perplexity", "KL", "top-1 %"), [(row["way"], *quality_cells(row)) for row in rows])
    else:
        cells = [(row["way"], row["blocks"], f"{row['error_trained']:.5f}", f"{row['error']:.5f}") for row in rows]
        print_table(("tuned", "blocks", "error, text tuned on", "error, other text"), cells)


if __name__ == "__main__":
    main()
