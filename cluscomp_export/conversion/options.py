"""What can be asked of a conversion."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from cluscomp_export.calibration.activations import read_text, shipped_text
from cluscomp_export.compression.fit_encode import Method
from cluscomp_export.conversion.effort import Effort, Levels, levels_of
from cluscomp_export.planning import Share

__all__ = ["ConversionOptions"]

_LEVELS = ("feedback", "calibration_windows", "blockwise", "recovery")
"""What changes an effort; `Levels.recorded` tells the result."""


@dataclass(frozen=True)
class ConversionOptions:
    """What to make of the source.

    One of `bits` (a budget per weight of the linear layers, codebooks and scales counted), `cluster_dim` with `num_clusters`
    (the paper's setting, the same for every matrix), `budget` (bytes of the whole artefact), `match_loss` (the divergence from
    the source, nats per token, as predicted) and `plan` (a file); none means 4 bits. `share=None` lets the planner choose.
    `sensitivity` says whether the planner measures how much every tensor matters, or takes all weights for equal, the default
    but for `match_loss`.
    `embedding_bits` is a budget per weight of embedding and head; 16 keeps them dense, None keeps the width of the source
    where that is below 16. `codebook_bits` is 8 or 16 per value of a codebook whose weights have row scales, None for whichever
    is expected to be best, with recovery 16. `calibration` is a text file whose activations weight the clustering, "none", or
    None: the text the package ships with `bits`, none with the paper's setting. `effort="fast"` only clusters; "balanced",
    the default where there is a calibration text, also chooses codes with error feedback and tunes block by block; "best"
    then trains codebooks, scales and norms end to end. `feedback`, `calibration_windows`, `blockwise` and `recovery` change
    the effort: see `levels_of`.
    `gguf_type` decodes for stock llama.cpp. `workers`, what `parse_workers` takes, cluster in parallel, else this process
    does. `threads` are those of all work, with workers of each of them; `workers`, `threads` and `device` do not change the
    result of clustering, but that of error feedback and trainings may depend on threads and device.
    """

    bits: float | None = None
    cluster_dim: int | None = None
    num_clusters: int | None = None
    budget: int | None = None
    match_loss: float | None = None
    plan: Path | None = None
    share: Share | None = None
    embedding_bits: float | None = None
    codebook_bits: int | None = None
    sensitivity: Literal["measured", "equal"] | None = None
    calibration: str | None = None
    effort: Effort | None = None
    feedback: bool | None = None
    calibration_windows: int | None = None
    calibration_context: int | None = None
    blockwise: Mapping[str, Any] = field(default_factory=dict)
    recovery: Mapping[str, Any] = field(default_factory=dict)
    method: Method = "fast"
    seed: int = 0
    to: str = "packed"
    gguf_type: str | None = None
    threads: int | None = None
    device: str = "cpu"
    workers: str | None = None

    @property
    def torch_threads(self) -> int | None:
        """The threads of what this process computes itself; of workers, `threads` is the number for each."""
        return self.threads if self.workers is None else None

    @property
    def asks_clustering(self) -> bool:
        """Whether any option says how to cluster."""
        how = (*self.targets().values(), self.num_clusters, self.share, self.embedding_bits, self.codebook_bits)
        windows = (self.calibration_windows, self.calibration_context)
        levels = (self.effort, self.feedback, *windows, *self.blockwise.values(), *self.recovery.values())
        given = (*how, self.sensitivity, self.calibration, *levels)
        return any(value is not None for value in given)

    @property
    def asks_levels(self) -> bool:
        """Whether any option asks for levels of work by name."""
        given = (self.effort, self.feedback, *self.blockwise.values(), *self.recovery.values())
        return any(value is not None for value in given)

    @property
    def allocates(self) -> bool:
        """Whether the planner chooses the sizes of codebooks."""
        return self.cluster_dim is None and self.plan is None

    @property
    def measures(self) -> bool:
        """Whether the plan needs sensitivities."""
        return self.allocates and (self.sensitivity == "measured" or self.match_loss is not None)

    def targets(self) -> dict[str, Any]:
        """What a plan can aim at, by option; at most one may be given."""
        return {
            "--bits": self.bits,
            "--budget": self.budget,
            "--match-loss": self.match_loss,
            "--plan": self.plan,
            "--dim": self.cluster_dim,
        }

    def levels(self) -> Levels:
        """What to go through if there is a calibration text. Raises InvalidRequestError."""
        bare = self.calibration == "none" or self.cluster_dim is not None
        return levels_of(
            self.effort or ("fast" if bare else "balanced"),
            feedback=self.feedback,
            windows=self.calibration_windows,
            blockwise=self.blockwise,
            recovery=self.recovery,
            seed=self.seed,
        )

    def calibration_text(self) -> str | None:
        """The text to calibrate on, if any. Raises InvalidFileError."""
        bare = self.cluster_dim is not None and not self.levels().needs_text
        if self.calibration == "none" or (self.calibration is None and bare):
            return None
        return shipped_text() if self.calibration is None else read_text(Path(self.calibration))

    def files(self) -> list[Path]:
        """The files that the options name."""
        text = None if self.calibration in (None, "none") else self.calibration
        return [Path(name) for name in (text, self.plan) if name is not None]

    def recorded(self) -> dict[str, Any]:
        """The options that determine the result, for the provenance."""
        without_effect = {"threads", "device", "workers", "plan", "effort", *_LEVELS}
        if self.budget is None:
            without_effect.add("to")
        return {key: value for key, value in asdict(self).items() if value is not None and key not in without_effect}
