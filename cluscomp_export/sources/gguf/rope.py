"""Rotary embedding of a GGUF file as the `rope_theta` and `rope_scaling` of a Hugging Face configuration.

Llama 3.1 and later scale each frequency separately. The converter stores the divisors of the frequencies as the tensor
`rope_freqs.weight` `[head_dim / 2]`; Hugging Face needs the parameters of the formula. They are found by trying the values in
use and computing the divisors again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from cluscomp_formats.errors import InvalidFileError, Problem, UnsupportedError
from cluscomp_formats.gguf.rope import llama3_divisors

__all__ = ["is_positive_float32", "rope_config", "shortest_float"]

_DEFAULT_THETA = 10000.0
_ORIGINAL_CONTEXTS = tuple(1 << power for power in range(10, 20))
_LOW_FREQ_FACTOR, _HIGH_FREQ_FACTOR = 1.0, 4.0


_SMALLEST, _LARGEST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)


def is_positive_float32(value: float) -> bool:
    """Whether a number, which may be stored as float64, is a positive normal float32."""
    return _SMALLEST <= value <= _LARGEST


def shortest_float(value: float) -> float:
    """The shortest decimal that rounds to the same float32: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def rope_config(
    file: str, arch: str, metadata: Mapping[str, Any], head_dim: int, divisors: npt.NDArray[np.float32] | None
) -> dict[str, Any]:
    """`rope_theta` and, if the file has a scaling, `rope_scaling`. `divisors` is the content of `rope_freqs.weight`, if any.

    Raises UnsupportedError if the scaling cannot be expressed.
    """
    theta = _positive(file, metadata, f"{arch}.rope.freq_base", _DEFAULT_THETA)
    scaling = _declared_scaling(file, arch, metadata)
    if divisors is not None and not np.all(divisors == 1.0):
        if scaling is not None:
            found = f"{scaling['rope_type']} and rope_freqs.weight"
            raise UnsupportedError(Problem("rope_scaling", "the file has two rotary scalings", file, found=found))
        scaling = _llama3_scaling(file, theta, head_dim, divisors)
    return {"rope_theta": theta} if scaling is None else {"rope_theta": theta, "rope_scaling": scaling}


def _positive(file: str, metadata: Mapping[str, Any], key: str, default: float) -> float:
    """A positive finite number of the metadata. Raises InvalidFileError for anything else."""
    value = metadata.get(key, default)
    if isinstance(value, float) and is_positive_float32(value):
        return shortest_float(value)
    raise InvalidFileError(
        Problem("bad_key", f"the metadata key {key} is not a positive number", file, found=ascii(value)[:80])
    )


def _declared_scaling(file: str, arch: str, metadata: Mapping[str, Any]) -> dict[str, Any] | None:
    prefix = f"{arch}.rope.scaling."
    # The key of files older than `rope.scaling`; a factor of 1 means none.
    legacy = _positive(file, metadata, f"{arch}.rope.scale_linear", 1.0)
    rope_type = metadata.get(f"{prefix}type", "linear")
    if rope_type == "none":
        return None
    factor = _positive(file, metadata, f"{prefix}factor", legacy)
    attention = _positive(file, metadata, f"{prefix}attn_factor", 1.0)
    if rope_type == "linear" and attention == 1.0:
        return None if factor == 1.0 else {"rope_type": "linear", "factor": factor}
    context = metadata.get(f"{prefix}original_context_length")
    if rope_type == "yarn" and attention == 1.0 and type(context) is int and context > 0:
        return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": context}
    found = f"{rope_type!a}, attention factor {attention}, original context {context}"
    expected = "none, linear, or yarn with its original context length"
    raise UnsupportedError(Problem("rope_scaling", "this rotary scaling is not supported", file, None, found, expected))


def _llama3_scaling(file: str, theta: float, head_dim: int, divisors: npt.NDArray[np.float32]) -> dict[str, Any]:
    # Long wavelengths are divided by the factor itself, up to float32 rounding.
    factor = float(f"{divisors.max():.4g}")
    usable = divisors.shape == (head_dim // 2,) and is_positive_float32(factor)
    for context in _ORIGINAL_CONTEXTS if usable else ():
        parameters = {"factor": factor, "low": _LOW_FREQ_FACTOR, "high": _HIGH_FREQ_FACTOR}
        expected = llama3_divisors(theta, head_dim, **parameters, original_context=context)
        if np.allclose(divisors, expected, rtol=1e-4, atol=0.0):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": _LOW_FREQ_FACTOR,
                "high_freq_factor": _HIGH_FREQ_FACTOR,
                "original_max_position_embeddings": context,
            }
    message = "the rotary divisors do not follow Llama 3.1's formula with its usual parameters"
    remedy = "use the Hugging Face checkpoint of this model"
    found = f"{list(divisors.shape)}, from {divisors.min():g} to {divisors.max():g}"
    raise UnsupportedError(Problem("rope_scaling", message, file, "rope_freqs.weight", found, None, remedy))
