"""The model that a plan leads to, before anything is computed: shapes, dtypes and sizes, no clustered values.

Sizes of artefacts, dry runs and memory estimates come from it. `compression.pipeline` fills the same model with values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from cluscomp_export.planning.plan import CodebookPlan, Plan
from cluscomp_formats.errors import InvalidFileError, Problem
from cluscomp_formats.ir import AnyArray, Array, ClusteredWeight, Codebook, DenseTensor, Model, Stage, Tensor

__all__ = ["ReadValues", "dense_as_stored", "model_of_plan", "planned_model"]

ReadValues = Callable[[CodebookPlan | str, str], AnyArray]
"""Returns the `centroids` of a codebook, or the `codes` or `row_scale` of the tensor of a name."""


def planned_model(source: Model, plan: Plan, provenance: Mapping[str, Any] | None = None) -> Model:
    """The model of `plan`, with shapes only: reading a clustered value raises RuntimeError; dense tensors can be read."""
    return model_of_plan(source, plan, _not_computed, provenance)


def model_of_plan(source: Model, plan: Plan, read: ReadValues, provenance: Mapping[str, Any] | None = None) -> Model:
    """A lazy model with the tensors of `plan` clustered, their values from `read`, and all other tensors dense.

    Codes are uint16 `[in_features, groups]`, row scales float16 `[out_features]`, codebooks `[num_clusters, cluster_dim]`.
    """
    codebooks = {
        book.name: Codebook(
            book.name, Array((book.num_clusters, book.cluster_dim), book.dtype, partial(read, book, "centroids"))
        )
        for book in plan.codebooks
    }
    tensors: dict[str, Tensor] = {}
    for name, tensor in source.tensors.items():
        scheme = plan.schemes.get(name)
        if scheme is None:
            tensors[name] = dense_as_stored(tensor) if isinstance(tensor, DenseTensor) else tensor
            continue
        out_features, in_features = scheme.shape
        groups = -(-out_features // scheme.codebook.cluster_dim)
        codes = Array((in_features, groups), "uint16", partial(read, name, "codes"))
        scale = Array((out_features,), "float16", partial(read, name, "row_scale")) if scheme.row_scale else None
        tensors[name] = ClusteredWeight(name, scheme.shape, (Stage(codebooks[scheme.codebook.name], codes),), row_scale=scale)
    return Model(source.config, tensors, source.files, provenance or {})


def dense_as_stored(tensor: DenseTensor) -> DenseTensor:
    """The tensor as it is stored: a matrix of float32 or float64 becomes float16; everything else is unchanged.

    Reading it raises InvalidFileError if a value does not fit float16.
    """
    if tensor.values.dtype not in ("float32", "float64") or len(tensor.shape) < 2:
        return tensor

    def load() -> npt.NDArray[np.float16]:
        values = tensor.decode()
        with np.errstate(over="ignore"):
            narrow = values.astype(np.float16)
        if not np.isfinite(narrow).all():
            found, expected = f"{np.abs(values).max():g}", f"finite values up to {np.finfo(np.float16).max:g}"
            raise InvalidFileError(Problem("out_of_range", "does not fit float16", None, tensor.name, found, expected))
        return narrow

    return DenseTensor(tensor.name, Array(tensor.shape, "float16", load))


def _not_computed(item: CodebookPlan | str, array: str) -> AnyArray:
    name = item if isinstance(item, str) else item.name
    raise RuntimeError(f"{array} of {name}: a planned model has shapes only; compress the source first")
