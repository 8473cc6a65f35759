"""The training loop: AdamW on float32 master copies, best state by held-out loss, early stop, resumable.

What is trained is a model or a block; what for is a loss, what on are batches, both handed in. Every step's batch is a function
of its number, so that step, parameters and the optimizer's moments are all there is to the state of a training. Given the same
machine and number of threads, the result is the same bit for bit, however often it was interrupted.
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
"""What matrices are multiplied in. Not float16, in which gradients underflow. All else is float32: what flows between layers,
norms, losses, parameters and their updates."""

CLIP = 1.0
"""Largest norm of the gradient: keeps one odd window from undoing many steps."""
RATE_OF_ROOT = 1.5e-3
"""Rate for a held-out divergence of 1 nat per token (docs/lab-notes.md)."""
SAVE_SECONDS = 60.0
"""A checkpoint is kept at every check, and in between when the last one is this old."""
_CHECKPOINT = "training"


class Counted(Protocol):
    """A batch: it says how many of what its loss is the mean of it holds."""

    @property
    def count(self) -> int: ...


Batch = TypeVar("Batch", bound=Counted)


@dataclass(frozen=True)
class TrainingOptions:
    """`steps` steps on `batch` windows each; `rate` is relative to a parameter's size.

    A `rate` of None is `RATE_OF_ROOT` times the square root of the held-out loss before the training, for losses that are
    divergences: these are quadratic in what is wrong, so a step stays in proportion to the way there is to go.

    The rate rises over `warmup` steps, then follows `schedule`: falls to 0 by half a cosine, falls to 0 in a line, or stays.
    `checks` evaluations on held-out batches are spread over the training; it stops when `patience` of them in a row bring no
    progress.
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
        """Entries of the longest curve there can be: one before the training, one at its end."""
        return self.steps // self.every + 2


def rate_factor(options: TrainingOptions, step: int) -> float:
    """What the rate is multiplied by in a step, the first of which is 0."""
    if step < options.warmup:
        return (step + 1) / options.warmup
    done = min(1.0, (step - options.warmup) / max(1, options.steps - options.warmup))
    return {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}[options.schedule]


def fast_precision() -> Precision:
    """bfloat16 on a CPU that has matrix units for it (AMX), where it is several times faster, else float32."""
    # Older releases of torch cannot tell.
    capabilities: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return "bfloat16" if capabilities.get("amx_bf16") else "float32"


Curve = Sequence[Mapping[str, float]]
"""One entry per check: the `step`, the mean loss of the steps before it (`train`), the loss on what is `held_out`."""


def curve_specs(rows: int) -> tuple[str, tuple[int, ...]]:
    """Dtype and shape of a `curve_array`."""
    return "float64", (rows, 3)


def curve_array(curve: Curve, rows: int) -> AnyArray:
    """A curve to be stored: float64 `[rows, 3]`, NaN where there is nothing."""
    array = np.full((rows, 3), math.nan)
    for row, entry in zip(array, curve, strict=False):
        row[:] = entry["step"], entry.get("train", math.nan), entry["held_out"]
    return array


def curve_entries(array: AnyArray) -> list[dict[str, float]]:
    """The curve that a `curve_array` holds."""
    entries = [
        {"step": int(step), "train": train, "held_out": held_out}
        for step, train, held_out in array.tolist()
        if not math.isnan(step)
    ]
    return [{key: value for key, value in entry.items() if key != "train" or not math.isnan(value)} for entry in entries]


def finite_curve(curve: Curve) -> list[dict[str, float]]:
    """A curve fit for JSON: what is not finite is left out."""
    return [{key: value for key, value in entry.items() if math.isfinite(value)} for entry in curve]


@dataclass(frozen=True)
class Trained:
    """A trained model, and how it came about.

    `values` are the parameters as they are stored, by the names of `cluscomp_formats.parameters`. `stopped` says why the
    training ended before its last step, if it did.
    """

    model: Model
    values: Mapping[str, AnyArray]
    curve: Curve
    stopped: str | None

    def record(self) -> dict[str, Any]:
        """The curve as JSON for the provenance; what is not finite is left out."""
        return {"curve": finite_curve(self.curve), "stopped": self.stopped}


@dataclass
class _State:
    """Where a training is: steps done, one entry per check, losses since the last check, the best parameters so far."""

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
    """Trains `student` for `loss`, a mean over a batch, on `batch(step)` for every step.

    With a `work` folder it goes on from what an interrupted training has kept there. `name` is what progress is reported as.
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
        # Adam moves every value by about the rate: relative to the parameter's size, one rate serves all.
        self.sizes = [_size(values) for values in student.parameters.values()]
        self.state = _State()
        self.resumed_at = 0

    def run(self) -> Trained:
        """Train to the end and leave the best state in the student. Raises InvalidRequestError if there is none to begin with.

        A loss that is not finite ends the training, and the best state so far is kept.
        """
        options, state = self.options, self.state
        if not self._resume():
            state.curve.append({"step": 0, "held_out": self.evaluate()})
            if not math.isfinite(state.curve[0]["held_out"]):
                remedy = "inspect tells whether the model, and the reference if there is one, is sound"
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
        """One step of AdamW on a batch; the loss before it. Changes nothing if that is not finite."""
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
        """The learning rate at its highest, relative to a parameter's size."""
        if self.options.rate is not None:
            return self.options.rate
        # Rounding can make a divergence of nothing negative.
        return RATE_OF_ROOT * math.sqrt(max(0.0, self.state.curve[0]["held_out"]))

    def evaluate(self) -> float:
        """Mean loss on the held-out batches with the parameters as they would be stored, nats per token."""
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
        """Why to stop at the last check, if there is a reason."""
        state = self.state
        if not math.isfinite(state.curve[-1]["held_out"]):
            return f"the held-out loss was not finite at step {state.step}; kept the best state before"
        if state.failures >= self.options.patience and state.step < self.options.steps:
            return f"no progress on held-out text since {state.failures} checks, at step {state.step}"
        return None

    def _snapshot(self) -> dict[str, torch.Tensor]:
        return {name: values.detach().clone() for name, values in self.student.parameters.items()}

    def _save(self) -> None:
        """Keep the state as a unit of the work folder, in place of the one before."""
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
            # A parameter that no batch has reached yet has no moments.
            arrays[f"mean.{name}"] = _numpy(moments.get("exp_avg", torch.zeros_like(values)))
            arrays[f"square.{name}"] = _numpy(moments.get("exp_avg_sq", torch.zeros_like(values)))
        self.work.save(_CHECKPOINT, arrays)

    def _resume(self) -> bool:
        """Whether an interrupted training was taken up."""
        arrays = self.work.load(_CHECKPOINT, self._forms()) if self.work is not None else None
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

    def _forms(self) -> ArraySpecs:
        options = self.options
        forms: dict[str, tuple[str, tuple[int, ...]]] = {
            "step": ("int64", (1,)),
            "curve": curve_specs(options.most_checks),
            "losses": ("float64", (options.every,)),
        }
        for name, values in self.student.parameters.items():
            forms |= {f"{key}.{name}": ("float32", tuple(values.shape)) for key in ("value", "best", "mean", "square")}
        return forms


def _size(values: torch.Tensor) -> float:
    """Root mean square."""
    return float(values.detach().square().mean().sqrt())


def _numpy(values: torch.Tensor) -> AnyArray:
    array: AnyArray = values.detach().cpu().numpy()
    return array
