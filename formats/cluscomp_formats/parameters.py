"""What of a clustered model can be changed while its codes stay: codebooks, row scales and norms, each under a name.

`codebook.NAME` is a codebook, `row_scale.TENSOR` the row scale of a clustered weight, `norm.TENSOR` a dense float vector called
`TENSOR`, which ends in `.weight` (a bias does not). Training, deltas and the runtime go by these names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from cluscomp_formats.ir import FLOAT_DTYPES, Array, Codebook, DenseTensor, Model, Tensor

__all__ = ["KINDS", "codebook_name", "kind_of", "norm_name", "parameters", "row_scale_name", "with_parameters"]

KINDS = ("codebook", "row_scale", "norm")


def codebook_name(codebook: str) -> str:
    """The parameter that a codebook is."""
    return f"codebook.{codebook}"


def row_scale_name(tensor: str) -> str:
    """The parameter that a weight's row scale is."""
    return f"row_scale.{tensor}"


def norm_name(tensor: str) -> str:
    """The parameter that a norm is."""
    return f"norm.{tensor}"


def kind_of(parameter: str) -> str:
    """Its kind, one of `KINDS` if it is a parameter's name."""
    return parameter.partition(".")[0]


def parameters(model: Model) -> dict[str, Array]:
    """All parameters of a model by name, as they are stored."""
    found = {codebook_name(name): codebook.values for name, codebook in model.codebooks.items()}
    for name, tensor in model.tensors.items():
        if isinstance(tensor, DenseTensor):
            if len(tensor.shape) == 1 and tensor.values.dtype in FLOAT_DTYPES and name.endswith(".weight"):
                found[norm_name(name)] = tensor.values
        elif tensor.row_scale is not None:
            found[row_scale_name(name)] = tensor.row_scale
    return found


def with_parameters(model: Model, arrays: Mapping[str, Array]) -> Model:
    """The model with other arrays, of the same dtypes and shapes, in place of the parameters of those names.

    Self-test record and claimed digest, which are those of the model as it was, are left out.
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
