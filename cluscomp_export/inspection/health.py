"""Read a model of any format once: its problems, the use of its codebooks, its digest."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cluscomp_formats.errors import InvalidFileError, Problem
from cluscomp_formats.ir import FLOAT_DTYPES, AnyArray, Array, ClusteredWeight, DigestBuilder, Model
from cluscomp_formats.progress import Progress, silent
from cluscomp_formats.sections.digest import hash_payload
from cluscomp_formats.sections.payloads import Payload, is_finite, stored_payloads

__all__ = ["CodebookHealth", "Health", "check_health", "codebook_users"]

Counts = npt.NDArray[np.intp]


@dataclass
class CodebookHealth:
    """A codebook and its use by all weights that refer to it.

    `dead` counts clusters without a code, `duplicates` centroids that equal an earlier one bit for bit. `entropy_bits` is the
    entropy of the codes in bits per code, at most the bits of a code. `largest_share` is the share of the most used cluster
    among the codes. These are None where the centroids or some of the codes are invalid. `out_of_range` counts the arrays with
    codes beyond the codebook.
    """

    dead: int | None = None
    duplicates: int | None = None
    entropy_bits: float | None = None
    largest_share: float | None = None
    out_of_range: int = 0
    not_finite: bool = False


@dataclass
class Health:
    """What one pass over a model found.

    `digest` is None if a payload could not be read. `unused_bits` has, for every clustered weight with valid codes, the bits of
    its codes beyond their entropy. `invalid` names the tensors that cannot be decoded correctly.
    """

    codebooks: dict[str, CodebookHealth]
    digest: str | None = None
    problems: list[Problem] = field(default_factory=list)
    unused_bits: dict[str, float] = field(default_factory=dict)
    invalid: set[str] = field(default_factory=set)


def check_health(model: Model, path: Path, on_progress: Progress = silent) -> Health:
    """Read every payload, one at a time. An invalid one is reported; the others are still read.

    Checks values against the rules of `docs/packed-format.md`, whether or not the reader of the format does. Also reports
    dense values that are not finite, which `convert` refuses in a source. Raises StorageError.
    """
    payloads = list(stored_payloads(model))
    health = Health({name: CodebookHealth() for name in model.codebooks})
    users = codebook_users(model)
    counter = _Counter(health, payloads)
    builder = DigestBuilder(model.config)
    all_read = True
    for done, (payload, array) in enumerate(payloads):
        on_progress("reading", done, len(payloads))
        values, problems = _read(payload, array, path)
        health.problems += problems
        if values is None:
            all_read = False
        else:
            hash_payload(builder, payload, array, values)
        valid = None if problems else values
        if payload.part == "centroids":
            book = health.codebooks[payload.owner]
            book.not_finite = any(problem.kind == "not_finite" for problem in problems)
            book.duplicates = None if valid is None else _duplicates(valid)
            health.invalid.update(weight.name for weight in users[payload.owner] if problems)
            continue
        if payload.part == "codes":
            counter.add(payload, valid, out_of_range=any(problem.kind == "code_out_of_range" for problem in problems))
        if problems and payload.description is not None:
            health.invalid.add(payload.owner)
    on_progress("reading", len(payloads), len(payloads))
    health.digest = builder.digest() if all_read else None
    if not health.problems and model.claimed_digest not in (None, health.digest):
        message, remedy = "the content does not match the digest", "copy, download or convert it again"
        problem = Problem("digest_mismatch", message, str(path), None, health.digest, model.claimed_digest, remedy)
        health.problems.append(problem)
    return health


class _Counter:
    """Counts the uses of each cluster.

    The counts of a codebook are dropped with its last array of codes: a model may have hundreds of codebooks.
    """

    def __init__(self, health: Health, payloads: list[tuple[Payload, Array]]) -> None:
        self._health = health
        self._left = Counter(_codebook(payload) for payload, _ in payloads if payload.part == "codes")
        self._counts: dict[str, Counts] = {}
        self._incomplete: set[str] = set()

    def add(self, payload: Payload, codes: AnyArray | None, *, out_of_range: bool) -> None:
        """Count an array of codes, None if it is invalid."""
        name = _codebook(payload)
        book = self._health.codebooks[name]
        book.out_of_range += out_of_range
        self._left[name] -= 1
        if codes is None:
            self._incomplete.add(name)
        else:
            counts = np.bincount(codes.reshape(-1), minlength=payload.limit or 0)
            unused = codes.size * max(0.0, (payload.code_bits or 0) - _entropy(counts))
            self._health.unused_bits[payload.owner] = self._health.unused_bits.get(payload.owner, 0.0) + unused
            self._counts[name] = self._counts[name] + counts if name in self._counts else counts
        if self._left[name]:
            return
        total = self._counts.pop(name, None)
        if total is not None and name not in self._incomplete:
            book.dead = int(np.count_nonzero(total == 0))
            book.entropy_bits = _entropy(total)
            book.largest_share = float(total.max() / total.sum())


def _codebook(payload: Payload) -> str:
    """The codebook an array of codes refers to."""
    return str((payload.description or {})["codebook"])


def codebook_users(model: Model) -> dict[str, list[ClusteredWeight]]:
    """The weights that refer to each codebook, each once."""
    users: dict[str, dict[str, ClusteredWeight]] = {name: {} for name in model.codebooks}
    for weight in model.clustered.values():
        for stage in weight.stages:
            users[stage.codebook.name][weight.name] = weight
    return {name: list(weights.values()) for name, weights in users.items()}


def _read(payload: Payload, array: Array, path: Path) -> tuple[AnyArray | None, list[Problem]]:
    """The values, None if the reader refuses them, and their problems."""
    try:
        values = array.read()
    except InvalidFileError as error:
        return None, list(error.problems)
    fault = payload.content_fault(values)
    if fault is not None:
        return values, [Problem(fault.kind, fault.message, str(path), payload.owner, fault.found, fault.expected)]
    if payload.part == "values" and payload.dtype in FLOAT_DTYPES:
        bad = values.size - int(np.count_nonzero(is_finite(values, payload.dtype)))
        if bad:
            found = f"{bad} of {values.size} values"
            message = "the tensor contains NaN or infinity"
            return values, [Problem("not_finite", message, str(path), payload.owner, found, "finite values")]
    return values, []


def _duplicates(centroids: AnyArray) -> int:
    """How many rows are equal, bit for bit, to an earlier one."""
    return len(centroids) - len({row.tobytes() for row in centroids})


def _entropy(counts: Counts) -> float:
    """Entropy in bits of a distribution given by counts; 0 without any counts."""
    used = counts[counts > 0]
    shares = used / max(used.sum(), 1)
    # Not minus 0 for a single outcome.
    return abs(float(-(shares * np.log2(shares)).sum()))
