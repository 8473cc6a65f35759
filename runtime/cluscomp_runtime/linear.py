"""The matrices of a model, which multiply activations and look up embeddings.

Each class stores a matrix `[out_features, in_features]` in its own way. All have the same interface:

- a call multiplies: `x [..., in_features] -> [..., out_features]`;
- `embedding(ids)` looks up rows: `ids [...] -> [..., in_features]`, so that a tied head and the embedding are one object;
- `path` names the kernel in use.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

import numpy as np
import torch
from torch.nn import functional as F

from cluscomp_formats.errors import InvalidFileError, InvalidRequestError, Problem
from cluscomp_formats.ir import Array, ClusteredWeight, Codebook, DenseTensor, Model, Outliers, Stage, Tensor
from cluscomp_formats.parameters import codebook_name, norm_name, row_scale_name
from cluscomp_kernels import clus_linear
from cluscomp_kernels.threads import multi_threaded_torch

__all__ = ["ClusLinear", "DecodedLinear", "DenseLinear", "Matrix", "MatrixBuilder", "check_kernel", "tensor_of"]

OWN_KERNELS = ("auto", "dense", "reference")


def check_kernel(kernel: str, device: torch.device) -> str:
    """Return `kernel` if it is available on the device. Raises InvalidRequestError, listing the available ones, if not."""
    statuses = {status.name: status for status in clus_linear.paths(device)}
    usable = dict.fromkeys((*OWN_KERNELS, *(name for name, status in statuses.items() if status.available)))
    if kernel not in usable:
        reason = f": {statuses[kernel].reason}" if kernel in statuses else ""
        message = f"no such kernel on {device}{reason}"
        raise InvalidRequestError(Problem("unknown_kernel", message, found=repr(kernel), expected=", ".join(usable)))
    return kernel


def tensor_of(array: Array) -> torch.Tensor:
    """Return an array as a torch tensor of the same dtype; it shares the array's memory if that is writable."""
    values = array.read()
    if not values.flags.writeable:
        values = values.copy()
    if array.dtype == "bfloat16":
        return torch.from_numpy(values.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(values)


class DenseLinear:
    """A dense matrix, stored in the compute dtype."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None, *, path: str = "dense") -> None:
        self.weight = weight
        self.bias = bias
        self.path = path

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        with multi_threaded_torch():
            return F.linear(x, self.weight, self.bias)

    def embedding(self, ids: torch.Tensor) -> torch.Tensor:
        return F.embedding(ids, self.weight)


class DecodedLinear:
    """A matrix that is read or decoded again in every call: the slow reference for self-tests.

    Nothing is kept, so memory is bounded by one matrix, not by the size of the model.
    """

    path = "reference"

    def __init__(
        self,
        tensor: Tensor,
        bias: Tensor | None,
        *,
        dtype: torch.dtype,
        device: torch.device,
        observe: Callable[[str, torch.Tensor], None] | None = None,
    ) -> None:
        self.tensor = tensor
        self.bias = bias
        self.dtype = dtype
        self.device = device
        self.observe = observe

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self.observe is not None:
            self.observe(self.tensor.name, x)
        bias = None if self.bias is None else decoded(self.bias).to(self.device, self.dtype)
        return F.linear(x, decoded(self.tensor).to(self.device, self.dtype), bias)

    def embedding(self, ids: torch.Tensor) -> torch.Tensor:
        return decoded(self.tensor)[ids.cpu()].to(self.device, self.dtype)


def decoded(tensor: Tensor) -> torch.Tensor:
    """Return the tensor's values on the CPU, in float32 if it is clustered, else in its own dtype.

    Raises InvalidFileError if codes or outliers are out of range.
    """
    if isinstance(tensor, DenseTensor):
        return tensor_of(tensor.values)
    try:
        return torch.from_numpy(tensor.decode())
    except IndexError as error:
        raise InvalidFileError(
            Problem("code_out_of_range", f"codes or outliers are out of range: {error}", None, tensor.name)
        ) from error


class ClusLinear:
    """A clustered matrix on a codebook kernel.

    `y = sum over stages of kernel(x * column_scale) * row_scale + outliers @ x + bias`. The kernel applies row scale and bias.
    """

    def __init__(
        self,
        stages: list[clus_linear.PreparedWeight],
        *,
        column_scale: torch.Tensor | None = None,
        outliers: torch.Tensor | None = None,
    ) -> None:
        self.stages = stages
        self.column_scale = column_scale
        self.outliers = outliers
        self.path = stages[0].path

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        scaled = x if self.column_scale is None else x * self.column_scale
        y = self.stages[0].linear(scaled)
        for stage in self.stages[1:]:
            y = y + stage.linear(scaled)
        if self.outliers is not None:
            flat = x.reshape(-1, x.shape[-1]).to(self.outliers.dtype)
            y = y + (self.outliers @ flat.T).T.reshape(y.shape).to(y.dtype)
        return y

    def embedding(self, ids: torch.Tensor) -> torch.Tensor:
        rows = self.stages[0].embedding(ids)
        for stage in self.stages[1:]:
            rows = rows + stage.embedding(ids)
        if self.column_scale is not None:
            rows = rows * self.column_scale
        if self.outliers is not None:
            rows = rows + _sparse_rows(self.outliers, ids).to(rows.dtype)
        return rows


def _sparse_rows(matrix: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Return rows `[..., in_features]` of a CSR matrix as a dense tensor."""
    starts, columns, values = matrix.crow_indices(), matrix.col_indices(), matrix.values()
    flat = ids.reshape(-1)
    counts = starts[flat + 1] - starts[flat]
    row = torch.repeat_interleave(torch.arange(flat.numel(), device=flat.device), counts)
    offset = torch.arange(row.numel(), device=flat.device) - (counts.cumsum(0) - counts)[row]
    entry = starts[flat][row] + offset
    rows = values.new_zeros(flat.numel(), matrix.shape[1])
    rows[row, columns[entry]] = values[entry]
    return rows.reshape(*ids.shape, -1)


Matrix = DenseLinear | DecodedLinear | ClusLinear


@dataclass
class MatrixBuilder:
    """Builds matrices from tensors of the IR, for one device, dtype and kernel; the matrices share codebooks.

    `kernel` is a path of `cluscomp_kernels.clus_linear`, "auto" for the fastest available one, "dense" to decode every matrix
    once, or "reference" to decode in every call.
    """

    kernel: str
    dtype: torch.dtype
    device: torch.device
    observe: Callable[[str, torch.Tensor], None] | None = None
    """Called with a matrix's name and input in every multiplication, by the "reference" kernel only."""
    paths: dict[str, str] = field(default_factory=dict)
    """Kernel of each matrix, by tensor name."""
    without_kernel: list[str] = field(default_factory=list)
    """Clustered matrices that were decoded because no kernel supports them."""
    _codebooks: dict[str, clus_linear.PreparedCodebook] = field(default_factory=dict)
    _matrices: dict[str, Matrix] = field(default_factory=dict)
    _norms: dict[str, torch.Tensor] = field(default_factory=dict)

    def build(self, tensor: Tensor, bias: Tensor | None = None) -> Matrix:
        """Build a matrix `[out_features, in_features]` with its bias `[out_features]`.

        Raises InvalidFileError if codes or outliers are out of range; InvalidRequestError if the kernel does not support the
        codebook.
        """
        matrix = self._build(tensor, bias)
        self.paths[tensor.name] = matrix.path
        self._matrices[tensor.name] = matrix
        return matrix

    def update(self, model: Model, names: Collection[str]) -> None:
        """Copy the parameters with these names (see `cluscomp_formats.parameters`) from `model` to the matrices and norms.

        `model` must be the model they were built from, except for the values of these parameters. Prepared codebooks and row
        scales are overwritten in place, codes are not touched, and decoded matrices are decoded again.
        """
        with torch.inference_mode():
            for name, codebook in model.codebooks.items():
                if name in self._codebooks and codebook_name(name) in names:
                    self._codebooks[name].values.copy_(self._prepared(codebook).values)
            for name, matrix in self._matrices.items():
                tensor = model.tensors[name]
                if isinstance(tensor, ClusteredWeight):
                    self._update(matrix, tensor, names)
            for name, weight in self._norms.items():
                if norm_name(name) in names:
                    weight.copy_(decoded(model.tensors[name]))

    def _update(self, matrix: Matrix, tensor: ClusteredWeight, names: Collection[str]) -> None:
        rescaled = tensor.row_scale is not None and row_scale_name(tensor.name) in names
        if isinstance(matrix, DecodedLinear):
            matrix.tensor = tensor
        elif isinstance(matrix, DenseLinear):
            if rescaled or any(codebook_name(stage.codebook.name) in names for stage in tensor.stages):
                matrix.weight.copy_(decoded(tensor))
        elif rescaled and tensor.row_scale is not None:
            for stage in matrix.stages:
                stage.replace_row_scale(tensor_of(tensor.row_scale))

    def _build(self, tensor: Tensor, bias: Tensor | None) -> Matrix:
        if self.kernel == "reference":
            return DecodedLinear(tensor, bias, dtype=self.dtype, device=self.device, observe=self.observe)
        bias_values = None if bias is None else self.vector(bias)
        if isinstance(tensor, DenseTensor):
            return DenseLinear(self._place(decoded(tensor)), bias_values)
        # The fast kernels always compute in float32.
        if self.kernel == "dense" or (self.kernel == "auto" and self.dtype == torch.float64):
            return DenseLinear(self._place(decoded(tensor)), bias_values, path="dense (decoded)")
        if tensor.group_axis == "in":
            self.without_kernel.append(tensor.name)
            return DenseLinear(self._place(decoded(tensor)), bias_values, path="dense (decoded: groups along the in axis)")
        return self._clustered(tensor, bias_values)

    def _clustered(self, tensor: ClusteredWeight, bias: torch.Tensor | None) -> ClusLinear:
        # Copied because `update` writes to it, and it may share memory with the model.
        row_scale = None if tensor.row_scale is None else tensor_of(tensor.row_scale).clone()
        stages = [
            self._stage(tensor, stage, row_scale, bias if index == 0 else None) for index, stage in enumerate(tensor.stages)
        ]
        column_scale = None if tensor.column_scale is None else self._place(tensor_of(tensor.column_scale))
        outliers = None if tensor.outliers is None else self._outliers(tensor, tensor.outliers)
        return ClusLinear(stages, column_scale=column_scale, outliers=outliers)

    def _stage(
        self, tensor: ClusteredWeight, stage: Stage, row_scale: torch.Tensor | None, bias: torch.Tensor | None
    ) -> clus_linear.PreparedWeight:
        codebook = self._codebook(stage.codebook)
        codes = tensor_of(stage.codes)
        try:
            return clus_linear.prepare(
                codebook, codes, tensor.shape[0], row_scale=row_scale, bias=bias, device=self.device, dtype=self.dtype
            )
        except ValueError as error:
            # The IR guarantees shapes and dtypes, so a code must be out of range.
            raise InvalidFileError(Problem("code_out_of_range", str(error), None, tensor.name)) from error

    def _codebook(self, codebook: Codebook) -> clus_linear.PreparedCodebook:
        if codebook.name not in self._codebooks:
            self._codebooks[codebook.name] = self._prepared(codebook)
        return self._codebooks[codebook.name]

    def _prepared(self, codebook: Codebook) -> clus_linear.PreparedCodebook:
        # Copied for the same reason as row scales.
        values = tensor_of(codebook.values).clone()
        try:
            return clus_linear.prepare_codebook(values, path=self.kernel, device=self.device)
        except ValueError as error:
            message = f"the kernel {self.kernel!r} cannot use codebook {codebook.name!r}: {error}"
            raise InvalidRequestError(Problem("kernel_unfit", message, remedy='use kernel="auto"')) from error

    def _outliers(self, tensor: ClusteredWeight, outliers: Outliers) -> torch.Tensor:
        """Return the outliers as a CSR matrix, float64 if that is the compute dtype, else float32."""
        out_features, in_features = tensor.shape
        positions = outliers.positions.read().astype(np.int64)
        if len(positions) and (positions.min() < 0 or positions.max() >= tensor.num_weights):
            found, expected = str(positions.max()), f"0 to {tensor.num_weights - 1}"
            raise InvalidFileError(
                Problem("outlier_position", "outlier outside the weight", None, tensor.name, found, expected)
            )
        starts = np.searchsorted(positions, np.arange(out_features + 1, dtype=np.int64) * in_features)
        dtype = torch.float64 if self.dtype == torch.float64 else torch.float32
        with warnings.catch_warnings():
            # torch warns on first use that its CSR layout is in beta; tests cover the operations used here.
            warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
            return torch.sparse_csr_tensor(
                torch.from_numpy(starts.astype(np.int64)),
                torch.from_numpy(positions % in_features),
                tensor_of(outliers.values).to(dtype),
                tensor.shape,
                device=self.device,
                check_invariants=True,
            )

    def warn_without_kernel(self) -> None:
        """Warn about clustered matrices that were decoded because no kernel supports them."""
        if self.without_kernel:
            count, first = len(self.without_kernel), self.without_kernel[0]
            warnings.warn(
                f"{count} clustered matrices ({first}, ...) have groups along the in axis, which no kernel supports: they were "
                f"decoded to dense {str(self.dtype).removeprefix('torch.')} and need as much memory as uncompressed ones",
                stacklevel=3,
            )

    def dense(self, tensor: Tensor) -> DenseLinear:
        """Build a matrix that is dense with every kernel, such as the router of experts."""
        return DenseLinear(self._place(decoded(tensor)))

    def vector(self, tensor: Tensor) -> torch.Tensor:
        """Return a bias `[out_features]` in the compute dtype."""
        return self._place(decoded(tensor))

    def norm(self, tensor: Tensor) -> torch.Tensor:
        """Return a norm's weight in the compute dtype, or in float32 if that is wider."""
        dtype = torch.float32 if self.dtype.itemsize < 4 else self.dtype
        self._norms[tensor.name] = decoded(tensor).clone().to(device=self.device, dtype=dtype)
        return self._norms[tensor.name]

    def _place(self, values: torch.Tensor) -> torch.Tensor:
        return values.to(device=self.device, dtype=self.dtype)
