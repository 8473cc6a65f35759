"""Checkpoints of the authors' ClusComp implementation (Liao et al., arXiv 2503.13089), imported without loss.

Such a folder's `config.json` has `num_clusters` and `cluster_dim`; a clustered linear is stored as

- `<module>.cluster`, float `[num_clusters, cluster_dim]`, and
- `<module>.index`, integer `[in_features * ceil(out_features / cluster_dim)]`: the transposed weight, padded with zeros
  along its output channels to a multiple of `cluster_dim`, cut row by row into vectors.

The weight's own shape is not stored. It follows from the configuration for the linears of Llama, Mistral and OPT, the
architectures that the authors support, and is checked against the lengths of the index and of the bias.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cluscomp_export.sources.checkpoint import open_checkpoint
from cluscomp_export.sources.huggingface import provenance, untie
from cluscomp_formats.errors import InvalidFileError, Problem
from cluscomp_formats.ir import (
    CODEBOOK_DTYPES,
    FLOAT_DTYPES,
    MAX_CLUSTERS,
    AnyArray,
    Array,
    ClusteredWeight,
    Codebook,
    DenseTensor,
    Model,
    Stage,
    Tensor,
    bfloat16_to_float32,
)

__all__ = ["is_reference_config", "open_reference"]

_CLUSTER, _INDEX = ".cluster", ".index"


def is_reference_config(config: Mapping[str, Any]) -> bool:
    """Whether this is the `config.json` of an authors' checkpoint."""
    return "num_clusters" in config and "cluster_dim" in config


def open_reference(folder: Path, weights: Path | None = None) -> Model:
    """Open an authors' checkpoint, or its only file `weights`.

    Each clustered module becomes `<module>.weight` with a codebook named `<module>`. Shapes and missing parts are checked here.
    The range of the index and the finiteness of the codebook are checked when they are read, one module at a time. Both raise
    InvalidFileError.
    """
    checkpoint = open_checkpoint(folder, weights)
    arrays = checkpoint.tensors
    modules = [name.removesuffix(_CLUSTER) for name in arrays if name.endswith(_CLUSTER)]
    modules += [
        name.removesuffix(_INDEX) for name in arrays if name.endswith(_INDEX) and name.removesuffix(_INDEX) not in modules
    ]
    problems: list[Problem] = []
    tensors: dict[str, Tensor] = {}
    for module in modules:
        found = _clustered(folder, module, arrays, checkpoint.config)
        if isinstance(found, ClusteredWeight):
            tensors[found.name] = found
        else:
            problems.append(found)
    if not modules:
        expected = f"<module>{_CLUSTER} and <module>{_INDEX}"
        problems.append(Problem("not_clustered", "the checkpoint has no clustered module", str(folder), expected=expected))
    if problems:
        raise InvalidFileError(problems)

    parts = {f"{module}{part}" for module in modules for part in (_CLUSTER, _INDEX)}
    tensors.update({name: DenseTensor(name, values) for name, values in arrays.items() if name not in parts})
    settings = {key: checkpoint.config[key] for key in ("num_clusters", "cluster_dim")}
    config = {key: value for key, value in checkpoint.config.items() if key not in settings}
    record = {**provenance("cluscomp-reference", checkpoint), **settings}
    return untie(Model(config, tensors, checkpoint.files, record))


