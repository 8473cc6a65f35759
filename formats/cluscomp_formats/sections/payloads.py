"""The payloads of a model as the packed format stores them: their order, stored size, and rules for their values.

Reader and writer use the same list, so that neither accepts what the other rejects.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from cluscomp_formats.ir import DTYPES, AnyArray, Array, Model
from cluscomp_formats.sections.bits import LargestCode, largest_code, packed_bytes, unpack_bits
from cluscomp_formats.sections.tiles import largest_padding, tiled_bytes, untile_codes

__all__ = ["CodeOrder", "ContentFault", "Payload", "is_finite", "stored_payloads"]


CodeOrder = Literal["rows", "tiles", "planes"]


@dataclass(frozen=True)
class ContentFault:
    """A violation of the format's rules for values; the fields are those of a `Problem`."""

    kind: str
    message: str
    found: str
    expected: str


@dataclass(frozen=True)
class Payload:
    """The content of one section, without its values.

    `owner` is the name of the tensor, codebook or side file; `part` is the name of its array (`values`, `codes`, `row_scale`,
    `column_scale`, `outlier_positions`, `outlier_values`, `centroids` or `bytes`). `description` is that of
    `Model.payloads()`, None for a side file. `code_bits` is the stored width of codes, None for other parts. All values must be
    below `limit`: the number of clusters for codes, the number of weights for outlier positions. `order` is the order of stored
    codes: row-major (`rows`), tiled (`tiles`, see `sections.tiles`), or the low bytes of all codes of 16 bits followed by the
    high bytes (`planes`).
    """

    owner: str
    part: str
    dtype: str
    shape: tuple[int, ...]
    description: Mapping[str, Any] | None = None
    code_bits: int | None = None
    limit: int | None = None
    order: CodeOrder = "rows"

    @property
    def stored_bytes(self) -> int:
        """Length of the section in bytes."""
        size = math.prod(self.shape)
        if self.code_bits is None:
            return size * DTYPES[self.dtype].itemsize
        if self.order == "tiles":
            return tiled_bytes(self.shape[0], self.shape[1], self.code_bits)
        return packed_bytes(size, self.code_bits)

    def unpack(self, stored: npt.NDArray[np.uint8]) -> AnyArray:
        """Return the values in `stored [stored_bytes]`: a view, except for most codes."""
        if self.code_bits is None:
            return stored.view(DTYPES[self.dtype]).reshape(self.shape)
        if self.order == "tiles":
            return untile_codes(stored, self.shape[0], self.shape[1], self.code_bits)
        if self.order == "planes":
            return np.ascontiguousarray(stored.reshape(2, -1).T).view(DTYPES[self.dtype]).reshape(self.shape)
        return unpack_bits(stored, math.prod(self.shape), self.code_bits).reshape(self.shape)

    def padding_fault(self, stored: npt.NDArray[np.uint8]) -> ContentFault | None:
        """Return a fault if codes have padding that is not zero: codes, or the unused bits of the last byte."""
        if self.code_bits is not None and self.order == "tiles":
            largest = largest_padding(stored, self.shape[0], self.shape[1], self.code_bits)
            return ContentFault("bad_padding", "the padding of codes is not zero", str(largest), "0") if largest else None
        used = math.prod(self.shape) * (self.code_bits or 0) % 8
        if used and stored[-1] >> used:
            message = "the unused bits of the last byte of codes are not zero"
            return ContentFault("bad_padding", message, f"{stored[-1]:08b}", f"{8 - used} leading zeros")
        return None

    def stored_fault(self, stored: npt.NDArray[np.uint8], largest: LargestCode = largest_code) -> ContentFault | None:
        """Return the fault that `content_fault` finds in the values in `stored [stored_bytes]`, without unpacking codes."""
        if self.code_bits is None or self.order == "planes" or self.limit is None:
            return self.content_fault(self.unpack(stored))
        if self.limit == 1 << self.code_bits or not stored.size:
            return None
        count = 8 * stored.size // self.code_bits if self.order == "tiles" else math.prod(self.shape)
        return self._limit_fault(largest(stored, count, self.code_bits))

    def content_fault(self, values: AnyArray) -> ContentFault | None:
        """Return a fault if `values`, the array as read, violate a rule."""
        if values.size == 0:
            return None
        if self.part in ("codes", "outlier_positions"):
            return self._range_fault(values)
        if self.part in ("centroids", "row_scale", "column_scale", "outlier_values"):
            bad = values.size - int(np.count_nonzero(is_finite(values, self.dtype)))
            if bad:
                found = f"{bad} of {values.size} values"
                return ContentFault("not_finite", f"{self.part} has NaN or infinity", found, "finite values")
        if self.dtype == "bool":
            largest = int(values.view(np.uint8).max())
            if largest > 1:
                return ContentFault("bad_bool", f"{self.part} has a bool that is neither 0 nor 1", str(largest), "0 or 1")
        return None

    def _range_fault(self, values: AnyArray) -> ContentFault | None:
        fault = self._limit_fault(int(values.max()))
        if fault is not None:
            return fault
        if self.part == "outlier_positions" and not bool(np.all(values[1:] > values[:-1])):
            first = int(np.argmax(values[1:] <= values[:-1]))
            found = f"{values[first]}, then {values[first + 1]}"
            return ContentFault("outliers_unsorted", "outlier_positions are not strictly increasing", found, "increasing")
        return None

    def _limit_fault(self, largest: int) -> ContentFault | None:
        limit = self.limit or 0
        if largest < limit:
            return None
        kind = "code_out_of_range" if self.part == "codes" else "outlier_out_of_range"
        return ContentFault(kind, f"{self.part} are out of range", str(largest), f"at most {limit - 1}")


def stored_payloads(model: Model) -> Iterator[tuple[Payload, Array]]:
    """Yield every payload of `model` in file order: `Model.payloads()`, then the side files by name."""
    codebooks = model.codebooks
    for description, array in model.payloads():
        if "part" not in description:
            yield Payload(description["codebook"], "centroids", array.dtype, array.shape, description), array
            continue
        payload = Payload(description["tensor"], description["part"], array.dtype, array.shape, description)
        if payload.part == "codes":
            codebook = codebooks[description["codebook"]]
            order: CodeOrder = "tiles" if description["group_axis"] == "out" else "rows"
            payload = replace(payload, code_bits=codebook.code_bits, limit=codebook.num_clusters, order=order)
        elif payload.part == "outlier_positions":
            payload = replace(payload, limit=model.tensors[payload.owner].num_weights)
        yield payload, array
    for name in sorted(model.files):
        array = model.files[name]
        yield Payload(name, "bytes", array.dtype, array.shape), array


def is_finite(values: AnyArray, dtype: str) -> AnyArray:
    """Return which values of a float array are finite, as bool of the same shape; `dtype` is a key of `DTYPES`."""
    if dtype == "bfloat16":
        return np.asarray((values & np.uint16(0x7F80)) != 0x7F80)
    return np.asarray(np.isfinite(values))
