"""The options of a conversion."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Literal

from cluscomp_export.compression.fit_encode import Method
from cluscomp_export.planning import Share
from cluscomp_export.planning.sizes import parse_bytes
from cluscomp_export.training.loop import Precision, Schedule

__all__ = ["ConversionOptions", "Effort", "Optimize"]

Effort = Literal["fast", "balanced", "best"]
Optimize = Literal["size", "speed"]

_PHASES = (
    "effort",
    "feedback",
    "calibration_windows",
    "blockwise_epochs",
    "blockwise_batch",
    "blockwise_lr",
    "blockwise_schedule",
    "blockwise_same_input",
    "blockwise_held_out",
    "blockwise_patience",
    "blockwise_precision",
    "recovery_steps",
    "recovery_batch",
    "recovery_context",
    "recovery_lr",
    "recovery_schedule",
    "recovery_warmup",
    "recovery_checks",
    "recovery_patience",
    "recovery_precision",
)
"""Options that determine the phases of a compression; `Phases.recorded` records the result."""


@dataclass(frozen=True)
class ConversionOptions:
    """How to convert a source. Fields are named like the flags of the command line, whose help describes each.

    At most one target is given: `bits`, `budget` (bytes, or a text such as "55MB"), `match_loss`, `plan` (a file), or `dim`
    with `clusters`, the paper's setting; without one, the target is 4 bits. None lets the planner choose `share`, and for
    `codebook_bits` the one with the least expected error (16 with recovery). `embedding_bits=None` is 2.1 more than `bits`, at
    least 4, at most the width of the source; with `dim` that width. `sensitivity=None` is "measured" with `match_loss`,
    otherwise "equal". `optimize` is what counts besides the target: "size" ignores time, "speed" prefers codebooks that are
    fast to look up in, None is between them. Time is that of `machine`, the name of a profile, or "this" to measure; None is
    `DEFAULT_MACHINE`.

    `calibration` is a text file, "none", or None: the text of this package, none with the paper's setting. `effort="fast"` only
    clusters. "balanced", the default with a calibration text, adds error feedback and block-wise tuning; "best" adds recovery.
    The options of these phases change the effort, see `effort.phases_of`.

    `workers` is described by `parse_workers`. `threads` are those of all work, or of each worker. `workers`, `threads` and
    `device` do not change the result of clustering; error feedback and trainings may depend on threads and device.
    """

    bits: float | None = None
    dim: int | None = None
    clusters: int | None = None
    budget: int | str | None = None
    match_loss: float | None = None
    plan: str | PathLike[str] | None = None
    share: Share | None = None
    embedding_bits: float | None = None
    codebook_bits: int | None = None
    sensitivity: Literal["measured", "equal"] | None = None
    optimize: Optimize | None = None
    machine: str | None = None
    calibration: str | PathLike[str] | None = None
    effort: Effort | None = None
    feedback: bool | None = None
    calibration_windows: int | None = None
    calibration_context: int | None = None
    blockwise_epochs: int | None = None
    blockwise_batch: int | None = None
    blockwise_lr: float | None = None
    blockwise_schedule: Schedule | None = None
    blockwise_same_input: float | None = None
    blockwise_held_out: float | None = None
    blockwise_patience: int | None = None
    blockwise_precision: Precision | None = None
    recovery_steps: int | None = None
    recovery_batch: int | None = None
    recovery_context: int | None = None
    recovery_lr: float | None = None
    recovery_schedule: Schedule | None = None
    recovery_warmup: int | None = None
    recovery_checks: int | None = None
    recovery_patience: int | None = None
    recovery_precision: Precision | None = None
    method: Method = "fast"
    seed: int = 0
    to: str = "packed"
    gguf_type: str | None = None
    threads: int | None = None
    device: str = "cpu"
    workers: str | None = None

    @property
    def torch_threads(self) -> int | None:
        """Threads of this process; with workers, `threads` is the number of each worker."""
        return self.threads if self.workers is None else None

    @property
    def asks_clustering(self) -> bool:
        """Whether any option says how to cluster."""
        how = (*self.targets().values(), self.clusters, self.share, self.embedding_bits, self.codebook_bits, self.optimize)
        text = (self.sensitivity, self.calibration, self.calibration_context)
        return any(value is not None for value in (*how, *text, *self._phases().values()))

    @property
    def asks_phases(self) -> bool:
        """Whether any option asks for phases by name."""
        return any(value is not None for name, value in self._phases().items() if name != "calibration_windows")

    @property
    def allocates(self) -> bool:
        """Whether the planner chooses the sizes of codebooks."""
        return self.dim is None and self.plan is None

    @property
    def measures(self) -> bool:
        """Whether the plan needs sensitivities."""
        return self.allocates and (self.sensitivity == "measured" or self.match_loss is not None)

    @property
    def budget_bytes(self) -> int | None:
        """The budget as a number. Raises InvalidRequestError for a text that is not a size."""
        return parse_bytes(self.budget) if isinstance(self.budget, str) else self.budget

    @property
    def plan_file(self) -> Path | None:
        """The plan to follow."""
        return None if self.plan is None else Path(self.plan)

    @property
    def text_file(self) -> Path | None:
        """The calibration text that is named."""
        return None if self.calibration in (None, "none") else Path(self.calibration)

    def targets(self) -> dict[str, Any]:
        """The targets that a plan can have, by option; at most one may be given."""
        return {
            "bits": self.bits,
            "budget": self.budget,
            "match_loss": self.match_loss,
            "plan": self.plan,
            "dim": self.dim,
        }

    def files(self) -> list[Path]:
        """The files that the options name."""
        return [file for file in (self.text_file, self.plan_file) if file is not None]

    def recorded(self) -> dict[str, Any]:
        """The options that determine the result, for the provenance."""
        without_effect = {"threads", "device", "workers", "plan", *_PHASES}
        if self.budget is None:
            without_effect.add("to")
        names = {"dim": "cluster_dim", "clusters": "num_clusters"}
        values = asdict(self) | {"budget": self.budget_bytes}
        return {names.get(key, key): value for key, value in values.items() if value is not None and key not in without_effect}

    def _phases(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _PHASES}
