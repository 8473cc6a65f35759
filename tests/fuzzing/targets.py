"""What is fuzzed: a name, sound files to start from, how a file is opened and everything in it used, how a file is changed."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from fuzzing import seeds
from fuzzing.containers import write_members
from fuzzing.contract import hold_to_contract
from fuzzing.mutations import (
    Mutation,
    mutate_content,
    mutate_delta,
    mutate_folder,
    mutate_gguf,
    mutate_packed,
    mutate_packed_content,
)
from fuzzing.onnx_mutations import mutate_onnx

from cluscomp_export.inspection.inspect import inspect_delta, inspect_model
from cluscomp_export.sources import linear_tensors, open_source, source_bytes
from cluscomp_formats import check_payloads, tiled_codes
from cluscomp_formats.delta import is_delta, open_delta
from cluscomp_formats.errors import ClusCompError, InvalidRequestError
from cluscomp_formats.gguf import looks_gguf, open_gguf
from cluscomp_formats.hf import looks_hf, open_hf
from cluscomp_formats.ir import Array, Model
from cluscomp_formats.onnx import looks_onnx, open_onnx
from cluscomp_formats.packed import looks_packed, open_packed
from cluscomp_formats.sections.tiles import tile_codes
from cluscomp_formats.strict_json import canonical_json
from cluscomp_runtime import LanguageModel, load, run_self_test
from cluscomp_runtime.tokenizer import Tokenizer

CORPUS = Path(__file__).parent / "corpus"
_warm: set[str] = set()
_DECODED_WEIGHTS = 1 << 20
"""Larger weights are not decoded: a few codes may well stand for a matrix of any size."""


@dataclass(frozen=True)
class Target:
    """`consume` opens the file or folder at a path and uses all of it; a folder is kept as one string of bytes."""

    name: str
    seeds: Callable[[Path], Iterator[bytes]]
    consume: Callable[[Path], None]
    mutate: Mutation
    is_folder: bool = False

    def run(self, data: bytes, scratch: Path, *, alarm: bool = True) -> str:
        """Hold the reader to the contract on these bytes; see `hold_to_contract`. `scratch` is a folder to work in."""
        if self.name not in _warm:
            # What is imported on the way must not count.
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                for seed in self.seeds(scratch):
                    self.consume(self.place(seed, scratch))
            _warm.add(self.name)
        path = self.place(data, scratch)
        return hold_to_contract(self.consume, path, scratch / "input", alarm=alarm)

    def place(self, data: bytes, scratch: Path) -> Path:
        """The file or folder of these bytes in the folder `input` of `scratch`, which is emptied first."""
        folder = scratch / "input"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        if self.is_folder:
            write_members(data, folder)
            return folder
        path = folder / "file"
        path.write_bytes(data)
        return path

    def kept(self) -> Iterator[Path]:
        """The inputs kept of earlier runs."""
        return (path for path in sorted((CORPUS / self.name).glob("*")) if path.is_file())


def _read_everything(model: Model) -> None:
    """Every payload and side file, one after the other; the first error is raised after all were read."""
    errors: list[ClusCompError] = []
    arrays = [array for _, array in model.payloads()] + list(model.files.values())
    for array in arrays:
        try:
            array.read()
        except ClusCompError as error:
            errors.append(error)
    if errors:
        raise errors[0]
    for tensor in model.tensors.values():
        if tensor.num_weights <= _DECODED_WEIGHTS:
            tensor.decode()
    model.digest()


def _use_tiled_codes(model: Model) -> None:
    """What an engine does: check all payloads, then use the codes where they lie."""
    check_payloads(model)
    for tensor in model.clustered.values():
        for stage in tensor.stages:
            if tensor.group_axis == "out":
                stream = tiled_codes(stage)
                if not np.array_equal(stream, tile_codes(stage.codes.read(), stage.codebook.code_bits)):
                    raise AssertionError("the tiled codes in the file are not those of the model")


def _consume_own(open_format: Callable[..., Model], looks: Callable[[Path], bool]) -> Callable[[Path], None]:
    """Our own formats: lazily, then checked. What the check passes must be sound, and be recognised."""

    def consume(path: Path) -> None:
        recognised, lazy = looks(path), False
        try:
            _read_everything(open_format(path))
            lazy = True
        except ClusCompError:
            pass
        try:
            _use_tiled_codes(open_format(path))
        except ClusCompError:
            if lazy:
                raise AssertionError("the check of all payloads refuses what a reader accepts") from None
        model = open_format(path, check=True)
        if not (recognised and lazy):
            raise AssertionError(f"the check passes a file that is {'not sound' if recognised else 'not recognised'}")
        _read_everything(model)

    return consume


def _consume_source(path: Path) -> None:
    model = open_source(path)
    inspect_model(path, quick=True)
    source_bytes(path)
    linear_tensors(model)
    canonical_json(model.provenance).encode()
    _read_everything(model)
    Tokenizer.from_files(model.files)


def _consume_tokenizer(path: Path) -> None:
    """Encode, decode and stream; a file that is not one of the others' folder members needs no model."""
    tokenizer = Tokenizer.from_files({"tokenizer.json": Array.of(np.frombuffer(path.read_bytes(), np.uint8))})
    if tokenizer is None:
        raise AssertionError("there is a file, and no tokenizer")
    ids = tokenizer.encode("a b  é 漢 ab</s>\n")
    tokenizer.decode(ids)
    stream = tokenizer.stream(ids[:2])
    for token in [*ids[2:], 0, 1, 2, 3]:
        stream.push(token)
    stream.flush()


def _consume_delta(path: Path) -> None:
    """Open, show, and apply to the model that the seeds belong to."""
    delta = open_delta(path)
    if not is_delta(path):
        raise AssertionError("a delta is opened that is not recognised")
    inspect_delta(path)
    _read_everything(delta.apply(seeds.small_model()))


def _consume_runtime(path: Path) -> None:
    """Load, test itself, compute, chat, generate."""
    source = open_packed(path)
    inspect_model(path, quick=True)
    model = load(path)
    if source.self_test is not None:
        run_self_test(model, source.self_test)
    model.forward([[0, 0, 0]])
    try:
        text = model.chat([{"role": "user", "content": "a b"}])
        model.generate(text[:100], max_new_tokens=2, add_special_tokens=False)
    except InvalidRequestError:
        # No template, no tokenizer, or ids the model does not have.
        pass
    model.generate([0], max_new_tokens=3)
    LanguageModel.from_model(source, kernel="reference").forward([[0]])


TARGETS = {
    target.name: target
    for target in (
        Target("packed", seeds.packed_seeds, _consume_own(open_packed, looks_packed), mutate_packed),
        Target("hf", seeds.hf_seeds, _consume_own(open_hf, looks_hf), mutate_folder, is_folder=True),
        Target("gguf", seeds.gguf_seeds, _consume_own(open_gguf, looks_gguf), mutate_gguf),
        Target("onnx", seeds.onnx_seeds, _consume_own(open_onnx, looks_onnx), mutate_onnx, is_folder=True),
        Target("source-gguf", seeds.stock_gguf_seeds, _consume_source, mutate_gguf),
        Target("source-hf", seeds.stock_folder_seeds, _consume_source, mutate_folder, is_folder=True),
        Target("source-reference", seeds.reference_seeds, _consume_source, mutate_folder, is_folder=True),
        Target("tokenizer", seeds.tokenizer_seeds, _consume_tokenizer, mutate_content),
        Target("delta", seeds.delta_seeds, _consume_delta, mutate_delta),
        Target("runtime", seeds.runtime_seeds, _consume_runtime, mutate_packed_content),
    )
}
