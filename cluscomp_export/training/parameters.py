"""A clustered model as a decoder with trainable codebooks, row scales and norms; codes, embedding and head are fixed."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import numpy as np
import torch

from cluscomp_export.codebook_rounding import LARGEST
from cluscomp_export.sources.linears import embedding_tensor, head_tensor
from cluscomp_formats.architectures import check_tensors, describe
from cluscomp_formats.errors import InvalidRequestError, Problem
from cluscomp_formats.ir import AnyArray, Array, ClusteredWeight, DenseTensor, Model, Tensor, float32_to_bfloat16
from cluscomp_formats.parameters import (
    KINDS,
    codebook_name,
    kind_of,
    norm_name,
    parameters,
    row_scale_name,
    with_parameters,
)
from cluscomp_kernels import clus_linear
from cluscomp_runtime.blocks import BlockRunner
from cluscomp_runtime.decoder import Decoder
from cluscomp_runtime.linear import MatrixBuilder, tensor_of

__all__ = ["Trainable", "TrainableBlock", "TrainableModel"]


class _TrainableLinear:
    """A clustered matrix with the trainable operator, which keeps no decoded weight for the backward pass."""

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
    """Builds trainable matrices from clustered ones with a single stage along the out axis and no extras but row scales."""

    def __init__(self, model: Model, kinds: Collection[str], device: torch.device) -> None:
        super().__init__("dense", torch.float32, device)
        frozen = (embedding_tensor(model), head_tensor(model))
        trained = {name for name, tensor in model.clustered.items() if name not in frozen and _trains(tensor)}
        others = (tensor for name, tensor in model.clustered.items() if name not in trained)
        self.trained = trained
        self.kinds = kinds
        # A codebook shared with weights that are not trained must not change.
        self.fixed = {codebook_name(stage.codebook.name) for tensor in others for stage in tensor.stages}
        self.parameters: dict[str, torch.Tensor] = {}

    def build(self, tensor: Tensor, bias: Tensor | None = None) -> Any:
        if isinstance(tensor, DenseTensor) or tensor.name not in self.trained:
            return super().build(tensor, bias)
        stage = tensor.stages[0]
        codebook = self._parameter(codebook_name(stage.codebook.name), stage.codebook.values)
        scale = None if tensor.row_scale is None else self._parameter(row_scale_name(tensor.name), tensor.row_scale)
        bias_values = None if bias is None else self.vector(bias)
        return _TrainableLinear(codebook, tensor_of(stage.codes).to(self.device), tensor.shape[0], scale, bias_values)

    def norm(self, tensor: Tensor) -> torch.Tensor:
        if isinstance(tensor, ClusteredWeight):
            return super().norm(tensor)
        return self._parameter(norm_name(tensor.name), tensor.values)

    def _parameter(self, name: str, values: Array) -> torch.Tensor:
        if name in self.parameters:
            return self.parameters[name]
        master = torch.from_numpy(values.to_float32().copy()).to(self.device)
        if kind_of(name) in self.kinds and name not in self.fixed:
            self.parameters[name] = master.requires_grad_()
        return master


def _trains(tensor: ClusteredWeight) -> bool:
    plain = tensor.group_axis == "out" and tensor.column_scale is None and tensor.outliers is None
    return plain and len(tensor.stages) == 1


class Trainable:
    """`model` with trainable `parameters`: float32 master copies, by the names of `cluscomp_formats.parameters`."""

    def __init__(self, model: Model, parameters: Mapping[str, torch.Tensor]) -> None:
        self.model = model
        self.parameters = parameters

    def with_values(self, values: Mapping[str, AnyArray]) -> Model:
        """The model with other values of its parameters, by name, in the dtypes in which they are stored."""
        known = parameters(self.model)
        return with_parameters(self.model, {name: Array.of(array, known[name].dtype) for name, array in values.items()})

    def specs(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Stored dtype, a key of `cluscomp_formats.ir.DTYPES`, and shape of every parameter, by name."""
        known = parameters(self.model)
        return {name: (known[name].dtype, known[name].shape) for name in self.parameters}

    def stored(self) -> dict[str, AnyArray]:
        """The parameters rounded to the dtypes in which they are stored, by name."""
        known = parameters(self.model)
        return {name: _rounded(values.detach().cpu().numpy(), known[name].dtype) for name, values in self.parameters.items()}

    @contextlib.contextmanager
    def as_stored(self) -> Iterator[None]:
        """In this context, the parameters have the values that would be stored."""
        masters = {name: values.detach().clone() for name, values in self.parameters.items()}
        known = parameters(self.model)
        rounded = {name: Array.of(array, known[name].dtype).to_float32() for name, array in self.stored().items()}
        with torch.no_grad():
            for name, values in self.parameters.items():
                values.copy_(torch.from_numpy(rounded[name]))
            try:
                yield
            finally:
                for name, values in self.parameters.items():
                    values.copy_(masters[name])


class TrainableModel(Trainable):
    """A `decoder` that computes the same as `model`, from `parameters`: float32 master copies, by name.

    Names are those of `cluscomp_formats.parameters`. `kinds` of parameters are trained, all others are constants; a shared
    codebook is one parameter. Memory: codes at 16 bits, embedding and head as float32. Raises UnsupportedError for an
    architecture that the runtime does not know, InvalidRequestError if there is nothing to train.
    """

    def __init__(self, model: Model, kinds: Collection[str] = KINDS, *, device: torch.device | None = None) -> None:
        description = describe(model.config)
        check_tensors(model, description)
        builder = _TrainableBuilder(model, kinds, device or torch.device("cpu"))
        self.decoder = Decoder(model, description, builder)
        super().__init__(model, builder.parameters)
        if not builder.trained:
            raise InvalidRequestError(Problem("nothing_to_train", "the model has no codebook that can be trained"))
        if not self.parameters:
            found, expected = ", ".join(kinds), ", ".join(sorted({kind_of(name) for name in parameters(model)}))
            raise InvalidRequestError(
                Problem("nothing_to_train", "the model has no parameters of these kinds", None, None, found, expected)
            )


class TrainableBlock(Trainable):
    """Block `index` of a clustered model, made of its `tensors`; the codebooks named in `fixed` are not trained."""

    def __init__(
        self,
        runner: BlockRunner,
        index: int,
        tensors: Mapping[str, Tensor],
        fixed: Collection[str] = (),
        *,
        device: torch.device | None = None,
    ) -> None:
        model = runner.block(index, tensors)
        builder = _TrainableBuilder(model, KINDS, device or torch.device("cpu"))
        builder.fixed.update(codebook_name(name) for name in fixed)
        self._runner = runner
        self._layer = runner.layer(index, model, builder)
        super().__init__(model, builder.parameters)

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """The output for `hidden` `[windows, tokens, hidden_size]`, on its device; differentiable."""
        result: torch.Tensor = self._layer(hidden, self._runner.positions(hidden), None)
        return result


def _rounded(values: AnyArray, dtype: str) -> AnyArray:
    if dtype == "bfloat16":
        return float32_to_bfloat16(values)
    if dtype == "float16":
        # A training that leaves the range of float16 has failed, but must not store an infinity.
        values = np.clip(values, -65504.0, 65504.0)
    if dtype == "int8":
        values = np.clip(np.rint(values), -LARGEST, LARGEST)
    return values.astype(dtype)
