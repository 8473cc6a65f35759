"""Build a model from the settings in `config.json` and the arrays in the shards, and check that they match."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cluscomp_formats.errors import InvalidFileError, Problem
from cluscomp_formats.hf.quantization import Quantization, WeightEntry
from cluscomp_formats.ir import AnyArray, Array, ClusteredWeight, Codebook, DenseTensor, Model, Outliers, Stage, Tensor
from cluscomp_formats.limits import name_fault
from cluscomp_formats.safetensors.mapped_shards import StoredWeights
from cluscomp_formats.sections.stored_arrays import codebook_key, part_key, stored_arrays

__all__ = ["build_model"]


@dataclass(frozen=True)
class _ArrayLoader:
    """Reads one array. It keeps the files open as long as it exists."""

    stored: StoredWeights
    key: str

    def __call__(self) -> AnyArray:
        return self.stored.read(self.key)


@dataclass
class _Assembly:
    stored: StoredWeights
    file: str
    problems: list[Problem] = field(default_factory=list)
    codebooks: dict[str, Codebook] = field(default_factory=dict)
    claimed: dict[str, str] = field(default_factory=dict)

    def array(self, owner: str, key: str) -> Array:
        """Return the array of a key and mark it as part of a clustered weight. Raises _AbsentError if there is none."""
        if key not in self.stored:
            raise _AbsentError(key)
        if self.claimed.setdefault(key, owner) != owner:
            message = "two weights use the same array"
            self.problems.append(Problem("claimed_twice", message, self.file, owner, key, f"only in {self.claimed[key]}"))
        entry = self.stored.entry(key)
        return Array(entry.shape, entry.dtype, _ArrayLoader(self.stored, key))

    def codebook(self, name: str) -> Codebook:
        if name not in self.codebooks:
            key = codebook_key(name)
            self.codebooks[name] = Codebook(name, self.array(key, key))
        return self.codebooks[name]

    def clustered_or_problem(self, name: str, entry: WeightEntry) -> ClusteredWeight | Problem:
        try:
            return self.clustered(name, entry)
        except _AbsentError as absent:
            message = "an array of the clustered weight is missing"
            return Problem("missing_tensor", message, self.file, name, expected=absent.key)
        except ValueError as error:
            return Problem("bad_tensor", str(error), self.file, name)

    def clustered(self, name: str, entry: WeightEntry) -> ClusteredWeight:
        along, across = entry.shape if entry.group_axis == "out" else entry.shape[::-1]
        stages = []
        for number, book in enumerate(entry.codebooks):
            codebook = self.codebook(book)
            stored = self.array(name, part_key(name, "codes", number))
            shape = (across, -(-along // codebook.cluster_dim))
            stages.append(Stage(codebook, Array(shape, "uint16", stored.loader)))
        extra = {part: self.array(name, part_key(name, part)) for part in entry.extra_arrays}
        return ClusteredWeight(
            name,
            entry.shape,
            tuple(stages),
            entry.group_axis,
            extra.get("row_scale"),
            extra.get("column_scale"),
            Outliers(extra["outlier_positions"], extra["outlier_values"]) if "outlier_positions" in extra else None,
        )


class _AbsentError(Exception):
    def __init__(self, key: str) -> None:
        super().__init__(key)
        self.key = key


def build_model(config: Mapping[str, Any], quantization: Quantization, stored: StoredWeights, file: str) -> Model:
    """Return the model, without side files and records. Arrays that no clustered weight uses are dense tensors.

    `file` is the path of the configuration, for messages. Raises InvalidFileError with every problem found.
    """
    assembly = _Assembly(stored, file)
    problems = assembly.problems
    tensors: dict[str, Tensor] = {}
    for name, entry in quantization.weights.items():
        weight = assembly.clustered_or_problem(name, entry)
        if isinstance(weight, Problem):
            problems.append(weight)
        else:
            tensors[name] = weight
    for key in sorted(stored.keys() - assembly.claimed.keys()):
        fault = name_fault(key)
        if fault is not None:
            problems.append(Problem("bad_name", f"the name of a tensor {fault}", stored.file(key), repr(key[:200])))
        elif key in quantization.weights:
            message = "the tensor is stored both clustered and dense"
            problems.append(Problem("duplicate_tensor", message, stored.file(key), key))
        else:
            tensors[key] = DenseTensor(key, assembly.array(key, key))
    if problems:
        raise InvalidFileError(problems)
    model = Model(config, tensors, claimed_digest=quantization.digest)
    payloads = {}
    for array in stored_arrays(model):
        entry_found = stored.entry(array.key)
        if (entry_found.dtype, entry_found.shape) != (array.dtype, array.shape):
            found, expected = f"{entry_found.dtype} {entry_found.shape}", f"{array.dtype} {array.shape}"
            message = f"{array.payload.part} are stored with another dtype or shape"
            problems.append(Problem("wrong_form", message, stored.file(array.key), array.payload.owner, found, expected))
        payloads[array.key] = array.payload
    if problems:
        raise InvalidFileError(problems)
    stored.payloads = payloads
    return model
