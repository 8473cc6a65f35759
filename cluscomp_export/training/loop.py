"""The training loop: AdamW on float32 master copies, best state by held-out loss, early stop, resumable.

Trains a model or a block with a loss and batches that the caller gives. The batch of a step depends only on the step's number.
The state of a training is therefore the step, the parameters and the optimizer's moments. On the same machine with the same
number of threads, the result is the same bit for bit, however often the training was interrupted.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, Protocol, TypeVar

import numpy as np
import torch

from cluscomp_export.store import ArraySpecs, Store
from cluscomp_export.training.parameters import Trainable
from cluscomp_formats.errors import InvalidRequestError, Problem
from cluscomp_formats.ir import AnyArray, Model
from cluscomp_formats.progress import Progress, silent

__all__ = [
    "RATE_OF_ROOT",
    "Curve",
    "Precision",
    "Schedule",
    "Trained",
    "Training",
    "TrainingOptions",
    "curve_array",
    "curve_entries",
    "curve_specs",
    "fast_precision",
    "finite_curve",
    "rate_factor",
]

Schedule = Literal["cosine", "linear", "constant"]
Precision = Literal["float32", "bfloat16"]
"""Precision of matrix products; in float16 gradients would underflow. Activations between layers, norms, losses, parameters and
their updates are float32."""

CLIP = 1.0
"""Largest norm of the gradient, so that one unusual window does not undo many steps."""
RATE_OF_ROOT = 1.5e-3
"""Rate for a held-out divergence of 1 nat per token (docs/lab-notes.md)."""
SAVE_SECONDS = 60.0
"""A checkpoint is saved at every check, and between checks when the last one is this old."""
_CHECKPOINT = "training"


class Counted(Protocol):
    """A batch; `count` is the number of items of which its loss is the mean."""

    @property
    def count(self) -> int: ...


Batch = TypeVar("Batch", bound=Counted)


@dataclass(frozen=True)
class TrainingOptions:
    """`steps` steps with `batch` windows each; `rate` is relative to the magnitude of each parameter.

    A `rate` of None means `RATE_OF_ROOT` times the square root of the held-out loss before the training. That suits
    divergences: they are quadratic in the error, so that steps are in proportion to the remaining error.

    The rate rises over `warmup` steps, then follows `schedule`: a half cosine to 0, a line to 0, or constant. `checks`
    evaluations on held-out batches are spread over the training, which stops after `patience` of them without improvement.
    """

    steps: int = 48
    batch: int = 4
    rate: float | None = 1e-3
    schedule: Schedule = "cosine"
    warmup: int = 0
    checks: int = 8
    patience: int = 3
    precision: Precision = "float32"
    seed: int = 0

    @property
    def every(self) -> int:
        """Steps from one check to the next."""
        return max(1, self.steps // max(1, self.checks))

    @property
    def most_checks(self) -> int:
        """Most entries that a curve can have, with one before the training and one at its end."""
        return self.steps // self.every + 2


def rate_factor(options: TrainingOptions, step: int) -> float:
    """Factor of the rate in a step; the first step is 0."""
    if step < options.warmup:
        return (step + 1) / options.warmup
    done = min(1.0, (step - options.warmup) / max(1, options.steps - options.warmup))
    return {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}[options.schedule]


def fast_precision() -> Precision:
    """bfloat16 on a CPU with matrix units (AMX), where it is several times faster; otherwise float32."""
    # Older releases of torch do not have this function.
    capabilities: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return "bfloat16" if capabilities.get("amx_bf16") else "float32"


Curve = Sequence[Mapping[str, float]]
"""One entry per check: the `step`, the mean loss since the last check (`train`), the loss on `held_out` batches."""


def curve_specs(rows: int) -> tuple[str, tuple[int, ...]]:
    """Dtype and shape of a `curve_array`."""
    return "float64", (rows, 3)


def curve_array(curve: Curve, rows: int) -> AnyArray:
    """A curve as an array to store: float64 `[rows, 3]`, NaN for missing values."""
    array = np.full((rows, 3), math.nan)
    for row, entry in zip(array, curve, strict=False):
        row[:] = entry["step"], entry.get("train", math.nan), entry["held_out"]
    return array


def curve_entries(array: AnyArray) -> list[dict[str, float]]:
    """The curve in a `curve_array`."""
    entries = [
        {"step": int(step), "train": train, "held_out": held_out}
        for step, train, held_out in array.tolist()
        if not math.isnan(step)
    ]
    return [{key: value for key, value in entry.items() if key != "train" or not math.isnan(value)} for entry in entries]


def finite_curve(curve: Curve) -> list[dict[str, float]]:
    """A curve for JSON, without values that are not finite."""
    return [{key: value for key, value in entry.items() if math.isfinite(value)} for entry in curve]


@dataclass(frozen=True)
class Trained:
    """A trained model and how it was trained.

    `values` are the parameters as stored, by the names of `cluscomp_formats.parameters`. `stopped` says why the training ended
    early, if it did.
    """

    model: Model
    values: Mapping[str, AnyArray]
    curve: Curve
    stopped: str | None

    def record(self) -> dict[str, Any]:
        """The curve as JSON for the provenance."""
        return {"curve": finite_curve(self.curve), "stopped": self.stopped}


@dataclass
class _State:
    """State of a training: steps done, one entry per check, losses since the last check, the best parameters so far."""

    step: int = 0
    curve: list[dict[str, float]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    best: dict[str, torch.Tensor] = field(default_factory=dict, repr=False)

    @property
    def failures(self) -> int:
        """Checks since the best one."""
        held_out = [entry["held_out"] for entry in self.curve]
        return len(held_out) - 1 - held_out.index(min(held_out))


class Training(Generic[Batch]):
    """Trains `student` to minimise `loss`, a mean over a batch, with `batch(step)` in each step.

    With a store `work`, it resumes an interrupted training from its checkpoint there. `name` is the phase of its
    progress reports.
    """

    def __init__(
        self,
        student: Trainable,
        loss: Callable[[Batch], torch.Tensor],
        batch: Callable[[int], Batch],
        held_out: Sequence[Batch],
        options: TrainingOptions,
        *,
        work: Store | None = None,
        name: str = "training",
        on_progress: Progress = silent,
    ) -> None:
        self.student = student
        self.loss = loss
        self.batch = batch
        self.held_out = held_out
        self.options = options
        self.work = work
        self.name = name
        self.on_progress = on_progress
        groups = [{"params": [values]} for values in student.parameters.values()]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0)
        # Adam changes every value by about the rate. Relative to the magnitude of each parameter, one rate suits all.
        self.sizes = [_size(values) for values in student.parameters.values()]
        self.state = _State()
        self.resumed_at = 0

    def run(self) -> Trained:
        """Train to the end and leave the best state in the student.

        A loss that is not finite ends the training with the best state so far; before the first step, it raises
        InvalidRequestError.
        """
        options, state = self.options, self.state
        if not self._resume():
            state.curve.append({"step": 0, "held_out": self.evaluate()})
            if not math.isfinite(state.curve[0]["held_out"]):
                remedy = "check with inspect that the model and the reference, if any, are valid"
                message = "the model's loss is not finite before any training"
                raise InvalidRequestError(Problem("not_finite", message, remedy=remedy))
            state.best = self._snapshot()
        saved = time.monotonic()
        stopped = self._stop()
        while stopped is None and state.step < options.steps:
            loss = self.step(state.step)
            if not math.isfinite(loss):
                stopped = f"the loss was not finite at step {state.step + 1}; kept the best state before"
                break
            state.step += 1
            state.losses.append(loss)
            last = state.curve[-1]["held_out"]
            self.on_progress(f"{self.name}, loss {loss:.3f}, held-out {last:.3f}", state.step, options.steps)
            if state.step % options.every == 0 or state.step == options.steps:
                stopped = self._check()
            elif time.monotonic() - saved < SAVE_SECONDS:
                continue
            self._save()
            saved = time.monotonic()
        with torch.no_grad():
            for name, values in self.student.parameters.items():
                values.copy_(state.best[name])
        stored = self.student.stored()
        return Trained(self.student.with_values(stored), stored, state.curve, stopped)

    def step(self, step: int) -> float:
        """One step of AdamW on a batch; returns the loss before it. Changes nothing if that is not finite."""
        self.optimizer.zero_grad(set_to_none=True)
        with self._autocast():
            loss = self.loss(self.batch(step))
        loss.backward()  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.clip_grad_norm_(list(self.student.parameters.values()), CLIP)
        if not (math.isfinite(loss.item()) and math.isfinite(norm.item())):
            return math.nan
        rate = self.rate * rate_factor(self.options, step)
        for group, size in zip(self.optimizer.param_groups, self.sizes, strict=True):
            group["lr"] = rate * size
        self.optimizer.step()
        return loss.item()

    @property
    def rate(self) -> float:
        """The highest learning rate, relative to the magnitude of each parameter."""
        if self.options.rate is not None:
            return self.options.rate
        # Rounding can make a divergence of 0 negative.
        return RATE_OF_ROOT * math.sqrt(max(0.0, self.state.curve[0]["held_out"]))

    def evaluate(self) -> float:
        """Mean loss on the held-out batches with the parameters as they would be stored, in nats per token."""
        with torch.no_grad(), self.student.as_stored(), self._autocast():
            total = sum(self.loss(batch).item() * batch.count for batch in self.held_out)
        return total / sum(batch.count for batch in self.held_out)

    def _autocast(self) -> torch.autocast:
        device = next(iter(self.student.parameters.values())).device
        return torch.autocast(device.type, torch.bfloat16, enabled=self.options.precision == "bfloat16")

    def _check(self) -> str | None:
        state = self.state
        train = sum(state.losses) / len(state.losses)
        state.curve.append({"step": state.step, "train": train, "held_out": self.evaluate()})
        state.losses = []
        if state.failures == 0:
            state.best = self._snapshot()
        return self._stop()

    def _stop(self) -> str | None:
        """Why the last check ends the training, if it does."""
        state = self.state
        if not math.isfinite(state.curve[-1]["held_out"]):
            return f"the held-out loss was not finite at step {state.step}; kept the best state before"
        if state.failures >= self.options.patience and state.step < self.options.steps:
            return f"no progress on held-out text since {state.failures} checks, at step {state.step}"
        return None

    def _snapshot(self) -> dict[str, torch.Tensor]:
        return {name: values.detach().clone() for name, values in self.student.parameters.items()}

    def _save(self) -> None:
        """Save the state as a unit of the store, replacing the last one."""
        if self.work is None:
            return
        state = self.state
        losses = np.full(self.options.every, math.nan)
        losses[: len(state.losses)] = state.losses
        arrays: dict[str, AnyArray] = {"step": np.array([state.step]), "losses": losses}
        arrays["curve"] = curve_array(state.curve, self.options.most_checks)
        for name, values in self.student.parameters.items():
            moments = self.optimizer.state[values]
            arrays[f"value.{name}"] = _numpy(values)
            arrays[f"best.{name}"] = _numpy(state.best[name])
            # A parameter that no batch has used yet has no moments.
            arrays[f"mean.{name}"] = _numpy(moments.get("exp_avg", torch.zeros_like(values)))
            arrays[f"square.{name}"] = _numpy(moments.get("exp_avg_sq", torch.zeros_like(values)))
        self.work.save(_CHECKPOINT, arrays)

    def _resume(self) -> bool:
        """Resume an interrupted training, if there is one; whether there was."""
        arrays = self.work.load(_CHECKPOINT, self._specs()) if self.work is not None else None
        if arrays is None:
            return False
        state = self.state
        state.step = self.resumed_at = int(arrays["step"][0])
        state.curve = curve_entries(arrays["curve"])
        state.losses = [loss for loss in arrays["losses"].tolist() if not math.isnan(loss)]
        with torch.no_grad():
            for name, values in self.student.parameters.items():
                stored = {key: torch.from_numpy(arrays[f"{key}.{name}"].copy()) for key in ("value", "best", "mean", "square")}
                values.copy_(stored["value"])
                state.best[name] = stored["best"].to(values.device)
                self.optimizer.state[values] = {
                    "step": torch.tensor(float(state.step)),
                    "exp_avg": stored["mean"].to(values.device),
                    "exp_avg_sq": stored["square"].to(values.device),
                }
        return True

    def _specs(self) -> ArraySpecs:
        options = self.options
        specs: dict[str, tuple[str, tuple[int, ...]]] = {
            "step": ("int64", (1,)),
            "curve": curve_specs(options.most_checks),
            "losses": ("float64", (options.every,)),
        }
        for name, values in self.student.parameters.items():
            specs |= {f"{key}.{name}": ("float32", tuple(values.shape)) for key in ("value", "best", "mean", "square")}
        return specs


def _size(values: torch.Tensor) -> float:
    """Root mean square."""
    return float(values.detach().square().mean().sqrt())


def _numpy(values: torch.Tensor) -> AnyArray:
    array: AnyArray = values.detach().cpu().numpy()
    return array
