"""Reads a source once before the job, to find values that are not finite; they would make a model of NaN."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cluscomp_formats.errors import InvalidFileError, Problem
from cluscomp_formats.ir import FLOAT_DTYPES, AnyArray, Array, DenseTensor, Model
from cluscomp_formats.progress import Progress, silent
from cluscomp_formats.sections.payloads import is_finite

__all__ = ["scan_dense", "scan_source"]


def scan_source(source: Model, path: Path, on_progress: Progress = silent) -> str:
    """Read the whole source once: compute its digest, and check that every value is finite.

    Raises InvalidFileError with one problem per tensor with NaN or infinity.
    """
    problems: list[Problem] = []
    total = sum(1 for _ in source.payloads())
    done = itertools.count(1)

    def check(description: Mapping[str, Any], array: Array, values: AnyArray) -> None:
        on_progress("checking the source", next(done), total)
        position = _first_not_finite(array, values)
        if position is not None:
            name = str(description.get("tensor") or description.get("codebook"))
            found, expected = f"NaN or infinity at {list(position)}", "finite values"
            remedy = "the source is damaged, or its training diverged; get a valid copy"
            problems.append(Problem("not_finite", "a value is not finite", str(path), name, found, expected, remedy))

    digest = source.digest(check)
    if problems:
        raise InvalidFileError(problems)
    return digest


def _first_not_finite(array: Array, values: AnyArray) -> tuple[int, ...] | None:
    if array.dtype not in FLOAT_DTYPES:
        return None
    finite = is_finite(values, array.dtype)
    if finite.all():
        return None
    return tuple(int(index) for index in np.unravel_index(int(np.argmin(finite)), values.shape))


def scan_dense(model: Model, path: Path, on_progress: Progress = silent) -> None:
    """Check the dense tensors of a clustered model; writers check everything else. Raises InvalidFileError."""
    dense = {name: tensor for name, tensor in model.tensors.items() if isinstance(tensor, DenseTensor)}
    scan_source(Model(model.config, dense), path, on_progress)
