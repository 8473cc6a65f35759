"""A delta in memory: the changed parameters (`parameters.py`) with their new values.

Applying a delta replaces values and computes nothing, so the result is bit-identical on every machine and in every format.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from cluscomp_formats.errors import InvalidFileError, InvalidRequestError, Problem
from cluscomp_formats.ir import DTYPES, AnyArray, Array, Model, float32_to_bfloat16
from cluscomp_formats.parameters import parameters, with_parameters
from cluscomp_formats.sections.payloads import is_finite

__all__ = ["Delta", "changes", "combine"]


@dataclass(frozen=True)
class Delta:
    """Parameters with new values.

    `base` is the digest of the model that the delta applies to, `result` the digest of the model after that. `arrays` has the
    new values by parameter name. `record` is a JSON object that describes the training; `file` is the path of the delta's file.
    """

    base: str
    result: str
    arrays: Mapping[str, Array]
    record: Mapping[str, Any]
    file: str | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all values."""
        return sum(array.nbytes for array in self.arrays.values())

    def apply(self, model: Model, digest: str | None = None) -> Model:
        """Return the model with these values.

        `digest` is that of `model`, if known. The default is the one recorded in its file; if there is none, it is computed,
        which reads the whole model. Raises InvalidFileError if the delta belongs to another model or does not fit this one.
        """
        found = digest or model.claimed_digest or model.digest()
        if found != self.base:
            message, remedy = "the delta belongs to another model", "apply it to the model it was trained on, in any format"
            raise InvalidFileError(Problem("other_base", message, self.file, None, found, self.base, remedy))
        known = parameters(model)
        problems = [problem for name, array in self.arrays.items() for problem in self._misfits(name, array, known.get(name))]
        if problems:
            raise InvalidFileError(problems)
        return replace(with_parameters(model, self.arrays), claimed_digest=self.result)

    def _misfits(self, name: str, array: Array, base: Array | None) -> list[Problem]:
        if base is None:
            message = "the model has no such codebook, row scale or norm"
            return [Problem("unknown_parameter", message, self.file, name)]
        if (array.dtype, array.shape) == (base.dtype, base.shape):
            return []
        found, expected = (f"{values.dtype} {list(values.shape)}" for values in (array, base))
        return [Problem("wrong_form", "the model has another dtype or shape", self.file, name, found, expected)]


def changes(base: Model, changed: Model) -> dict[str, Array]:
    """Return the parameters of `changed` that differ in any bit from those of `base`, in memory."""
    old = parameters(base)
    arrays = {}
    for name, array in parameters(changed).items():
        values = array.read()
        if values.tobytes() != old[name].read().tobytes():
            arrays[name] = Array.of(values.copy(), array.dtype)
    return arrays


def combine(model: Model, deltas: Sequence[Delta], weights: Sequence[float], digest: str) -> Model:
    """Return `model` plus a weighted sum of several deltas (task arithmetic, arXiv 2212.04089).

    `base + sum_i weight_i * (new_i - base)` is computed in float64, in the given order, and rounded to the nearest value of the
    stored dtype (for bfloat16, via float32). A single delta of weight 1 is applied unchanged. `digest` is that of `model`.

    Raises InvalidFileError as `Delta.apply`; InvalidRequestError unless there is one finite weight per delta and the result is
    in the range of the stored dtype.
    """
    if len(weights) != len(deltas) or not deltas or not all(np.isfinite(weights)):
        found, expected = f"{len(weights)} for {len(deltas)} deltas", "one finite number for each delta"
        raise InvalidRequestError(Problem("bad_option", "the weights do not match the deltas", found=found, expected=expected))
    applied = [delta.apply(model, digest) for delta in deltas]
    if tuple(weights) == (1,):
        return applied[0]
    base = parameters(model)
    arrays = {}
    for name in sorted(set().union(*(delta.arrays for delta in deltas))):
        old = _to_float64(base[name])
        total = old.copy()
        for delta, weight in zip(deltas, weights, strict=True):
            if name in delta.arrays:
                total += weight * (_to_float64(delta.arrays[name]) - old)
        arrays[name] = Array.of(_rounded(total, base[name].dtype, name), base[name].dtype)
    return with_parameters(model, arrays)


def _to_float64(array: Array) -> npt.NDArray[np.float64]:
    return (array.to_float32() if array.dtype == "bfloat16" else array.read()).astype(np.float64)


def _rounded(values: npt.NDArray[np.float64], dtype: str, name: str) -> AnyArray:
    stored = DTYPES[dtype]
    with np.errstate(all="ignore"):
        if dtype == "bfloat16":
            rounded: AnyArray = float32_to_bfloat16(values.astype(np.float32))
        else:
            rounded = (np.rint(values) if stored.kind == "i" else values).astype(stored)
        in_range = np.rint(values) == rounded if stored.kind == "i" else is_finite(rounded, dtype)
    if not in_range.all():
        message, remedy = f"the weighted sum exceeds the range of {dtype}", "use smaller weights"
        raise InvalidRequestError(Problem("out_of_range", message, None, name, remedy=remedy))
    return rounded
