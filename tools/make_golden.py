"""Make the golden files of the packed format: `python tools/make_golden.py [folder]` (default `tests/golden`).

Files of version 1 must stay readable, and writing these models must give these very bytes, for ever. So a golden file is
made once and never made anew; run this only to add one, and commit what it writes.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from cluscomp_formats.ir import (
    DTYPES,
    FLOAT_DTYPES,
    AnyArray,
    Array,
    ClusteredWeight,
    Codebook,
    DenseTensor,
    Model,
    Outliers,
    Stage,
)
from cluscomp_formats.packed import write_packed

EXPECTED = "expected.json"


def noise(label: str, count: int) -> AnyArray:
    """`count` pseudo-random bytes that depend on `label` only, not on the version of any random generator."""
    return np.frombuffer(hashlib.shake_256(label.encode()).digest(count), dtype=np.uint8)


def floats(label: str, dtype: str, *shape: int) -> Array:
    """Multiples of 1/64 from -2 to almost 2, exact in every float type."""
    values = (noise(label, int(np.prod(shape))).astype(np.float32) - 128) / 64
    if dtype == "bfloat16":
        return Array.of((values.view(np.uint32) >> 16).astype(np.uint16).reshape(shape), dtype)
    return Array.of(values.reshape(shape), dtype)


def codes(label: str, num_clusters: int, *shape: int) -> Array:
    values = noise(label, 2 * int(np.prod(shape))).view("<u2") % np.uint32(num_clusters)
    return Array.of(values.astype(np.uint16).reshape(shape))


def text(content: str) -> Array:
    return Array.of(np.frombuffer(content.encode(), dtype=np.uint8))


def empty_model() -> Model:
    """Nothing but a configuration."""
    return Model({"model_type": "none"}, {})


def plain_model() -> Model:
    """What a typical conversion gives: a codebook per matrix, norms in bfloat16, one side file."""
    tensors: dict[str, ClusteredWeight | DenseTensor] = {}
    for module, num_clusters, out_features in (("q_proj", 16, 10), ("up_proj", 300, 12)):
        name = f"model.layers.0.{module}.weight"
        codebook = Codebook(name, floats(f"{name} codebook", "float16", num_clusters, 4))
        stage = Stage(codebook, codes(name, num_clusters, 8, -(-out_features // 4)))
        tensors[name] = ClusteredWeight(name, (out_features, 8), (stage,))
    tensors["model.norm.weight"] = DenseTensor("model.norm.weight", floats("norm", "bfloat16", 8))
    return Model(
        {"model_type": "llama", "hidden_size": 8, "rms_norm_eps": 1e-05},
        tensors,
        {"tokenizer.json": text("{}")},
        {"tool": "make_golden"},
    )


def full_model() -> Model:
    """Every feature of the format at once."""
    shared = Codebook("shared", floats("shared", "bfloat16", 5, 3))
    fine = Codebook("fine", floats("fine", "float32", 2, 2))
    single = Codebook("single", floats("single", "float16", 1, 16))
    tensors: dict[str, ClusteredWeight | DenseTensor] = {
        "a.weight": ClusteredWeight(
            "a.weight",
            (7, 4),
            (Stage(shared, codes("a0", 5, 4, 3)), Stage(fine, codes("a1", 2, 4, 4)), Stage(shared, codes("a2", 5, 4, 3))),
            "out",
            floats("a row", "float16", 7),
            floats("a column", "float64", 4),
            Outliers(Array.of(np.array([0, 9, 27], dtype=np.uint32)), floats("a outliers", "bfloat16", 3)),
        ),
        "b.weight": ClusteredWeight(
            "b.weight",
            (3, 7),
            (Stage(shared, codes("b", 5, 3, 3)),),
            "in",
            column_scale=floats("b column", "float32", 7),
            outliers=Outliers(Array.of(np.array([20], dtype=np.uint64)), floats("b outliers", "float64", 1)),
        ),
        "c.weight": ClusteredWeight("c.weight", (2, 2), (Stage(single, codes("c", 1, 2, 1)),)),
        "größe/层": DenseTensor("größe/层", floats("unicode", "float32", 2, 1, 3)),
        "scalar": DenseTensor("scalar", floats("scalar", "float32")),
        "nothing": DenseTensor("nothing", floats("nothing", "float16", 0, 4)),
    }
    for dtype, stored in DTYPES.items():
        name = f"dense.{dtype}"
        if dtype in FLOAT_DTYPES:
            tensors[name] = DenseTensor(name, floats(dtype, dtype, 3))
        else:
            values = noise(dtype, 3) % 2 == 1 if dtype == "bool" else noise(dtype, 3 * stored.itemsize).view(stored)
            tensors[name] = DenseTensor(name, Array.of(values, dtype))
    return Model(
        {"model_type": "llama", "note": "naïve \U0001f600", "nested": {"list": [1, -2.5, 1e-07, None, True], "empty": {}}},
        tensors,
        {"tokenizer.json": text('{"model":null}'), "chat template.jinja": text("{{ 'é' }}"), "empty.txt": text("")},
        {"source": {"digest": "sha256:0"}, "seed": 0},
        {
            "version": 1,
            "sequences": [{"input_ids": [1, 2], "top_ids": [[3, 4], [5, 6]], "top_logits": [[1.5, 0.5], [2.0, -1.0]]}],
            "tolerance": {"float32": 0.001},
        },
    )


def int8_model() -> Model:
    """Two matrices that share a codebook of int8, with float16 row scales."""
    shared = Codebook("shared", Array.of(noise("int8 codebook", 20 * 6).view(np.int8).reshape(20, 6)))
    tensors: dict[str, ClusteredWeight | DenseTensor] = {
        name: ClusteredWeight(
            name, (9, 5), (Stage(shared, codes(name, 20, 5, 2)),), row_scale=floats(f"{name} row", "float16", 9)
        )
        for name in ("a.weight", "b.weight")
    }
    return Model({"model_type": "none"}, tensors)


def tiled_model() -> Model:
    """Tiled codes of several tiles, with and without padding of channels and groups, at several widths."""
    tensors: dict[str, ClusteredWeight | DenseTensor] = {}
    for name, num_clusters, groups, in_features in (("a", 20, 17, 8), ("b", 300, 48, 9), ("c", 256, 30, 6), ("d", 2, 47, 3)):
        codebook = Codebook(name, floats(f"{name} codebook", "float16", num_clusters, 1))
        stage = Stage(codebook, codes(f"{name} codes", num_clusters, in_features, groups))
        tensors[name] = ClusteredWeight(name, (groups, in_features), (stage,))
    return Model({"model_type": "none"}, tensors)


MODELS: dict[str, Callable[[], Model]] = {
    "empty": empty_model,
    "plain": plain_model,
    "full": full_model,
    "int8": int8_model,
    "tiled": tiled_model,
}


def expectation(model: Model, file: bytes) -> dict[str, Any]:
    """What a reader must find: the digest and the hashes of all decoded tensors and side files."""
    return {
        "file": hashlib.sha256(file).hexdigest(),
        "digest": model.digest(),
        "tensors": {name: hashlib.sha256(tensor.decode().astype("<f4")).hexdigest() for name, tensor in model.tensors.items()},
        "files": {name: hashlib.sha256(array.read()).hexdigest() for name, array in model.files.items()},
    }


def main(folder: Path) -> None:
    expected = {}
    for name, make in MODELS.items():
        path = folder / f"{name}.clus"
        write_packed(make(), path)
        expected[name] = expectation(make(), path.read_bytes())
    (folder / EXPECTED).write_text(json.dumps(expected, indent=1, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent.parent / "tests" / "golden")
