"""Are the options of a conversion valid, alone and together? Checked before anything else."""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

from cluscomp_export.compression.fit_encode import Method
from cluscomp_export.compression.workers.base import parse_workers
from cluscomp_export.conversion.effort import phases_of
from cluscomp_export.conversion.options import ConversionOptions, Effort, Optimize
from cluscomp_export.planning import CODEBOOK_DTYPES, Share
from cluscomp_export.planning.machines import shipped_machine
from cluscomp_export.planning.this_machine import THIS_MACHINE
from cluscomp_export.threads import check_threads
from cluscomp_formats.errors import InvalidRequestError, Problem
from cluscomp_formats.format import Format

__all__ = ["check_options"]

Sensitivity = Literal["measured", "equal"]


def check_options(options: ConversionOptions, fmt: Format) -> None:
    """Raises InvalidRequestError for options that contradict each other, and for invalid values."""
    problem = _no_choice(options) or _contradiction(options, fmt) or _out_of_range(options)
    if problem:
        raise InvalidRequestError(problem)
    phases_of(options)
    if options.machine not in (None, THIS_MACHINE):
        shipped_machine(options.machine)
    check_threads(options.threads)
    if options.workers is not None:
        parse_workers(options.workers)


def _no_choice(options: ConversionOptions) -> Problem | None:
    """Values that are not among the choices."""
    choices: dict[str, tuple[Any, object]] = {
        "effort": (options.effort, Effort),
        "share": (options.share, Share),
        "sensitivity": (options.sensitivity, Sensitivity),
        "optimize": (options.optimize, Optimize),
        "method": (options.method, Method),
    }
    for option, (value, kind) in choices.items():
        known = get_args(kind)
        if value is not None and value not in known:
            expected = ", ".join(known)
            return Problem("bad_option", f"`{option}` has no such choice", found=repr(value)[:200], expected=expected)
    return None


def _contradiction(options: ConversionOptions, fmt: Format) -> Problem | None:
    """Options that do not go together."""
    targets = [f"`{option}`" for option, value in options.targets().items() if value is not None]
    target = targets[0] if targets else "`bits`"
    if len(targets) > 1:
        message = f"{' and '.join(targets)} exclude each other"
        return Problem("bad_option", message, found=", ".join(targets), remedy="give one of them")
    if (options.dim is None) != (options.clusters is None):
        return Problem("bad_option", "`dim` and `clusters` go together", remedy="give both, or `bits`")
    if target not in ("`bits`", "`dim`") and options.embedding_bits is not None:
        message = f"{target} determines the embedding, too"
        remedy = "leave out `embedding_bits`, or give `bits`"
        return Problem("bad_option", message, found=f"{target} and `embedding_bits`", remedy=remedy)
    if options.plan is not None:
        determined = {"`share`": options.share, "`codebook_bits`": options.codebook_bits, "`optimize`": options.optimize}
        for option, value in determined.items():
            if value is not None:
                message, remedy = f"`plan` determines {option} already", f"leave out {option}, or edit the plan"
                return Problem("bad_option", message, found=f"`plan` and {option}", remedy=remedy)
    if options.sensitivity is not None and not options.allocates:
        remedy = "leave out `sensitivity`, or give `bits`, `budget` or `match_loss`"
        return Problem("bad_option", "there is nothing to allocate", found=f"{target} and `sensitivity`", remedy=remedy)
    if options.match_loss is not None and options.sensitivity == "equal":
        message, remedy = "`match_loss` needs measured sensitivities", "leave out `sensitivity`"
        return Problem("bad_option", message, found="`sensitivity='equal'`", remedy=remedy)
    if options.calibration == "none" and options.measures:
        message, remedy = "sensitivities are measured on a text", "give a text"
        return Problem("bad_option", message, found="`calibration='none'`", remedy=remedy)
    if options.budget_bytes is not None and (fmt.size is None or options.gguf_type is not None):
        message = "the size in this format does not follow from codebooks, or cannot be predicted"
        remedy = "give `bits` instead, or convert to packed, hf, gguf or onnx"
        return Problem("bad_option", message, found=f"`budget` and `to={options.to!r}`", remedy=remedy)
    if options.calibration == "none" and phases_of(options).needs_text:
        remedy = "give a text, or `effort='fast'` without options of other phases"
        return Problem("bad_option", "this effort needs a calibration text", found="`calibration='none'`", remedy=remedy)
    return None


def _out_of_range(options: ConversionOptions) -> Problem | None:
    for option, bits in (("`bits`", options.bits), ("`embedding_bits`", options.embedding_bits)):
        if bits is not None and not 0 < bits <= 16:
            return Problem("bad_option", f"{option} is out of range", found=f"{bits:g}", expected="more than 0, at most 16")
    if options.match_loss is not None and not 0 < options.match_loss < math.inf:
        found = f"{options.match_loss:g}"
        return Problem("bad_option", "`match_loss` is out of range", found=found, expected="a positive number")
    if options.codebook_bits not in (None, *CODEBOOK_DTYPES):
        found, expected = str(options.codebook_bits), " or ".join(map(str, CODEBOOK_DTYPES))
        return Problem("bad_option", "`codebook_bits` is out of range", found=found, expected=expected)
    return None
