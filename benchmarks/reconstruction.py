"""How much of float32 weights is lost at equal bits: clustering alone beside rounding to the nearest and ggml's quantisers.

    pip install --no-deps -r benchmarks/requirements-peers.txt && make programs
    .venv/bin/python benchmarks/reconstruction.py MODEL [--sentences TEXT] [--json]

Error is the sum of squared differences over the sum of squares of all linear layers. Nothing is calibrated: clustering is
`--effort fast --calibration none`, ggml's quantisers run at nominal width, on each matrix flattened. Each peer stands beside a
clustering that may take as many bits per weight, codebooks, codes and scales counted, as the peer takes with its scales and
zero points. With `--sentences`, and a sentence encoder as MODEL, the last columns are the mean cosine between the embedding of
a line of the text and that from the original weights. MODEL should have weights of full precision: those of a file that was
quantised lie on grids already. Exits with 1 if RTN loses less anywhere.

Results are checked first: what is counted against what the clustered model stores, RTN against its definition, ggml's blocks
as gguf-py decodes them against ggml's own decoder.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from ggml import Ggml, Type, check_blocks
from grids import Grid, check_rtn, grid_bits, round_to_nearest

from cluscomp_export.cli.terminal import print_table, say
from cluscomp_export.conversion.convert import ConversionOptions, convert
from cluscomp_export.planning.sizes import model_sizes
from cluscomp_export.sources import open_source
from cluscomp_export.sources.linears import linear_tensors
from cluscomp_formats.errors import InvalidRequestError

Floats = npt.NDArray[np.float32]
Matrices = Mapping[str, Floats]

GRIDS = [(4, 128), (4, 64), (4, 32), (3, 128), (3, 64), (3, 32), (2, 64), (2, 32), (2, 16)]
TYPES = ["Q4_K", "IQ4_XS", "Q3_K", "IQ3_S", "IQ3_XXS", "Q2_K", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M"]
SENTENCES = 64
MAX_TOKENS = 128


@dataclass(frozen=True)
class Reconstruction:
    """Decoded weights and the bits per weight they are stored in."""

    name: str
    bits: float
    matrices: Matrices


def clustered(path: Path, bits: float, threads: int) -> Reconstruction | None:
    """Clustering alone at no more than `bits` per weight; None if no codebook is that small."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "model.clus"
        try:
            convert(path, output, ConversionOptions(bits=bits, effort="fast", calibration="none", threads=threads))
        except InvalidRequestError:
            return None
        model = open_source(output)
        used = model_sizes(model).bits_per_weight()["linears"]
        assert used <= bits, f"{used} bits were taken of {bits}"
        return Reconstruction("clustering", used, {name: model.tensors[name].decode() for name in linear_tensors(model)})


def grids(matrices: Matrices, wanted: Callable[[str], bool]) -> Iterator[Reconstruction]:
    """RTN, checked on every matrix."""
    weights = sum(matrix.size for matrix in matrices.values())
    for grid in (Grid("rtn", *size) for size in GRIDS):
        if wanted(grid.name):
            decoded = round_to_nearest(matrices, grid)
            for name, matrix in matrices.items():
                check_rtn(matrix, decoded[name], grid)
            yield Reconstruction(grid.name, sum(grid_bits(grid, m.shape) for m in matrices.values()) / weights, decoded)


def nominal(matrices: Matrices, ggml: Ggml, wanted: Callable[[str], bool]) -> Iterator[Reconstruction]:
    """ggml's quantisers on each matrix flattened, every channel as important as the others."""
    for type_ in (Type[name] for name in TYPES):
        if not wanted(type_.name):
            continue
        decoded, stored_bytes = {}, 0
        for name, matrix in matrices.items():
            blocks = ggml.quantize(matrix.reshape(-1), type_, np.ones(matrix.size, dtype=np.float32))
            decoded[name] = ggml.dequantize(blocks, type_).reshape(matrix.shape)
            check_blocks(blocks, decoded[name], type_)
            stored_bytes += len(blocks)
        yield Reconstruction(type_.name, 8 * stored_bytes / sum(m.size for m in matrices.values()), decoded)


