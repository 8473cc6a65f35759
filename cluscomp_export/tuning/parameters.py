"""A clustered model as a decoder whose codebooks, row scales and norms are parameters; codes, embedding and head are fixed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from cluscomp_export.codebook_rounding import LARGEST
from cluscomp_export.sources.linears import embedding_tensor, head_tensor
from cluscomp_formats.errors import InvalidRequestError, Problem
from cluscomp_formats.ir import AnyArray, Array, ClusteredWeight, Codebook, DenseTensor, Model, Tensor, float32_to_bfloat16
from cluscomp_kernels import clus_linear
from cluscomp_runtime.architecture import DecoderSettings, check_tensors
from cluscomp_runtime.decoder import Decoder
from cluscomp_runtime.linear import MatrixBuilder, tensor_of

__all__ = ["TrainableModel"]


class _TrainableLinear:
    """A clustered matrix on the trainable operator, which keeps no decoded weight for the backward pass."""

    path = "trainable"

    def __init__(
        self,
        codebook: torch.Tensor,
        codes: torch.Tensor,
        out_features: int,
        scale: torch.Tensor | None,
        bias: torch.Tensor | None,
    ) -> None:
        self.operands = (codebook, codes, out_features, scale, bias)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return clus_linear.linear(x, *self.operands)


class _TrainableBuilder(MatrixBuilder):
    """Builds matrices on parameters where a clustered one has a single stage along the out axis and nothing but row scales."""

    def __init__(self, frozen: tuple[str | None, ...]) -> None:
        super().__init__("dense", torch.float32, torch.device("cpu"))
        self.frozen = frozen
        self.parameters: dict[str, torch.Tensor] = {}

    def build(self, tensor: Tensor, bias: Tensor | None = None) -> Any:
        if isinstance(tensor, DenseTensor) or tensor.name in self.frozen or not _trains(tensor):
            return super().build(tensor, bias)
        stage = tensor.stages[0]
        codebook = self._parameter(f"codebook {stage.codebook.name}", stage.codebook.values)
        scale = None if tensor.row_scale is None else self._parameter(f"scale {tensor.name}", tensor.row_scale)
        bias_values = None if bias is None else self.vector(bias)
        return _TrainableLinear(codebook, tensor_of(stage.codes), tensor.shape[0], scale, bias_values)

    def norm(self, tensor: Tensor) -> torch.Tensor:
        if isinstance(tensor, ClusteredWeight):
            return super().norm(tensor)
        return self._parameter(f"norm {tensor.name}", tensor.values)

    def _parameter(self, name: str, values: Array) -> torch.Tensor:
        if name not in self.parameters:
            self.parameters[name] = torch.from_numpy(values.to_float32().copy()).requires_grad_()
        return self.parameters[name]


def _trains(tensor: ClusteredWeight) -> bool:
    plain = tensor.group_axis == "out" and tensor.column_scale is None and tensor.outliers is None
    return plain and len(tensor.stages) == 1


class TrainableModel:
    """`decoder` computes what `model` does, in float32 on the CPU, from `parameters`: float32 master copies by name.

    Names are `codebook NAME`, `scale TENSOR`, `norm TENSOR`; a shared codebook is one parameter. Memory: codes at 16 bits,
    embedding and head as float32. Raises UnsupportedError for an architecture the runtime does not know, InvalidRequestError if
    nothing of the model can be trained.
    """

    def __init__(self, model: Model) -> None:
        settings = DecoderSettings.from_config(model.config)
        check_tensors(model, settings)
        builder = _TrainableBuilder((embedding_tensor(model), head_tensor(model)))
        self.model = model
        self.decoder = Decoder(model, settings, builder)
        self.parameters: Mapping[str, torch.Tensor] = builder.parameters
        if not any(name.startswith("codebook ") for name in self.parameters):
            raise InvalidRequestError(Problem("nothing_to_train", "the model has no codebook that can be trained"))

    def with_values(self, values: Mapping[str, AnyArray]) -> Model:
        """The model with other values in place of its codebooks, row scales and norms: by name, in their dtypes of storage."""
        codebooks: dict[str, Codebook] = {}

        def trained(name: str, array: Array) -> Array:
            return Array.of(values[name], array.dtype) if name in values else array

        def with_codebook(codebook: Codebook) -> Codebook:
            if codebook.name not in codebooks:
                array = trained(f"codebook {codebook.name}", codebook.values)
                codebooks[codebook.name] = Codebook(codebook.name, array)
            return codebooks[codebook.name]

        tensors: dict[str, Tensor] = {}
        for name, tensor in self.model.tensors.items():
            if isinstance(tensor, DenseTensor):
                tensors[name] = DenseTensor(name, trained(f"norm {name}", tensor.values))
                continue
            stages = tuple(replace(stage, codebook=with_codebook(stage.codebook)) for stage in tensor.stages)
            scale = None if tensor.row_scale is None else trained(f"scale {name}", tensor.row_scale)
            tensors[name] = replace(tensor, stages=stages, row_scale=scale)
        return replace(self.model, tensors=tensors, self_test=None)

    def forms(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Dtype of storage, a key of `cluscomp_formats.ir.DTYPES`, and shape of every parameter, by name."""
        dtypes = self._dtypes()
        return {name: (dtypes[name], tuple(values.shape)) for name, values in self.parameters.items()}

    def stored(self) -> dict[str, AnyArray]:
        """The parameters rounded to the dtypes they are stored in, by name."""
        dtypes = self._dtypes()
        return {name: _rounded(values.detach().numpy(), dtypes[name]) for name, values in self.parameters.items()}

    def _dtypes(self) -> dict[str, str]:
        dtypes = {f"codebook {name}": codebook.values.dtype for name, codebook in self.model.codebooks.items()}
        for name, tensor in self.model.tensors.items():
            if isinstance(tensor, DenseTensor):
                dtypes[f"norm {name}"] = tensor.values.dtype
            elif tensor.row_scale is not None:
                dtypes[f"scale {name}"] = tensor.row_scale.dtype
        return dtypes


def _rounded(values: AnyArray, dtype: str) -> AnyArray:
    if dtype == "bfloat16":
        return float32_to_bfloat16(values)
    if dtype == "float16":
        # A training that leaves the range of float16 has gone wrong, but shall not store an infinity.
        values = np.clip(values, -65504.0, 65504.0)
    if dtype == "int8":
        values = np.clip(np.rint(values), -LARGEST, LARGEST)
    return values.astype(dtype)
