"""The phases of a compression and their settings: what `effort` means, and what single options change of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

from cluscomp_export.conversion.options import ConversionOptions
from cluscomp_export.ranges import MOST, MOST_RATE, MOST_SEED, check_range
from cluscomp_export.training.blockwise import BlockwiseOptions
from cluscomp_export.training.loop import fast_precision
from cluscomp_export.training.recovery import RecoveryOptions

__all__ = ["FAST", "Phases", "phases_of"]

WINDOWS = 64
"""Windows of the calibration text for error feedback and block-wise tuning; four times as many with `best`."""

_LEAST_SHARE = 2.0**-10
"""Of the windows that are trained on: a larger share held out would leave none."""

_Options = TypeVar("_Options", BlockwiseOptions, RecoveryOptions)


@dataclass(frozen=True)
class Phases:
    """Error feedback or nearest centroids, then block-wise tuning, then recovery; None leaves a phase out.

    `windows` of the calibration text are used by all phases except recovery.
    """

    feedback: bool
    blockwise: BlockwiseOptions | None
    recovery: RecoveryOptions | None
    windows: int = WINDOWS

    @property
    def block_by_block(self) -> bool:
        """Whether blocks are compressed in order, on the activations of the model as compressed so far."""
        return self.feedback or self.blockwise is not None

    @property
    def needs_text(self) -> bool:
        """Whether there must be a calibration text."""
        return self.block_by_block or self.recovery is not None

    def seen(self, token_ids: Sequence[int]) -> Sequence[int]:
        """The part of a text that is measured and fitted on: recovery judges itself by the rest."""
        held_out = 0 if self.recovery is None else self.recovery.held_out(len(token_ids))
        return token_ids[: max(1, len(token_ids) - held_out)]

    def recorded(self) -> dict[str, Any]:
        """What determines the result, for the provenance."""
        found: dict[str, Any] = {"feedback": self.feedback}
        if self.block_by_block:
            found["calibration_windows"] = self.windows
        if self.blockwise is not None:
            found["blockwise"] = asdict(self.blockwise)
        if self.recovery is not None:
            found["recovery"] = asdict(self.recovery)
        return found


FAST = Phases(feedback=False, blockwise=None, recovery=None)
"""Clustering only, the one choice without a calibration text."""


def phases_of(options: ConversionOptions) -> Phases:
    """The phases of the effort that `options` ask for, changed by their other options.

    0 `blockwise_epochs` or `recovery_steps` leave a phase out; any other option of a phase puts it in. Raises
    InvalidRequestError for values that are out of range.
    """
    _check_ranges(options)
    bare = options.calibration == "none" or options.dim is not None
    effort = options.effort or ("fast" if bare else "balanced")
    blockwise = {
        "epochs": options.blockwise_epochs,
        "batch": options.blockwise_batch,
        "rate": options.blockwise_lr,
        "schedule": options.blockwise_schedule,
        "same_input": options.blockwise_same_input,
        "held_out": options.blockwise_held_out,
        "patience": options.blockwise_patience,
        "precision": options.blockwise_precision,
    }
    recovery = {
        "steps": options.recovery_steps,
        "batch": options.recovery_batch,
        "context": options.recovery_context,
        "rate": options.recovery_lr,
        "schedule": options.recovery_schedule,
        "warmup": options.recovery_warmup,
        "checks": options.recovery_checks,
        "patience": options.recovery_patience,
        "precision": options.recovery_precision,
    }
    windows = options.calibration_windows
    usual = RecoveryOptions(seed=options.seed, precision=fast_precision())
    return Phases(
        feedback=effort != "fast" if options.feedback is None else options.feedback,
        blockwise=_phase(BlockwiseOptions(seed=options.seed), "epochs", blockwise, included=effort != "fast"),
        recovery=_phase(usual, "steps", recovery, included=effort == "best"),
        windows=(4 * WINDOWS if effort == "best" else WINDOWS) if windows is None else windows,
    )


def _phase(usual: _Options, amount: str, settings: Mapping[str, Any], *, included: bool) -> _Options | None:
    """The settings of a phase, None to leave it out."""
    given = {name: value for name, value in settings.items() if value is not None}
    if given.get(amount) == 0 or not (included or given):
        return None
    return replace(usual, **given)


def _check_ranges(options: ConversionOptions) -> None:
    """Raises InvalidRequestError."""
    check_range("seed", options.seed, 0, MOST_SEED)
    counted: dict[str, float | None] = {
        "calibration_windows": options.calibration_windows,
        "blockwise_batch": options.blockwise_batch,
        "blockwise_patience": options.blockwise_patience,
        "recovery_batch": options.recovery_batch,
        "recovery_context": options.recovery_context,
        "recovery_checks": options.recovery_checks,
        "recovery_patience": options.recovery_patience,
    }
    for option, value in counted.items():
        if value is not None:
            check_range(option, value, 1, MOST)
    from_zero: dict[str, float | None] = {
        "blockwise_epochs": options.blockwise_epochs,
        "blockwise_same_input": options.blockwise_same_input,
        "recovery_steps": options.recovery_steps,
        "recovery_warmup": options.recovery_warmup,
    }
    for option, value in from_zero.items():
        if value is not None:
            check_range(option, value, 0, MOST)
    for option, rate in (("blockwise_lr", options.blockwise_lr), ("recovery_lr", options.recovery_lr)):
        if rate is not None:
            check_range(option, rate, 0, MOST_RATE, above=True)
    if options.blockwise_held_out is not None:
        check_range("blockwise_held_out", options.blockwise_held_out, 0, 1 - _LEAST_SHARE, above=True)
