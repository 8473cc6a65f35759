"""Names of the parameters of a clustered model that can be trained while its codes stay fixed.

`codebook.NAME` is a codebook, `row_scale.TENSOR` the row scale of a clustered weight, and `norm.TENSOR` a dense float vector
whose name ends in `.weight` (biases end in `.bias`). Training, deltas and the runtime use these names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from cluscomp_formats.ir import FLOAT_DTYPES, Array, Codebook, DenseTensor, Model, Tensor

__all__ = ["KINDS", "codebook_name", "kind_of", "norm_name", "parameters", "row_scale_name", "with_parameters"]

KINDS = ("codebook", "row_scale", "norm")


def codebook_name(codebook: str) -> str:
    """Return the parameter name of a codebook."""
    return f"codebook.{codebook}"


def row_scale_name(tensor: str) -> str:
    """Return the parameter name of a weight's row scale."""
    return f"row_scale.{tensor}"


def norm_name(tensor: str) -> str:
    """Return the parameter name of a norm."""
    return f"norm.{tensor}"


def kind_of(parameter: str) -> str:
    """Return the kind of a parameter, one of `KINDS` if the name is valid."""
    return parameter.partition(".")[0]


def parameters(model: Model) -> dict[str, Array]:
    """Return all parameters of a model by name, as stored."""
    found = {codebook_name(name): codebook.values for name, codebook in model.codebooks.items()}
    for name, tensor in model.tensors.items():
        if isinstance(tensor, DenseTensor):
            if len(tensor.shape) == 1 and tensor.values.dtype in FLOAT_DTYPES and name.endswith(".weight"):
                found[norm_name(name)] = tensor.values
        elif tensor.row_scale is not None:
            found[row_scale_name(name)] = tensor.row_scale
    return found


def with_parameters(model: Model, arrays: Mapping[str, Array]) -> Model:
    """Return the model with some parameters replaced by arrays of the same dtypes and shapes.

    The result has no self-test record and no claimed digest, since these belong to the original model.
    """
    codebooks = {
        name: Codebook(name, arrays.get(codebook_name(name), codebook.values)) for name, codebook in model.codebooks.items()
    }
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.tensors.items():
        if isinstance(tensor, DenseTensor):
            tensors[name] = DenseTensor(name, arrays.get(norm_name(name), tensor.values))
            continue
        stages = tuple(replace(stage, codebook=codebooks[stage.codebook.name]) for stage in tensor.stages)
        scale = None if tensor.row_scale is None else arrays.get(row_scale_name(name), tensor.row_scale)
        tensors[name] = replace(tensor, stages=stages, row_scale=scale)
    return replace(model, tensors=tensors, self_test=None, claimed_digest=None)
