"""The intermediate representation (IR), which every reader returns and every writer accepts.

A `Model` consists of a configuration and named tensors, each *clustered* (`ClusteredWeight`) or *dense* (`DenseTensor`). An
uncompressed source is a model whose tensors are all dense. Everything is frozen and lazy: shapes, dtypes and sizes need no IO,
and payloads are read on demand, one tensor at a time, so any reader can feed any writer.

`ClusteredWeight.decode()`, in plain numpy, defines the result of every kernel and every file format.
"""

from __future__ import annotations

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
    "QUAD",
    "TILE",
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
    "tiled_size",
]

AnyArray = npt.NDArray[Any]

MAX_CLUSTERS = 65536
"""A code fits 16 bits."""

QUAD = 4
"""Input channels that tiled codes have together; the last ones are padded."""

TILE = 16
"""Groups of a tile of tiled codes; the last tile has an even number of them."""

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
"""The numpy type of each storage type, by name. numpy has no bfloat16, so its 16 bits are stored as uint16."""

FLOAT_DTYPES = ("float64", "float32", "float16", "bfloat16")
POSITION_DTYPES = ("uint32", "uint64")
CODEBOOK_DTYPES = ("float32", "float16", "bfloat16", "int8")


def bfloat16_to_float32(bits: AnyArray) -> npt.NDArray[np.float32]:
    """Convert bfloat16 bit patterns (uint16) to float32, exactly."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def float32_to_bfloat16(values: AnyArray) -> npt.NDArray[np.uint16]:
    """Round float32 to bfloat16 bit patterns (uint16), to nearest even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


@dataclass(frozen=True)
class Array:
    """A lazy, read-only array: its shape and dtype are known, and `read()` returns its payload.

    `dtype` is a key of `DTYPES`. `tiled` is given for codes that a file stores as tiled codes: it returns these, checked, as
    uint8 `[bytes]`, a read-only view of the file (see `cluscomp_formats.tiled_codes`).
    """

    shape: tuple[int, ...]
    dtype: str
    loader: Callable[[], AnyArray] = field(repr=False, compare=False)
    tiled: Callable[[], npt.NDArray[np.uint8]] | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"unknown dtype {self.dtype!r}; known: {', '.join(DTYPES)}")
        if any(length < 0 for length in self.shape):
            raise ValueError(f"a shape must not have negative lengths, got {self.shape}")

    @classmethod
    def of(cls, values: AnyArray, dtype: str | None = None) -> Array:
        """Wrap a numpy array in memory. With `dtype="bfloat16"`, `values` are its uint16 bit patterns."""
        name = dtype or values.dtype.name
        if name not in DTYPES:
            raise ValueError(f"unknown dtype {name!r}; known: {', '.join(DTYPES)}")
        if name == "bfloat16" and values.dtype != DTYPES[name]:
            raise ValueError(f"bfloat16 must be given as uint16 bit patterns, got {values.dtype}; see float32_to_bfloat16")
        stored = np.asarray(values, dtype=DTYPES[name], order="C")
        return cls(values.shape, name, lambda: stored)

    def __reduce__(self) -> tuple[Callable[[AnyArray, str], Array], tuple[AnyArray, str]]:
        """Pickle the payload too, even that of a file, so that the other process does not need the file."""
        return Array.of, (self.read(), self.dtype)

    def __deepcopy__(self, memo: dict[int, Any]) -> Array:
        """Return the same object: payloads are never modified."""
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
        """Return the payload as a C-contiguous little-endian numpy array of `shape` and the storage type of `dtype`.

        The result may be a read-only memory map, so do not write to it. A second call may repeat the work.
        """
        values = self.loader()
        if values.shape != self.shape or values.dtype != DTYPES[self.dtype]:
            raise ValueError(f"the loader returned {values.dtype} {values.shape}, but is declared {self.dtype} {self.shape}")
        # np.ascontiguousarray would convert a scalar to a vector.
        return np.asarray(values, order="C")

    def to_float32(self) -> npt.NDArray[np.float32]:
        """Return the payload as float32. float64 is rounded, to infinity if it is out of range."""
        values = self.read()
        if self.dtype == "bfloat16":
            return bfloat16_to_float32(values)
        with np.errstate(all="ignore"):
            return values.astype(np.float32, copy=False)


def code_bits(num_clusters: int) -> int:
    """Return the bits per code of a codebook with `num_clusters` clusters: `max(1, ceil(log2 num_clusters))`."""
    return max(1, (num_clusters - 1).bit_length())