def relative_error(matrices: Matrices, decoded: Matrices) -> float:
    """Sum of squared differences over sum of squares."""
    lost = sum(float(np.sum((decoded[name] - matrix) ** 2, dtype=np.float64)) for name, matrix in matrices.items())
    return lost / sum(float(np.sum(matrix**2, dtype=np.float64)) for matrix in matrices.values())


class SentenceEncoder:
    """A sentence encoder in transformers (mean pooling, unit length) whose linear layers can be replaced."""

    def __init__(self, folder: Path, text: Path) -> None:
        import transformers

        transformers.logging.set_verbosity_error()
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self._model = transformers.AutoModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32).eval()
        lines = [line.strip() for line in text.read_text(encoding="utf-8").splitlines()]
        # Headings of WikiText begin with an equals sign.
        chosen = [line for line in lines if line and not line.startswith("=")][:SENTENCES]
        self._inputs = tokenizer(chosen, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
        self._original = self._embed()

    @torch.no_grad()
    def _embed(self) -> torch.Tensor:
        hidden = self._model(**self._inputs).last_hidden_state
        mask = self._inputs["attention_mask"][:, :, None]
        return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)

    def cosine(self, decoded: Matrices) -> float:
        """Mean cosine between the embeddings with these weights and those with the original ones."""
        for name, matrix in decoded.items():
            self._model.get_parameter(name).data = torch.from_numpy(matrix)
        return float((self._embed() * self._original).sum(1).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--sentences", type=Path, help="a text whose lines are embedded")
    parser.add_argument("--bits", type=float, nargs="*", default=[4.0, 3.0, 2.5, 2.0], help="levels of ours beside no peer")
    parser.add_argument("--only", nargs="+", default=[""], help="parts of names of peers [default: all]")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="print the figures for machines")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    source = open_source(arguments.model)
    matrices = {name: source.tensors[name].decode() for name in linear_tensors(source)}
    encoder = SentenceEncoder(arguments.model, arguments.sentences) if arguments.sentences else None

    def measured(found: Reconstruction | None) -> dict[str, Any] | None:
        if found is None:
            return None
        error = relative_error(matrices, found.matrices)
        cosine = encoder.cosine(found.matrices) if encoder else None
        return {"name": found.name, "bits": found.bits, "error": error, "cosine": cosine}

    def wanted(name: str) -> bool:
        return any(part in name for part in arguments.only)

    rows = []
    compared = chain(grids(matrices, wanted), nominal(matrices, Ggml(), wanted))
    for bits, peer in chain(((level, None) for level in arguments.bits), ((peer.bits, peer) for peer in compared)):
        ours = clustered(arguments.model, bits, arguments.threads)
        rows.append({"bits": bits, "ours": measured(ours), "peer": measured(peer)})
        say(json.dumps(rows[-1]))
    if arguments.json:
        print(json.dumps(rows, indent=2))
    else:
        table(rows)
    lost = [row for row in rows if row["peer"] and row["ours"] and row["peer"]["error"] < row["ours"]["error"]]
    for row in lost:
        say(f"{row['peer']['name']} loses less than clustering at {row['bits']:.3f} bits")
    sys.exit(any(row["peer"]["name"].startswith("RTN") for row in lost))


def table(rows: list[dict[str, Any]]) -> None:
    """One line for each peer, or for each level of ours without one."""
    header = ["peer", "bits", "its error", "our bits", "our error", "ratio", "its cosine", "our cosine"]

    def cells(row: dict[str, Any]) -> list[str]:
        peer, ours = row["peer"], row["ours"]

        def number(found: dict[str, Any] | None, key: str, form: str) -> str:
            return "" if found is None or found[key] is None else format(found[key], form)

        return [
            peer["name"] if peer else "",
            f"{row['bits']:.3f}",
            number(peer, "error", ".5f"),
            number(ours, "bits", ".3f"),
            number(ours, "error", ".5f"),
            f"{ours['error'] / peer['error']:.3f}" if peer and ours else "",
            number(peer, "cosine", ".4f"),
            number(ours, "cosine", ".4f"),
        ]

    print_table(header, [cells(row) for row in rows])


if __name__ == "__main__":
    main()
