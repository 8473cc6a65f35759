"""Can an artefact have been made from a source? Decided by its content alone, not by its provenance or its record.

Structure and configuration must be those of the source, dense tensors its bytes, and every clustered weight closer to its
original than chance. For a weight `w` and its decoded codes `q`, both with their means subtracted, the squared correlation

    kept = <w, q>^2 / (<w, w> <q, q>)

is the share of the variance of `w` that the best multiple of `q` explains. Codes of `b` bits per weight can keep
`1 - 2^(-2 b)` of a Gaussian (its distortion-rate function). K-means keeps more than half of that at any width. Error feedback
with few bits moves the weights of small models far from the original; the least seen was a seventh, at 1 bit. `LEAST_KEPT` is
the share of it that is required. Weights unrelated to the source (permuted codes, swapped matrices) keep at most one over the
number `m` of their vectors; zeros and constants keep nothing. An artefact between the two bounds is called degraded. `kept`
ignores scale, which the relative error bounds: it is the square root of 2 for an unrelated matrix of equal magnitude.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cluscomp_export.planning.planned_model import dense_as_stored
from cluscomp_formats.ir import Array, ClusteredWeight, DenseTensor, Model
from cluscomp_formats.parameters import norm_name, parameters
from cluscomp_formats.progress import Progress

__all__ = ["Objections", "TensorError", "compare_tensors", "compare_with_source", "is_trained"]

LEAST_KEPT = 1 / 16
CHANCE = 16.0
"""In units of `1 / m`: four standard deviations of the correlation of unrelated vectors."""
MOST_RELATIVE = math.sqrt(2)
MOST_TRAINED = 0.5
"""Largest relative change of a norm by training. Recovery changes norms by hundredths, a long finetuning by a fifth."""

FREE_SETTINGS = ("dtype", "quantization_config", "torch_dtype", "transformers_version")
"""Members of a configuration that describe how weights are stored, not what is computed."""

_TIED_HEAD = "lm_head.weight"


@dataclass(frozen=True)
class TensorError:
    """How far one tensor of B is from A: `relative` is the root mean square of the difference over that of A.

    `kept` is the squared correlation of the two, with their means subtracted; None if one of them is constant.
    """

    name: str
    relative: float
    max_absolute: float
    kept: float | None = None


def compare_tensors(model_a: Model, model_b: Model, on_progress: Progress) -> tuple[list[TensorError], list[str]]:
    """Errors of the tensors that both have, and in words: tensors that only one has, and shapes that differ."""
    structure = []
    for label, one, other in (("first", model_a, model_b), ("second", model_b, model_a)):
        missing = sorted(set(one.tensors) - set(other.tensors))
        if missing:
            structure.append(
                f"only the {label} has {len(missing)} tensor(s): {', '.join(missing[:3])}{' ...' if missing[3:] else ''}"
            )
    errors = []
    names = sorted(set(model_a.tensors) & set(model_b.tensors))
    for done, name in enumerate(names):
        on_progress("comparing tensors", done, len(names))
        tensor_a, tensor_b = model_a.tensors[name], model_b.tensors[name]
        if tensor_a.shape != tensor_b.shape:
            structure.append(f"{name} has shape {list(tensor_a.shape)} in the first, {list(tensor_b.shape)} in the second")
            continue
        errors.append(_tensor_error(name, tensor_a.decode(), tensor_b.decode()))
    on_progress("comparing tensors", len(names), len(names))
    return errors, structure


# Values that are not finite give NaN, which fails every comparison with a bound.
@np.errstate(all="ignore")
def _tensor_error(name: str, values: npt.NDArray[np.float32], others: npt.NDArray[np.float32]) -> TensorError:
    kept = _kept(values, others)
    difference = others - values
    energy = float(np.square(values, dtype=np.float64).sum())
    error = float(np.square(difference, dtype=np.float64).sum())
    relative = math.sqrt(error / energy) if energy else (0.0 if error == 0 else math.inf)
    return TensorError(name, relative, float(np.abs(difference).max(initial=0.0)), kept)


def _kept(values: npt.NDArray[np.float32], others: npt.NDArray[np.float32]) -> float | None:
    """The squared correlation, from sums of products corrected for the means, so that no copy is made."""
    if values.size < 2:
        return None
    count, first, second = values.size, values.reshape(-1), others.reshape(-1)
    mean_a, mean_b = float(first.mean(dtype=np.float64)), float(second.mean(dtype=np.float64))
    together = _product(first, second) - count * mean_a * mean_b
    energy_a, energy_b = (_product(x, x) - count * mean**2 for x, mean in ((first, mean_a), (second, mean_b)))
    # For constants, the rest is rounding.
    least = count * np.finfo(np.float32).eps
    if energy_a <= least * mean_a**2 or energy_b <= least * mean_b**2:
        return None
    return together**2 / (energy_a * energy_b)


_PIECE = 1 << 16


def _product(x: npt.NDArray[np.float32], y: npt.NDArray[np.float32]) -> float:
    """The sum of the products in float64, computed in pieces."""
    pieces = range(0, x.size, _PIECE)
    return sum(float(np.dot(x[at : at + _PIECE].astype(np.float64), y[at : at + _PIECE].astype(np.float64))) for at in pieces)


def is_trained(provenance: Mapping[str, Any]) -> bool:
    """Whether a provenance says that norms were trained: block by block, end to end, or by a merged delta."""
    options = provenance.get("options")
    levels = options.keys() & {"blockwise", "recovery"} if isinstance(options, Mapping) else ()
    return bool(levels or provenance.get("merges"))


@dataclass(frozen=True)
class Objections:
    """Reasons, in words: why an artefact cannot have been made from a source, and why too little of the source is left."""

    against: tuple[str, ...]
    degraded: tuple[str, ...]


def compare_with_source(source: Model, artefact: Model, errors: Sequence[TensorError], *, trained: bool) -> Objections:
    """Compare an artefact, except for its outputs, with the dense source it claims to be made from.

    `errors` are those of `compare_tensors(source, artefact)`; `trained` says that norms may have changed a little.
    """
    against = [*_structure(source, artefact), *_configuration(source.config, artefact.config)]
    degraded: list[str] = []
    by_name = {error.name: error for error in errors}
    norms = parameters(artefact) if trained else {}
    for name, tensor in artefact.tensors.items():
        original, error = source.tensors.get(name), by_name.get(name)
        if error is None or not isinstance(original, DenseTensor):
            continue
        if isinstance(tensor, ClusteredWeight):
            against += _unrelated(tensor, original, error)
            degraded += _little_kept(tensor, error)
        elif norm_name(name) in norms and tensor.values.dtype == original.values.dtype:
            if not error.relative <= MOST_TRAINED:
                against.append(f"{name}: training does not change a norm by {error.relative:.3g} of its size")
        elif not _same(dense_as_stored(original).values, tensor.values):
            against.append(f"{name}: differs from the source's values by {error.relative:.3g} relative")
    return Objections(tuple(against), tuple(degraded))


def _structure(source: Model, artefact: Model) -> list[str]:
    """Differences in names and shapes of tensors. A head that is tied to the embedding may be missing."""
    optional = {_TIED_HEAD} if source.config.get("tie_word_embeddings") else set()
    missing = sorted(source.tensors.keys() - artefact.tensors.keys() - optional)
    added = sorted(artefact.tensors.keys() - source.tensors.keys())
    reasons = []
    for names, what in ((missing, "tensors of the source are missing"), (added, "tensors are not in the source")):
        if names:
            reasons.append(f"{len(names)} {what}: {', '.join(names[:3])}{' ...' if names[3:] else ''}")
    for name in sorted(source.tensors.keys() & artefact.tensors.keys()):
        expected, found = source.tensors[name].shape, artefact.tensors[name].shape
        if expected != found:
            reasons.append(f"{name}: shape {list(found)}, in the source {list(expected)}")
    return reasons


def _configuration(expected: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    names = sorted((expected.keys() | found.keys()) - set(FREE_SETTINGS))
    changed = [name for name in names if name not in expected or name not in found or expected[name] != found[name]]
    return [
        f"the configuration has another {name}: {_shown(found, name)}, in the source {_shown(expected, name)}"
        for name in changed
    ]


def _shown(config: Mapping[str, Any], name: str) -> str:
    return repr(config[name])[:100] if name in config else "nothing"


def _unrelated(tensor: ClusteredWeight, original: DenseTensor, error: TensorError) -> list[str]:
    if not error.relative < MOST_RELATIVE:
        return [f"{tensor.name}: as far from the source as an unrelated matrix (relative error {error.relative:.3g})"]
    if error.kept is None:
        values = original.values.to_float32()
        if error.max_absolute == 0 or np.all(values == values.reshape(-1)[0]):
            # There is no correlation with a constant.
            return []
        return [f"{tensor.name}: all weights are the same"]
    chance = CHANCE / max(stage.codes.size for stage in tensor.stages)
    if not error.kept >= min(chance, _least_kept(tensor)):
        what = f"it explains {error.kept:.2g} of the source's variance, chance up to {chance:.2g}"
        return [f"{tensor.name}: no closer to the source than chance ({what})"]
    return []


def _little_kept(tensor: ClusteredWeight, error: TensorError) -> list[str]:
    least = _least_kept(tensor)
    if error.kept is None or error.kept >= least:
        return []
    return [f"{tensor.name}: explains {error.kept:.2g} of the source's variance, at least {least:.2g} is required"]


def _least_kept(tensor: ClusteredWeight) -> float:
    bits = sum(math.log2(stage.codebook.num_clusters) / stage.codebook.cluster_dim for stage in tensor.stages)
    return LEAST_KEPT * (1 - 2 ** (-2 * bits))


def _same(expected: Array, found: Array) -> bool:
    if (expected.dtype, expected.shape) != (found.dtype, found.shape):
        return False
    return expected.read().tobytes() == found.read().tobytes()
