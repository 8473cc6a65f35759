"""Payloads as named arrays: their names, dtypes and shapes in safetensors files and ONNX graphs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

from cluscomp_formats.ir import Array, Model
from cluscomp_formats.sections.payloads import Payload, stored_payloads

__all__ = ["StoredArray", "codebook_key", "codes_spec", "part_key", "stored_arrays"]


@dataclass(frozen=True)
class StoredArray:
    """One stored array: its name, stored dtype (a key of `DTYPES`) and shape, and its payload, with codes row-major."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    payload: Payload
    array: Array


def codebook_key(name: str) -> str:
    """Return the array name of a codebook's centroids."""
    return f"codebooks.{name}"


def part_key(tensor: str, part: str, stage: int = 0) -> str:
    """Return the array name of a part (`codes`, `row_scale`, ...) of the clustered weight `tensor`.

    By convention it has the module's name: `<module>.codes` for `<module>.weight`. Codes of further stages are numbered from 1:
    `<module>.codes_1`.
    """
    module = tensor.removesuffix(".weight") or tensor
    return f"{module}.{part}_{stage}" if stage else f"{module}.{part}"


def codes_spec(payload: Payload) -> tuple[str, tuple[int, ...]]:
    """Return the stored dtype and shape of codes: unchanged at 16 bits, else a bit stream."""
    return ("uint16", payload.shape) if payload.code_bits == 16 else ("uint8", (payload.stored_bytes,))


def stored_arrays(model: Model) -> Iterator[StoredArray]:
    """Yield every payload of the model in canonical order, except side files."""
    stages: Counter[str] = Counter()
    for described, array in stored_payloads(model):
        payload = replace(described, order="rows")
        if payload.description is None:
            continue
        key, dtype, shape = payload.owner, payload.dtype, payload.shape
        if payload.part == "centroids":
            key = codebook_key(payload.owner)
        elif payload.part == "codes":
            key = part_key(payload.owner, "codes", stages[payload.owner])
            stages[payload.owner] += 1
            dtype, shape = codes_spec(payload)
        elif payload.part != "values":
            key = part_key(payload.owner, payload.part)
        yield StoredArray(key, dtype, shape, payload, array)