def tiled_size(in_features: int, groups: int) -> int:
    """Return the number of codes, including padding, of the tiled codes of an array `[in_features, groups]`.

    Channels are padded to a multiple of `QUAD`, the groups of the last tile to an even number. So codes of any width fill whole
    bytes.
    """
    return -(-in_features // QUAD) * QUAD * (groups + groups % 2)


@dataclass(frozen=True)
class Codebook:
    """Named centroids `[num_clusters, cluster_dim]`. Several weights may refer to one codebook.

    int8 values are integers without a scale of their own; the row scales of the weights scale them.
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
    """One codebook and one code per vector. A weight is the sum of its decoded stages.

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
    float32, with the products in that order. `shape` is `(out_features, in_features)`; `row_scale` is float
    `[out_features]`, `column_scale` float `[in_features]`. The last vectors are truncated if the axis is not a multiple of
    cluster_dim.
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
            raise ValueError(f"{self.name}: a clustered weight must be [out_features, in_features], got shape {self.shape}")
        if self.group_axis not in ("out", "in"):
            raise ValueError(f"{self.name}: group_axis must be 'out' or 'in', got {self.group_axis!r}")
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
        """Return the shape of the codes of a stage with this cluster_dim."""
        along, across = self.shape if self.group_axis == "out" else self.shape[::-1]
        return across, -(-along // cluster_dim)

    @property
    def num_weights(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def extra_arrays(self) -> tuple[tuple[str, Array], ...]:
        """Return the name and array of each optional payload that is present, in canonical order."""
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
        """Size in bits of codes, scales and outliers in a packed file, without codebooks, which may be shared.

        Codes have their packed width, and the padding of tiled codes is included.
        """
        codes = 0
        for stage in self.stages:
            size = tiled_size(*stage.codes.shape) if self.group_axis == "out" else stage.codes.size
            codes += size * stage.codebook.code_bits
        return codes + sum(8 * array.nbytes for _, array in self.extra_arrays)

    # Infinity and NaN propagate as in IEEE 754, without warnings.
    @np.errstate(all="ignore")
    def decode(self) -> npt.NDArray[np.float32]:
        """Return the weight as float32 `[out_features, in_features]`: the reference for every kernel and format.

        Raises IndexError if a code or an outlier position is out of range.
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
    """A tensor of any shape and dtype that is not clustered: norms, biases, often embeddings."""

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
        """Return the values as float32."""
        return self.values.to_float32()


Tensor = ClusteredWeight | DenseTensor


@dataclass(frozen=True)
class Model:
    """A model: configuration, tensors by Hugging Face name, side files, provenance and self-test record.

    `config` is the content of a Hugging Face `config.json`. `files` has the tokenizer and other side files by name, as uint8
    `[bytes]`. `provenance` and `self_test` are JSON values; see `docs/packed-format.md`. `claimed_digest` is the digest
    recorded in the file that the model was read from.
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
        """Return all codebooks by name, each once."""
        return {codebook.name: codebook for codebook in self._codebook_uses()}

    @property
    def clustered(self) -> dict[str, ClusteredWeight]:
        """Return the clustered tensors by name."""
        return {name: tensor for name, tensor in self.tensors.items() if isinstance(tensor, ClusteredWeight)}

    def payloads(self) -> Iterator[tuple[dict[str, Any], Array]]:
        """Yield every payload with its JSON description, in canonical order, which is that of the digest and of packed files.

        Tensors are sorted by name (by code points); a codebook comes just before the first tensor that uses it.
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
        """Return `sha256:<hex>` over the configuration and every payload in canonical order; it is the same in every format.

        Reads the whole model, one payload at a time, and calls `visit(description, array, values)` for each. Side files,
        provenance and self-test record are not included.
        """
        builder = DigestBuilder(self.config)
        for description, array in self.payloads():
            values = array.read()
            builder.add(description, array, values)
            if visit is not None:
                visit(description, array, values)
        return builder.digest()


class DigestBuilder:
    """Computes `Model.digest()` payload by payload, for writers that stream the payloads.

    The digest is SHA-256 over `cluscomp-digest-1\\n`, the canonical JSON of the configuration and a newline, then for each of
    `Model.payloads()` the canonical JSON of its description with dtype and shape, a newline and the little-endian bytes.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        # Imported here: it loads OpenSSL, and a model is loaded without it.
        import hashlib

        self._hash = hashlib.sha256(f"cluscomp-digest-1\n{canonical_json(config)}\n".encode())

    def add(self, description: Mapping[str, Any], array: Array, values: AnyArray) -> None:
        """Add one payload; `values` are the result of `array.read()`."""
        head = {**description, "dtype": array.dtype, "shape": list(array.shape)}
        self._hash.update(f"{canonical_json(head)}\n".encode())
        self._hash.update(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)

    def digest(self) -> str:
        """Return `sha256:` and 64 hexadecimal digits."""
        return f"sha256:{self._hash.hexdigest()}"
