"""The intermediate representation: what every reader yields and every writer takes.

A `Model` is a configuration and named tensors, each *clustered* (`ClusteredWeight`) or *dense* (`DenseTensor`); an
uncompressed source is simply a model whose tensors are all dense. Everything is frozen and lazy: shapes, dtypes and sizes
cost no IO, payloads are read when asked for, one tensor at a time, so any reader can feed any writer.

`ClusteredWeight.decode()` in plain numpy is the meaning of every kernel and every file format.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from cluscomp_formats.strict_json import canonical_json

__all__ = [
    "DTYPES",
    "MAX_CLUSTERS",
    "Array",
    "ClusteredWeight",
    "Codebook",
    "DenseTensor",
    "DigestBuilder",
    "Model",
    "Outliers",
    "Stage",
    "Tensor",
    "code_bits",
]

AnyArray = npt.NDArray[Any]

MAX_CLUSTERS = 65536
"""A code fits 16 bits."""

DTYPES: dict[str, np.dtype[Any]] = {
    "float64": np.dtype("<f8"),
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype("<u2"),
    "int64": np.dtype("<i8"),
    "int32": np.dtype("<i4"),
    "int16": np.dtype("<i2"),
    "int8": np.dtype("i1"),
    "uint64": np.dtype("<u8"),
    "uint32": np.dtype("<u4"),
    "uint16": np.dtype("<u2"),
    "uint8": np.dtype("u1"),
    "bool": np.dtype("?"),
}
"""Names of the storage types and the numpy type that holds each; bfloat16, which numpy lacks, is held as its 16 bits."""

FLOAT_DTYPES = ("float64", "float32", "float16", "bfloat16")
POSITION_DTYPES = ("uint32", "uint64")
CODEBOOK_DTYPES = ("float32", "float16", "bfloat16", "int8")


def bfloat16_to_float32(bits: AnyArray) -> npt.NDArray[np.float32]:
    """Widen bfloat16 bit patterns (uint16) to float32, exactly."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def float32_to_bfloat16(values: AnyArray) -> npt.NDArray[np.uint16]:
    """Round float32 to bfloat16 bit patterns, to nearest even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


@dataclass(frozen=True)
class Array:
    """A lazy, read-only array: its shape and dtype are known, its payload is produced by `read()`.

    `dtype` is a key of `DTYPES`.
    """

    shape: tuple[int, ...]
    dtype: str
    loader: Callable[[], AnyArray] = field(repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"unknown dtype {self.dtype!r}; known: {', '.join(DTYPES)}")
        if any(length < 0 for length in self.shape):
            raise ValueError(f"a shape has no negative lengths, got {self.shape}")

    @classmethod
    def of(cls, values: AnyArray, dtype: str | None = None) -> Array:
        """Wrap a numpy array that is already in memory. `dtype="bfloat16"` takes its uint16 bit patterns."""
        name = dtype or values.dtype.name
        if name not in DTYPES:
            raise ValueError(f"unknown dtype {name!r}; known: {', '.join(DTYPES)}")
        if name == "bfloat16" and values.dtype != DTYPES[name]:
            raise ValueError(f"bfloat16 is given as its bit patterns in uint16, got {values.dtype}; see float32_to_bfloat16")
        stored = np.asarray(values, dtype=DTYPES[name], order="C")
        return cls(values.shape, name, lambda: stored)

    def __reduce__(self) -> tuple[Callable[[AnyArray, str], Array], tuple[AnyArray, str]]:
        """Pickled with its payload, which may be a file's: the other process needs no file."""
        return Array.of, (self.read(), self.dtype)

    def __deepcopy__(self, memo: dict[int, Any]) -> Array:
        """Nobody writes to the payload, so a copy needs none of its own."""
        return self

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Payload size in bytes."""
        return self.size * DTYPES[self.dtype].itemsize

    def read(self) -> AnyArray:
        """The payload as a C-contiguous little-endian numpy array of `shape` and the storage type of `dtype`.

        The result may be a read-only memory map; do not write to it. Reading twice may do the work twice.
        """
        values = self.loader()
        if values.shape != self.shape or values.dtype != DTYPES[self.dtype]:
            raise ValueError(f"loader gave {values.dtype} {values.shape}, declared {self.dtype} {self.shape}")
        # Not ascontiguousarray, which would make a vector of a scalar.
        return np.asarray(values, order="C")

    def to_float32(self) -> npt.NDArray[np.float32]:
        """The payload widened (float64: rounded, beyond its range to infinity) to float32."""
        values = self.read()
        if self.dtype == "bfloat16":
            return bfloat16_to_float32(values)
        with np.errstate(all="ignore"):
            return values.astype(np.float32, copy=False)


def code_bits(num_clusters: int) -> int:
    """Bits per code of a codebook of that many clusters, `max(1, ceil(log2 num_clusters))`."""
    return max(1, (num_clusters - 1).bit_length())


@dataclass(frozen=True)
class Codebook:
    """Centroids `[num_clusters, cluster_dim]` under a name. Several weights may refer to one codebook.

    Values of int8 are the whole numbers they are; what a step is worth, the row scales of the weights say.
    """

    name: str
    values: Array

    def __post_init__(self) -> None:
        if len(self.values.shape) != 2 or self.values.dtype not in CODEBOOK_DTYPES:
            names = " or ".join(CODEBOOK_DTYPES)
            raise ValueError(f"codebook {self.name!r} must be 2-D, {names}, got {self.values.dtype} {self.values.shape}")
        if not (1 <= self.num_clusters <= MAX_CLUSTERS and self.cluster_dim >= 1):
            raise ValueError(f"codebook {self.name!r} has shape {self.values.shape}; 1 to {MAX_CLUSTERS} clusters allowed")

    @property
    def num_clusters(self) -> int:
        return self.values.shape[0]

    @property
    def cluster_dim(self) -> int:
        return self.values.shape[1]

    @property
    def code_bits(self) -> int:
        """Bits per code, `max(1, ceil(log2 num_clusters))`."""
        return code_bits(self.num_clusters)


@dataclass(frozen=True)
class Stage:
    """One codebook and one code per vector; the decoded stages of a weight add up.

    `codes` is uint16 `[in_features, ceil(out_features / cluster_dim)]` for vectors along the out axis (the reference
    layout), `[out_features, ceil(in_features / cluster_dim)]` for vectors along the in axis.
    """

    codebook: Codebook
    codes: Array


@dataclass(frozen=True)
class Outliers:
    """Sparse corrections added to the decoded weight.

    `positions` uint32 or uint64 `[count]`, strictly increasing, index the row-major `[out_features, in_features]` weight;
    `values` float `[count]`.
    """

    positions: Array
    values: Array

    def __post_init__(self) -> None:
        positions, values = self.positions, self.values
        if len(positions.shape) != 1 or positions.dtype not in POSITION_DTYPES:
            raise ValueError(f"outlier positions must be 1-D uint32 or uint64, got {positions.dtype} {positions.shape}")
        if values.shape != positions.shape or values.dtype not in FLOAT_DTYPES:
            raise ValueError(f"outlier values are {values.dtype} {values.shape}, expected float {positions.shape}")


@dataclass(frozen=True)
class ClusteredWeight:
    """A weight matrix as codes into codebooks.

    `weight = (sum over stages of codebook[codes]) * row_scale[:, None] * column_scale[None, :] + outliers`, computed in
    float32, the products taken in that order. `shape` is `(out_features, in_features)`; `row_scale` float
    `[out_features]`, `column_scale` float `[in_features]`. Vectors that reach past the padded axis are cut off.
    """

    name: str
    shape: tuple[int, int]
    stages: tuple[Stage, ...]
    group_axis: Literal["out", "in"] = "out"
    row_scale: Array | None = None
    column_scale: Array | None = None
    outliers: Outliers | None = None

    def __post_init__(self) -> None:
        if len(self.shape) != 2 or min(self.shape) < 1:
            raise ValueError(f"{self.name}: a clustered weight is [out_features, in_features], got shape {self.shape}")
        if self.group_axis not in ("out", "in"):
            raise ValueError(f"{self.name}: group_axis is 'out' or 'in', got {self.group_axis!r}")
        if not self.stages:
            raise ValueError(f"{self.name}: a clustered weight needs at least one stage")
        for stage in self.stages:
            expected = self.codes_shape(stage.codebook.cluster_dim)
            if stage.codes.shape != expected or stage.codes.dtype != "uint16":
                found = f"{stage.codes.dtype} {stage.codes.shape}"
                raise ValueError(f"{self.name}: codes are {found}, expected uint16 {expected}")
        for label, scale, length in (
            ("row_scale", self.row_scale, self.shape[0]),
            ("column_scale", self.column_scale, self.shape[1]),
        ):
            if scale is not None and (scale.shape != (length,) or scale.dtype not in FLOAT_DTYPES):
                raise ValueError(f"{self.name}: {label} is {scale.dtype} {scale.shape}, expected float ({length},)")

    def codes_shape(self, cluster_dim: int) -> tuple[int, int]:
        """Shape of the codes of a stage of that cluster_dim."""
        along, across = self.shape if self.group_axis == "out" else self.shape[::-1]
        return across, -(-along // cluster_dim)

    @property
    def num_weights(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def extra_arrays(self) -> tuple[tuple[str, Array], ...]:
        """The optional payloads that are present, in canonical order."""
        outliers = self.outliers
        named = (
            ("row_scale", self.row_scale),
            ("column_scale", self.column_scale),
            ("outlier_positions", outliers.positions if outliers else None),
            ("outlier_values", outliers.values if outliers else None),
        )
        return tuple((name, array) for name, array in named if array is not None)

    @property
    def own_bits(self) -> int:
        """Size in bits of codes at their true width, scales and outliers; codebooks, which may be shared, not counted."""
        codes = sum(stage.codes.size * stage.codebook.code_bits for stage in self.stages)
        return codes + sum(8 * array.nbytes for _, array in self.extra_arrays)

    # Infinity and NaN come out as IEEE 754 has it, without warnings.
    @np.errstate(all="ignore")
    def decode(self) -> npt.NDArray[np.float32]:
        """The weight as float32 `[out_features, in_features]`: the reference for every kernel and format.

        Raises IndexError if a code lies past its codebook.
        """
        out_features, in_features = self.shape
        along = out_features if self.group_axis == "out" else in_features
        across = in_features if self.group_axis == "out" else out_features
        total = np.zeros((across, along), dtype=np.float32)
        for stage in self.stages:
            vectors = stage.codebook.values.to_float32()[stage.codes.read()]
            total += vectors.reshape(across, -1)[:, :along]
        weight = np.ascontiguousarray(total.T) if self.group_axis == "out" else total
        if self.row_scale is not None:
            weight *= self.row_scale.to_float32()[:, None]
        if self.column_scale is not None:
            weight *= self.column_scale.to_float32()[None, :]
        if self.outliers is not None:
            weight.reshape(-1)[self.outliers.positions.read()] += self.outliers.values.to_float32()
        return weight


@dataclass(frozen=True)
class DenseTensor:
    """A tensor that is not clustered: norms, biases, often embeddings. Of any shape and dtype."""

    name: str
    values: Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def num_weights(self) -> int:
        return self.values.size

    @property
    def own_bits(self) -> int:
        """Size in bits."""
        return 8 * self.values.nbytes

    def decode(self) -> npt.NDArray[np.float32]:
        """The values as float32."""
        return self.values.to_float32()


Tensor = ClusteredWeight | DenseTensor


@dataclass(frozen=True)
class Model:
    """A model: configuration, tensors by Hugging Face name, side files, provenance and self-test record.

    `config` is the content of a Hugging Face `config.json`. `files` holds tokenizer and other side files by name, as uint8
    `[bytes]`. `provenance` and `self_test` are JSON values; see `docs/packed-format.md`. `claimed_digest` is what a file says
    the digest of the model in it is.
    """

    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    files: Mapping[str, Array] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    self_test: Mapping[str, Any] | None = None
    claimed_digest: str | None = None

    def __post_init__(self) -> None:
        for name, tensor in self.tensors.items():
            if tensor.name != name:
                raise ValueError(f"tensor {tensor.name!r} is listed under {name!r}")
        seen: dict[str, Codebook] = {}
        for codebook in self._codebook_uses():
            if seen.setdefault(codebook.name, codebook) is not codebook:
                raise ValueError(f"two different codebooks are called {codebook.name!r}")

    def _codebook_uses(self) -> Iterator[Codebook]:
        for tensor in self.tensors.values():
            if isinstance(tensor, ClusteredWeight):
                yield from (stage.codebook for stage in tensor.stages)

    @property
    def codebooks(self) -> dict[str, Codebook]:
        """All codebooks by name, each once."""
        return {codebook.name: codebook for codebook in self._codebook_uses()}

    @property
    def clustered(self) -> dict[str, ClusteredWeight]:
        """The clustered tensors by name."""
        return {name: tensor for name, tensor in self.tensors.items() if isinstance(tensor, ClusteredWeight)}

    def payloads(self) -> Iterator[tuple[dict[str, Any], Array]]:
        """Every payload in canonical order with a JSON description of it: the order of the digest and of the packed file.

        Tensors go by name (code points); a codebook comes just before the first tensor that uses it.
        """
        emitted: set[str] = set()
        for name in sorted(self.tensors):
            tensor = self.tensors[name]
            if isinstance(tensor, DenseTensor):
                yield {"tensor": name, "part": "values"}, tensor.values
                continue
            for stage in tensor.stages:
                if stage.codebook.name not in emitted:
                    emitted.add(stage.codebook.name)
                    yield {"codebook": stage.codebook.name}, stage.codebook.values
            axis = {"tensor": name, "weight_shape": list(tensor.shape), "group_axis": tensor.group_axis}
            for stage in tensor.stages:
                yield {**axis, "part": "codes", "codebook": stage.codebook.name}, stage.codes
            for part, array in tensor.extra_arrays:
                yield {"tensor": name, "part": part}, array

    def digest(self, visit: Callable[[dict[str, Any], Array, AnyArray], None] | None = None) -> str:
        """`sha256:<hex>` over the configuration and every payload in canonical order; identical in every format.

        Reads the whole model, one payload at a time; `visit(description, array, values)` may look at each on the way. Side
        files, provenance and self-test record do not enter.
        """
        builder = DigestBuilder(self.config)
        for description, array in self.payloads():
            values = array.read()
            builder.add(description, array, values)
            if visit is not None:
                visit(description, array, values)
        return builder.digest()


class DigestBuilder:
    """Computes `Model.digest()` payload by payload, for writers that stream the payloads anyway.

    SHA-256 over `cluscomp-digest-1\\n`, the canonical JSON of the configuration and a newline, then for each of
    `Model.payloads()` the canonical JSON of its description with dtype and shape, a newline and the little-endian bytes.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._hash = hashlib.sha256(f"cluscomp-digest-1\n{canonical_json(config)}\n".encode())

    def add(self, description: Mapping[str, Any], array: Array, values: AnyArray) -> None:
        """Add one payload; `values` is what `array.read()` gave."""
        head = {**description, "dtype": array.dtype, "shape": list(array.shape)}
        self._hash.update(f"{canonical_json(head)}\n".encode())
        self._hash.update(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)

    def digest(self) -> str:
        """`sha256:` and 64 hexadecimal digits."""
        return f"sha256:{self._hash.hexdigest()}"
