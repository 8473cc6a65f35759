"""What an effort means: which levels of work a compression goes through, and with which settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, TypeVar

from cluscomp_export.ranges import MOST, MOST_RATE, MOST_SEED, check_range
from cluscomp_export.training.blockwise import BlockwiseOptions
from cluscomp_export.training.loop import fast_precision
from cluscomp_export.training.recovery import RecoveryOptions

__all__ = ["Effort", "Levels", "levels_of"]

Effort = Literal["fast", "balanced", "best"]

WINDOWS = 64
"""Windows of the calibration text that error feedback and block-wise tuning see; four times as many with `best`."""

_RANGES = {
    "rate": (0, MOST_RATE, True),
    "same_input": (0, MOST, False),
    "held_out": (0, 1 - 2**-10, True),
    "warmup": (0, MOST, False),
}
"""Of settings, the others are counted from 1: the least, the most, whether the least itself is out of range."""

_Options = TypeVar("_Options", BlockwiseOptions, RecoveryOptions)


@dataclass(frozen=True)
class Levels:
    """Error feedback or nearest centroids, then block-wise tuning, then recovery; None leaves a level out.

    `windows` of 512 tokens of the calibration text are used for all but the last.
    """

    feedback: bool
    blockwise: BlockwiseOptions | None
    recovery: RecoveryOptions | None
    windows: int

    @property
    def block_by_block(self) -> bool:
        """Whether blocks are compressed in order, on the activations of the model as compressed so far."""
        return self.feedback or self.blockwise is not None

    @property
    def needs_text(self) -> bool:
        """Whether there must be a calibration text."""
        return self.block_by_block or self.recovery is not None

    def seen(self, token_ids: Sequence[int]) -> Sequence[int]:
        """The part of a text that anything is measured on or fitted to: recovery judges itself by the rest."""
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


def levels_of(
    effort: Effort,
    *,
    feedback: bool | None = None,
    windows: int | None = None,
    blockwise: Mapping[str, Any] | None = None,
    recovery: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> Levels:
    """The levels of an effort, changed by what is given: None, and settings that are None, are the effort's own.

    `blockwise` are settings of `BlockwiseOptions`, `recovery` of `RecoveryOptions`; 0 `epochs` or 0 `steps` leave a level out,
    any other setting puts it in. Raises InvalidRequestError for values that are out of range.
    """
    check_range("seed", seed, 0, MOST_SEED)
    if windows is not None:
        check_range("calibration_windows", windows, 1, MOST)
    usual = 4 * WINDOWS if effort == "best" else WINDOWS
    with_precision = RecoveryOptions(seed=seed, precision=fast_precision())
    return Levels(
        feedback=effort != "fast" if feedback is None else feedback,
        blockwise=_level("blockwise", "epochs", BlockwiseOptions(seed=seed), effort != "fast", blockwise or {}),
        recovery=_level("recovery", "steps", with_precision, effort == "best", recovery or {}),
        windows=usual if windows is None else windows,
    )


def _level(name: str, amount: str, default: _Options, included: bool, settings: Mapping[str, Any]) -> _Options | None:
    given = {key: value for key, value in settings.items() if value is not None}
    if given.get(amount) == 0 or not (included or given):
        return None
    unknown = sorted(set(given) - {field.name for field in fields(default)})
    if unknown:
        raise TypeError(f"{type(default).__name__} has no {', '.join(unknown)}")
    for key, value in given.items():
        if isinstance(value, int | float):
            least, most, above = _RANGES.get(key, (1, MOST, False))
            check_range(f"{name}_{'lr' if key == 'rate' else key}", value, least, most, above=above)
    return replace(default, **given)
