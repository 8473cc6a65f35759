"""Weights of the engine: codebooks, clustered and dense matrices, norms. All arrays are numpy's."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from cluscomp_kernels.engine.structures import Linear, Matrix, Norm, functions

__all__ = [
    "MAX_DIM",
    "MAX_STAGES",
    "VARIANTS",
    "Codebook",
    "EngineLinear",
    "EngineNorm",
    "Stage",
    "best_variant",
    "largest_code",
    "tiled_bytes",
]

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]

VARIANTS = ("plain", "avx2", "avx512", "amx")
"""Instruction sets, by their numbers in matrix.h."""

VALUE_TYPES = {"float32": 0, "float16": 1, "bfloat16": 2, "int8": 3}

MAX_DIM = 64
"""The widest codebook."""

MAX_STAGES = 64
"""The most stages of a matrix."""

_QUAD, _TILE = 4, 16


def best_variant() -> int:
    """The number of the best instruction set of this machine, or of the one that the environment variable CLUSCOMP_CPU names.

    Raises ValueError if this machine does not have that one.
    """
    available = [number for number in range(len(VARIANTS)) if functions().engine_supported(number)]
    forced = os.environ.get("CLUSCOMP_CPU")
    if not forced:
        return available[-1]
    if forced not in VARIANTS or VARIANTS.index(forced) not in available:
        names = ", ".join(VARIANTS[number] for number in available)
        raise ValueError(f"CLUSCOMP_CPU={forced} is not available on this machine; available: {names}")
    return VARIANTS.index(forced)


def aligned(size: int) -> npt.NDArray[np.uint8]:
    """Zeros, uint8 `[size]`, that begin at a multiple of 64 bytes."""
    room = np.zeros(size + 64, dtype=np.uint8)
    start = -room.ctypes.data % 64
    return room[start : start + size]


def tiled_bytes(in_features: int, out_features: int, dim: int, bits: int) -> int:
    """Length of the tiled codes of a matrix in bytes."""
    groups = -(-out_features // dim)
    rest = groups % _TILE
    return -(-in_features // _QUAD) * (groups - rest + (rest + 1) // 2 * 2) * bits // 2


def largest_code(stream: npt.NDArray[np.uint8], count: int, bits: int) -> int:
    """The largest of the first `count` codes of `bits` bits in a stream, least significant bit first."""
    stream = np.ascontiguousarray(stream)
    return functions().largest_code(stream.ctypes.data, count, bits)


class Codebook:
    """Centroids `[num_clusters, cluster_dim]` as the kernels read them; matrices may share it.

    int8 values are used as they are. Values of other types are rounded to 16 bits: by less than a 65,000th of the largest.
    `variant` is a number of `VARIANTS`.
    Raises ValueError if the vectors are longer than MAX_DIM.
    """

    def __init__(self, values: Array, variant: int) -> None:
        self.num_clusters, self.cluster_dim = values.shape
        if self.cluster_dim > MAX_DIM:
            raise ValueError(f"the kernels support a cluster_dim of 1 to {MAX_DIM}, got {self.cluster_dim}")
        self.wide = values.dtype != np.int8
        self._layout = Matrix()
        size = functions().entries_layout(self._layout, self.num_clusters, self.cluster_dim, self.wide, variant)
        self._entries = aligned(size)
        self._unit = np.zeros(1, dtype=np.float32)
        self.update(values)

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return int(self._layout.bits)

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return self._entries.nbytes

    def update(self, values: Array) -> None:
        """Take other values of the same shape; every matrix that uses the codebook changes with it."""
        floats = np.ascontiguousarray(values, dtype=np.float32)
        self._unit[0] = functions().make_entries(
            self._layout, floats.ctypes.data, self.num_clusters, self.wide, self._entries.ctypes.data
        )

    def fill(self, matrix: Matrix) -> None:
        """Set the fields of a matrix that are the codebook's."""
        for name in ("dim", "planes", "pitch", "bits", "in_registers"):
            setattr(matrix, name, getattr(self._layout, name))
        matrix.entries, matrix.unit = self._entries.ctypes.data, self._unit.ctypes.data


class Stage:
    """Tiled codes (see matrix.h) into a codebook, with an optional row scale float32 `[out_features]`.

    `codes` uint8 are used where they lie, so they may be a mapped file. The caller has checked that they are below
    `num_clusters`; larger ones would give wrong values, but lead to no other memory.
    """

    def __init__(self, codes: npt.NDArray[np.uint8], codebook: Codebook, row_scale: Floats | None) -> None:
        self.codes, self.codebook = np.ascontiguousarray(codes), codebook
        self.row_scale = None if row_scale is None else np.ascontiguousarray(row_scale, dtype=np.float32)


class EngineLinear:
    """`y = x W^T + bias`, clustered in stages that are added, or dense.

    Dense `values` `[out_features, in_features]` are float32, float16, or bfloat16 as uint16. Raises ValueError if codes have
    the wrong length.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        *,
        stages: Sequence[Stage] = (),
        values: Array | None = None,
        value_type: str = "float32",
        bias: Floats | None = None,
    ) -> None:
        self.out_features, self.in_features = shape
        self.stages = list(stages)
        self._values = None if values is None else np.ascontiguousarray(values)
        self._bias = None if bias is None else np.ascontiguousarray(bias, dtype=np.float32)
        self._matrices = (Matrix * len(self.stages))()
        for number, (stage, matrix) in enumerate(zip(self.stages, self._matrices, strict=True)):
            expected = tiled_bytes(self.in_features, self.out_features, stage.codebook.cluster_dim, stage.codebook.bits)
            if stage.codes.nbytes != expected:
                raise ValueError(f"tiled codes have {stage.codes.nbytes} bytes, expected {expected} for {shape}")
            stage.codebook.fill(matrix)
            matrix.codes, matrix.in_features, matrix.out_features = stage.codes.ctypes.data, self.in_features, self.out_features
            matrix.row_scale = _address(stage.row_scale)
            matrix.bias = _address(self._bias) if number == 0 else None
        self.structure = Linear(
            stages=ctypes.cast(self._matrices, ctypes.POINTER(Matrix)),
            values=_address(self._values),
            bias=_address(self._bias),
            in_features=self.in_features,
            out_features=self.out_features,
            num_stages=len(self.stages),
            value_type=VALUE_TYPES[value_type],
        )

    @property
    def nbytes(self) -> int:
        """Bytes that a token reads, without codebooks."""
        own = sum(stage.codes.nbytes + (0 if stage.row_scale is None else stage.row_scale.nbytes) for stage in self.stages)
        return own + (0 if self._values is None else self._values.nbytes) + (0 if self._bias is None else self._bias.nbytes)


class EngineNorm:
    """`x / sqrt(mean(x^2) + eps) * weight`, weight float32 `[size]`; its values may be changed in place."""

    def __init__(self, weight: Floats, eps: float) -> None:
        self.weight = np.array(weight, dtype=np.float32)
        self.structure = Norm(self.weight.ctypes.data, eps, 0)


def _address(array: Array | None) -> int | None:
    return None if array is None else array.ctypes.data