def _clustered(folder: Path, module: str, arrays: Mapping[str, Array], config: Mapping[str, Any]) -> ClusteredWeight | Problem:
    """The module's weight, or the problem with its parts."""
    where = str(folder)
    cluster, index, bias = (arrays.get(f"{module}{part}") for part in (_CLUSTER, _INDEX, ".bias"))
    if cluster is None or index is None:
        missing = f"{module}{_CLUSTER if cluster is None else _INDEX}"
        return Problem("missing_tensor", "codebook or index of a module is missing", where, missing, "nothing", "the tensor")
    if f"{module}.weight" in arrays:
        return Problem("duplicate_tensor", "the module has both a codebook and a weight", where, f"{module}.weight")
    # The authors' code stores floats.
    fit = cluster.dtype in CODEBOOK_DTYPES and cluster.dtype in FLOAT_DTYPES
    if len(cluster.shape) != 2 or not fit or not 1 <= cluster.shape[0] <= MAX_CLUSTERS:
        found = f"{cluster.dtype} {list(cluster.shape)}"
        expected = f"float [1 to {MAX_CLUSTERS}, cluster_dim]"
        return Problem("bad_codebook", "not a valid codebook", where, f"{module}{_CLUSTER}", found, expected)
    if cluster.shape[1] < 1:
        return Problem("bad_codebook", "not a valid codebook", where, f"{module}{_CLUSTER}", "cluster_dim 0", "1 or more")
    if len(index.shape) != 1 or index.dtype in (*FLOAT_DTYPES, "bool"):
        found = f"{index.dtype} {list(index.shape)}"
        return Problem("bad_index", "not a valid index", where, f"{module}{_INDEX}", found, "integer [num_vectors]")
    shape = _weight_shape(module, config)
    if shape is None:
        message = "the shape of the weight is unknown: neither file nor configuration has it"
        expected = "a linear of Llama, Mistral or OPT, and its sizes in config.json"
        return Problem("unknown_shape", message, where, f"{module}{_INDEX}", module.rsplit(".", 1)[-1], expected)
    out_features, in_features = shape
    if bias is not None and bias.shape != (out_features,):
        message = "the bias does not have one element per output of the configuration"
        return Problem("wrong_shape", message, where, f"{module}.bias", str(list(bias.shape)), str([out_features]))
    groups = -(-out_features // cluster.shape[1])
    if index.size != in_features * groups:
        expected = f"{in_features * groups} = {in_features} inputs x {groups} vectors of {cluster.shape[1]} outputs"
        return Problem("wrong_length", "the index has the wrong length", where, f"{module}{_INDEX}", str(index.size), expected)
    codebook = Codebook(module, Array(cluster.shape, cluster.dtype, lambda: _finite(where, module, cluster)))
    num_clusters = cluster.shape[0]
    codes = Array((in_features, groups), "uint16", lambda: _codes(where, module, index, num_clusters, (in_features, groups)))
    return ClusteredWeight(f"{module}.weight", shape, (Stage(codebook, codes),))


def _weight_shape(module: str, config: Mapping[str, Any]) -> tuple[int, int] | None:
    """`(out_features, in_features)` by the module's last name, as in the models of the authors' code."""

    def size(*keys: str) -> int | None:
        value = next((config[key] for key in keys if config.get(key) is not None), None)
        return value if isinstance(value, int) and value > 0 else None

    hidden, heads = size("hidden_size"), size("num_attention_heads")
    if hidden is None or heads is None:
        return None
    head_dim = size("head_dim") or hidden // heads
    inner = size("intermediate_size", "ffn_dim")
    queries, keys = heads * head_dim, (size("num_key_value_heads") or heads) * head_dim
    sizes: dict[str, tuple[int | None, int | None]] = {
        "q_proj": (queries, hidden),
        "k_proj": (keys, hidden),
        "v_proj": (keys, hidden),
        "o_proj": (hidden, queries),
        "out_proj": (hidden, queries),
        "gate_proj": (inner, hidden),
        "up_proj": (inner, hidden),
        "down_proj": (hidden, inner),
        "fc1": (inner, hidden),
        "fc2": (hidden, inner),
    }
    out_features, in_features = sizes.get(module.rsplit(".", 1)[-1], (None, None))
    return None if out_features is None or in_features is None else (out_features, in_features)


def _finite(where: str, module: str, cluster: Array) -> AnyArray:
    """The codebook as stored. Raises InvalidFileError if an element is NaN or infinite."""
    values = cluster.read()
    floats = bfloat16_to_float32(values) if cluster.dtype == "bfloat16" else values
    bad = int(np.count_nonzero(~np.isfinite(floats)))
    if bad:
        found = f"{bad} of {values.size} elements"
        problem = Problem(
            "not_finite", "the codebook has NaN or infinite elements", where, f"{module}{_CLUSTER}", found, "none"
        )
        raise InvalidFileError(problem)
    return values


def _codes(where: str, module: str, index: Array, num_clusters: int, shape: tuple[int, int]) -> AnyArray:
    """The index as uint16 codes of `shape`. Raises InvalidFileError if an entry is out of range."""
    values = index.read()
    low, high = int(values.min()), int(values.max())
    if low < 0 or high >= num_clusters:
        found = f"{low} to {high}"
        message = "the index refers to clusters that the codebook does not have"
        problem = Problem("code_out_of_range", message, where, f"{module}{_INDEX}", found, f"0 to {num_clusters - 1}")
        raise InvalidFileError(problem)
    return values.astype(np.uint16).reshape(shape)
