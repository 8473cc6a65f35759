"""A plan as a JSON file, to read, edit and use again.

    {"version": 1,
     "codebooks": {"linears": {"dim": 4, "clusters": 4096, "value_bits": 8}},
     "tensors": {"model.layers.0.mlp.down_proj.weight": {"codebook": "linears", "row_scale": true}}}

Tensors that are not listed stay dense. `value_bits` is 8 for an int8 codebook, whose tensors all need row scales, and 16 for
float16. A file with unknown members, or one that does not fit the model, is refused.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cluscomp_export.planning.candidates import CODEBOOK_DTYPES, Size, num_vectors
from cluscomp_export.planning.plan import CodebookPlan, Plan, TensorScheme
from cluscomp_formats.errors import InvalidFileError, Problem
from cluscomp_formats.files.atomic import atomic_write
from cluscomp_formats.files.regular_file import read_whole
from cluscomp_formats.ir import FLOAT_DTYPES, MAX_CLUSTERS, DenseTensor, Model

__all__ = ["plan_value", "read_plan", "write_plan"]

VERSION = 1
MAX_DIM = 256


def plan_value(plan: Plan) -> dict[str, Any]:
    """The plan as a JSON value."""
    return {
        "version": VERSION,
        "codebooks": {
            book.name: {"dim": book.cluster_dim, "clusters": book.num_clusters, "value_bits": book.value_bits}
            for book in plan.codebooks
        },
        "tensors": {
            name: {"codebook": scheme.codebook.name, "row_scale": scheme.row_scale} for name, scheme in plan.schemes.items()
        },
    }


def write_plan(plan: Plan, path: Path, *, force: bool = False) -> None:
    """Write the file, atomically. Raises OutputExistsError, StorageError."""
    text = json.dumps(plan_value(plan), indent=1)
    with atomic_write(path, force=force) as stream:
        stream.write(f"{text}\n".encode())


def read_plan(path: Path, model: Model) -> Plan:
    """The plan in a file, for `model`. Raises InvalidFileError with all its problems."""
    reader = _Reader(str(path), model)
    plan = reader.plan(_json(path))
    if reader.problems:
        raise InvalidFileError(reader.problems)
    return plan


def _json(path: Path) -> Any:
    def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) < len(pairs):
            raise ValueError("a key occurs twice")
        return value

    remedy = "make one: plan the model with `save='plan.json'`"
    try:
        return json.loads(read_whole(path, remedy=remedy).decode(), object_pairs_hook=distinct)
    except (ValueError, RecursionError) as error:
        raise InvalidFileError(Problem("bad_plan", "not a JSON file", str(path), None, str(error), None, remedy)) from error


class _Reader:
    """Turns the JSON value into a plan and collects its problems."""

    def __init__(self, file: str, model: Model) -> None:
        self.file = file
        self.model = model
        self.problems: list[Problem] = []

    def fault(self, message: str, name: str | None, found: object, expected: str) -> None:
        self.problems.append(Problem("bad_plan", message, self.file, name, repr(found)[:200], expected))

    def object(self, value: Any, what: str, keys: tuple[str, ...], name: str | None = None) -> Mapping[str, Any] | None:
        """`value` if it is an object with exactly these keys."""
        if isinstance(value, dict) and value.keys() == set(keys):
            return value
        found = sorted(value) if isinstance(value, dict) else value
        self.fault(f"{what} has missing or unknown members", name, found, f"an object with {', '.join(keys)}")
        return None

    def plan(self, value: Any) -> Plan:
        top = self.object(value, "the plan", ("version", "codebooks", "tensors"))
        if top is None:
            return Plan({})
        if top["version"] != VERSION:
            self.fault("the plan has another version", None, top["version"], str(VERSION))
            return Plan({})
        sizes = {name: size for name, entry in self.entries(top, "codebooks") if (size := self.size(name, entry))}
        uses: dict[str, dict[str, bool]] = defaultdict(dict)
        for name, entry in self.entries(top, "tensors"):
            use = self.object(entry, "the tensor's entry", ("codebook", "row_scale"), name)
            if use is None or not self.is_matrix(name):
                continue
            if not isinstance(use["row_scale"], bool):
                self.fault("row_scale is not true or false", name, use["row_scale"], "true or false")
            if not isinstance(use["codebook"], str) or use["codebook"] not in top["codebooks"]:
                self.fault("the tensor's codebook is not among the codebooks", name, use["codebook"], "one of codebooks")
            else:
                uses[use["codebook"]][name] = use["row_scale"] is True
        if not uses and not self.problems:
            self.fault("the plan clusters nothing", None, {}, "at least one tensor")
        schemes: dict[str, TensorScheme] = {}
        for codebook, size in sizes.items():
            schemes.update(self.schemes(codebook, size, uses.get(codebook, {})))
        return Plan({name: schemes[name] for name in self.model.tensors if name in schemes})

    def entries(self, top: Mapping[str, Any], key: str) -> list[tuple[str, Any]]:
        if isinstance(top[key], dict):
            return list(top[key].items())
        self.fault(f"{key} is not an object", None, top[key], "an object by name")
        return []

    def size(self, name: str, entry: Any) -> Size | None:
        value = self.object(entry, "the codebook's entry", ("dim", "clusters", "value_bits"), name)
        if value is None:
            return None
        limits = {"dim": MAX_DIM, "clusters": MAX_CLUSTERS}
        for key, most in limits.items():
            if type(value[key]) is not int or not 1 <= value[key] <= most:
                self.fault(f"{key} is out of range", name, value[key], f"an integer from 1 to {most}")
                return None
        if type(value["value_bits"]) is not int or value["value_bits"] not in CODEBOOK_DTYPES:
            self.fault("value_bits is out of range", name, value["value_bits"], " or ".join(map(str, CODEBOOK_DTYPES)))
            return None
        return value["dim"], value["clusters"], value["value_bits"]

    def is_matrix(self, name: str) -> bool:
        tensor = self.model.tensors.get(name)
        if isinstance(tensor, DenseTensor) and len(tensor.shape) == 2 and tensor.values.dtype in FLOAT_DTYPES:
            return True
        found = "no such tensor" if tensor is None else f"a tensor of shape {list(tensor.shape)}"
        self.fault("the model has no dense matrix with this name", name, found, "a matrix of floats")
        return False

    def schemes(self, codebook: str, size: Size, uses: Mapping[str, bool]) -> dict[str, TensorScheme]:
        if not uses:
            self.fault("no tensor uses this codebook", codebook, "none", "at least one")
            return {}
        cluster_dim, num_clusters, value_bits = size
        if CODEBOOK_DTYPES[value_bits] == "int8" and not all(uses.values()):
            unscaled = next(name for name, row_scale in uses.items() if not row_scale)
            self.fault("an int8 codebook needs row scales", unscaled, False, "row_scale true, or value_bits 16")
        shapes = {}
        for name in uses:
            out_features, in_features = self.model.tensors[name].shape
            shapes[name] = (out_features, in_features)
        vectors = sum(num_vectors(shape, cluster_dim) for shape in shapes.values())
        if num_clusters > vectors:
            self.fault("more clusters than vectors", codebook, num_clusters, f"at most {vectors}")
        members = tuple(name for name in self.model.tensors if name in uses)
        book = CodebookPlan(codebook, cluster_dim, num_clusters, members, value_bits)
        return {name: TensorScheme(shapes[name], book, row_scale) for name, row_scale in uses.items()}
