"""Other quantisers at the widths ours is measured at: one line for each, by the evaluator of `benchmarks/compression.py`.

    pip install --no-deps -r benchmarks/requirements-peers.txt && make programs
    .venv/bin/python benchmarks/peers.py MODEL --text wikitext2-raw-test.txt [--only GPTQ nominal] [--json]

- RTN and GPTQ on uniform grids, by neural-compressor (`grids.py`).
- `llama.cpp ...`: what `llama-quantize` makes of the F16 GGUF of the source. Where rows are no multiple of 256, it falls
  back to wider types.
- `... at nominal width`: the same quantisers on each matrix flattened, so that every weight takes the width of the type. No
  stock file can do that; it is the fair peer at equal bits.

GPTQ and importance matrices see the windows of the calibration text that `cluscomp-export convert` sees with its default effort
(`best` sees four times as many, and its recovery trains on more of the text). Weights are decoded to float32 and
scored like ours: perplexity, divergence from the source and top-1 agreement on the first windows of a text that is not the
calibration text. "linears" are bits per weight of the linear layers with scales and zero points; MB is the whole model with
all else as wide as in the source, or the stock file's size. Seconds go from the source to the quantised weights, calibration
included. Results are checked before they are scored: grids against their definition, GPTQ against RTN on the calibration text,
ggml's blocks as gguf-py decodes them against ggml's own decoder.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from itertools import chain
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import torch
from ggml import Ggml, Type, check_blocks
from grids import Grid, check_gptq, check_rtn, gptq, grid_bits, huggingface_model, round_to_nearest
from measuring import quality_cells, quality_parser

from cluscomp_export.calibration.activations import calibration_tokens, calibration_windows, read_text, shipped_text
from cluscomp_export.cli.terminal import print_table, say
from cluscomp_export.conversion.effort import WINDOWS
from cluscomp_export.evaluation.evaluate import evaluate, tokenize, tokenizer_of
from cluscomp_export.evaluation.protocols import choose_protocol
from cluscomp_export.sources import open_source
from cluscomp_export.sources.linears import linear_tensors
from cluscomp_formats.gguf import write_dense_gguf
from cluscomp_formats.ir import Array, DenseTensor, Model
from cluscomp_runtime import LanguageModel
from cluscomp_runtime.observing import observe_inputs

Floats = npt.NDArray[np.float32]

GRIDS = [(4, 192), (4, 64), (3, 192), (3, 64), (2, 64), (2, 32)]
"""Bits and group sizes: 4.1, 4.3, 3.1, 3.3, 2.3 and 2.6 bits per weight. SmolLM2's rows, 576 and 1536, are whole groups."""
STOCK = ["Q8_0", "Q4_K_M", "IQ4_XS", "Q3_K_S", "IQ3_XXS", "Q2_K", "IQ2_XXS", "IQ1_S"]
NOMINAL = ["IQ4_XS", "Q3_K", "IQ3_XXS", "Q2_K", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M"]
WITHOUT_IMPORTANCE = {"Q8_0", "Q4_K_M"}
CALIBRATION_BATCH = 4


@dataclass(frozen=True)
class Quantised:
    """A peer's result: the model with its linear layers quantised and decoded, their bits, bytes of the whole, seconds."""

    name: str
    model: Model
    linear_bits: int
    total_bytes: int
    seconds: float


class Subject:
    """The model to be quantised, and what peers learn from the calibration text."""

    def __init__(self, path: Path, calibration: Path | None, threads: int) -> None:
        self.source = open_source(path)
        self.threads = threads
        self.linears = linear_tensors(self.source)
        text = read_text(calibration) if calibration else shipped_text()
        self.windows = calibration_windows(calibration_tokens(self.source, text), WINDOWS)
        self._importance: dict[str, Floats] = {}
        self.importance_seconds = 0.0

    @property
    def linear_weights(self) -> int:
        return sum(self.source.tensors[name].num_weights for name in self.linears)

    def other_bytes(self) -> float:
        """Bytes of everything but the linear layers, as wide as in the source, side files included."""
        stored = self.source.provenance.get("stored_bits", {})
        others = [tensor for name, tensor in self.source.tensors.items() if name not in set(self.linears)]
        bits = sum(t.num_weights * stored[t.name] if t.name in stored else t.own_bits for t in others)
        return bits / 8 + sum(file.nbytes for file in self.source.files.values())

    @cached_property
    def first_inputs(self) -> torch.Tensor:
        """What flows into the first block's query matrix on the calibration text, `[tokens, in_features]`."""
        model = huggingface_model(self.source).model
        with torch.no_grad():
            inputs: torch.Tensor = model.layers[0].input_layernorm(model.embed_tokens(self.windows)).flatten(0, 1)
        return inputs

    def importance(self) -> dict[str, Floats]:
        """Mean square of every input channel by name of the matrix, `[in_features]`: what `llama-imatrix` gathers."""
        if not self._importance:
            start = time.perf_counter()
            sums = {name: torch.zeros(self.source.tensors[name].shape[1], dtype=torch.float64) for name in self.linears}

            def observe(name: str, inputs: torch.Tensor) -> None:
                if name in sums:
                    sums[name] += inputs.square().flatten(0, -2).sum(0)

            for batch in self.windows.split(CALIBRATION_BATCH):
                observe_inputs(self.source, batch, observe)
            self._importance = {name: (total / self.windows.numel()).float().numpy() for name, total in sums.items()}
            self.importance_seconds = time.perf_counter() - start
        return self._importance

    def replaced(self, name: str, weights: Mapping[str, Floats], linear_bits: int, seconds: float) -> Quantised:
        """The source with the linear layers' weights replaced."""
        assert set(weights) == set(self.linears)
        tensors = {**self.source.tensors, **{key: DenseTensor(key, Array.of(value)) for key, value in weights.items()}}
        total = round(linear_bits / 8 + self.other_bytes())
        return Quantised(name, replace(self.source, tensors=tensors), linear_bits, total, seconds)


def grid_peers(subject: Subject, wanted: Callable[[str], bool]) -> Iterator[Quantised]:
    """RTN and GPTQ at every width, checked on the query matrix of the first block."""
    if not any(wanted(Grid(method, *size).name) for method in ("rtn", "gptq") for size in GRIDS):
        return
    first = next(name for name in subject.linears if ".layers.0.self_attn.q_proj." in name)
    matrices = {name: subject.source.tensors[name].decode() for name in subject.linears}
    # The first call imports the library, for a quarter of a minute.
    round_to_nearest({first: matrices[first]}, Grid("rtn", 4, 32))
    for bits, group_size in GRIDS:
        rtn = Grid("rtn", bits, group_size)
        nearest = round_to_nearest({first: matrices[first]}, rtn)[first]
        check_rtn(matrices[first], nearest, rtn)
        for grid in (rtn, Grid("gptq", bits, group_size)):
            if not wanted(grid.name):
                continue
            start = time.perf_counter()
            if grid is rtn:
                weights = round_to_nearest(matrices, rtn)
            else:
                weights = gptq(subject.source, subject.linears, grid, subject.windows)
            seconds = time.perf_counter() - start
            if grid is not rtn:
                check_gptq(matrices[first], weights[first], nearest, subject.first_inputs)
            size = sum(grid_bits(grid, weights[name].shape) for name in subject.linears)
            yield subject.replaced(grid.name, weights, size, seconds)


def nominal_peers(subject: Subject, ggml: Ggml, wanted: Callable[[str], bool]) -> Iterator[Quantised]:
    """ggml's quantisers on each matrix flattened."""
    for type_ in (Type[name] for name in NOMINAL):
        name = f"{type_.name} at nominal width"
        if not wanted(name):
            continue
        importance = subject.importance()
        start = time.perf_counter()
        # The tables of a type are made once, and not by several threads.
        ggml.quantize(np.zeros(256, dtype=np.float32), type_, np.ones(256, dtype=np.float32))
        quantise_matrix = partial(flattened, subject, ggml, type_)
        with ThreadPoolExecutor(subject.threads) as pool:
            made = list(pool.map(quantise_matrix, subject.linears, (importance[key] for key in subject.linears)))
        seconds = time.perf_counter() - start + subject.importance_seconds
        stored = dict(zip(subject.linears, made, strict=True))
        weights = {}
        for key, blocks in stored.items():
            weights[key] = ggml.dequantize(blocks, type_).reshape(subject.source.tensors[key].shape)
        check_blocks(stored[subject.linears[0]], weights[subject.linears[0]], type_)
        yield subject.replaced(name, weights, 8 * sum(len(blocks) for blocks in made), seconds)


def flattened(subject: Subject, ggml: Ggml, type_: Type, name: str, importance: Floats) -> npt.NDArray[np.uint8]:
    """The blocks of a matrix as one long row, every channel's importance repeated for each of its rows."""
    weight = subject.source.tensors[name].decode()
    return ggml.quantize(weight.reshape(-1), type_, np.tile(importance, weight.shape[0]))


def stock_peers(
    subject: Subject, ggml: Ggml, folder: Path, wanted: Callable[[str], bool], keep: Path | None
) -> Iterator[Quantised]:
    """Stock files made from the source's F16 GGUF; the type falls back tensor by tensor as llama.cpp decides.

    A file is deleted when the next one is asked for, or moved to `keep`.
    """
    chosen = {f"llama.cpp {name}": gguf.LlamaFileType[f"MOSTLY_{name}"] for name in STOCK if wanted(f"llama.cpp {name}")}
    if not chosen:
        return
    base, output = folder / "f16.gguf", folder / "stock.gguf"
    write_dense_gguf(subject.source, base, gguf_type="f16")
    architecture = {"mistral": "llama"}.get(subject.source.config["model_type"], subject.source.config["model_type"])
    number = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    table = gguf.get_tensor_name_map(number, subject.source.config["num_hidden_layers"])
    gguf_names = {name: str(table.get_name(name, try_suffixes=(".weight",))) for name in subject.linears}
    for name, file_type in chosen.items():
        weighted = name.removeprefix("llama.cpp ") not in WITHOUT_IMPORTANCE
        importance = {gguf_names[key]: values for key, values in subject.importance().items()} if weighted else None
        start = time.perf_counter()
        ggml.quantize_file(base, output, file_type, importance, subject.threads)
        seconds = time.perf_counter() - start + (subject.importance_seconds if weighted else 0)
        model = open_source(output)
        stored = model.provenance["stored_bits"]
        bits = sum(round(stored.get(key, 16.0) * model.tensors[key].num_weights) for key in subject.linears)
        check_stock(output, ggml, {gguf_names[key]: key for key in subject.linears}, model)
        yield Quantised(name + (" + imatrix" if weighted else ""), model, bits, output.stat().st_size, seconds)
        if keep is None:
            output.unlink()
        else:
            shutil.move(output, keep / f"{name.removeprefix('llama.cpp ')}.gguf")


def check_stock(path: Path, ggml: Ggml, names: Mapping[str, str], model: Model) -> None:
    """Raises AssertionError unless one matrix of each type in the file is decoded as ggml does."""
    seen = set()
    for tensor in gguf.GGUFReader(path).tensors:
        if tensor.name in names and tensor.tensor_type not in seen and tensor.n_bytes * 8 < 16 * tensor.n_elements:
            seen.add(tensor.tensor_type)
            # Rows of query and key matrices are in another order in the file.
            ours = np.sort(model.tensors[names[tensor.name]].decode().reshape(-1))
            theirs = np.sort(ggml.dequantize(np.ascontiguousarray(tensor.data).reshape(-1), tensor.tensor_type))
            assert np.array_equal(ours, theirs), f"{tensor.name} is decoded differently"


class Recorded:
    """A model whose logits are computed once for each batch and then read from a file: the reference of many evaluations."""

    def __init__(self, model: LanguageModel, folder: Path) -> None:
        self._model = model
        self._folder = folder
        self._files: dict[bytes, Path] = {}

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        key = ids.numpy().tobytes()
        if key not in self._files:
            path = self._folder / f"{len(self._files)}.npy"
            np.save(path, self._model.forward(ids).numpy())
            self._files[key] = path
        return torch.from_numpy(np.load(self._files[key], mmap_mode="c"))


def main() -> None:
    parser = quality_parser(__doc__)
    parser.add_argument("--only", nargs="+", default=[""], help="parts of names of peers [default: all]")
    parser.add_argument("--keep", type=Path, help="keep the stock files in this folder, for benchmarks/running.py")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    subject = Subject(arguments.model, arguments.calibration, arguments.threads)
    rows: list[dict[str, Any]] = []

    def wanted(name: str) -> bool:
        return any(part in name for part in arguments.only)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        original = LanguageModel.from_model(subject.source)
        protocol = choose_protocol()
        token_ids, bos_id = tokenize(tokenizer_of(original, arguments.model), read_text(arguments.text), protocol)
        windows = protocol.windows(token_ids, count=arguments.windows, bos_id=bos_id)
        reference: Any = Recorded(original, folder)
        ggml = Ggml()
        grids = grid_peers(subject, wanted)
        stock = stock_peers(subject, ggml, folder, wanted, arguments.keep)
        for peer in chain(grids, stock, nominal_peers(subject, ggml, wanted)):
            quality = evaluate(LanguageModel.from_model(peer.model), windows, reference=reference)
            rows.append(
                {
                    "name": peer.name,
                    "bits_per_weight": {"linears": peer.linear_bits / subject.linear_weights},
                    "file_bytes": peer.total_bytes,
                    "seconds": peer.seconds,
                    "load": os.getloadavg()[1],
                    "quality": asdict(quality),
                }
            )
            say(json.dumps(rows[-1]))
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "gguf")}
    if arguments.json:
        print(json.dumps({"versions": {**versions, "llama.cpp": ggml.release}, "rows": rows}, indent=2))
        return
    header = ("peer", "linears", "MB", "perplexity", "KL", "top-1 %", "seconds")
    print_table(
        header,
        [
            (
                row["name"],
                f"{row['bits_per_weight']['linears']:.2f}",
                f"{row['file_bytes'] / 1e6:.1f}",
                *quality_cells(row["quality"]),
                f"{row['seconds']:.0f}",
            )
            for row in rows
        ],
    )


if __name__ == "__main__":
    main()
