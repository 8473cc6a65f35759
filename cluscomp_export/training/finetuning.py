"""Finetuning: train a clustered model's codebooks, row scales and norms on a text or on chats; the result is a delta.

This is the downstream phase of ClusComp (Liao et al., arXiv 2503.13089). Codes are fixed, so that the result is small and
applies to the model in any format. Memory: codes at 16 bits, embedding and head in the precision of the activations, the
activations between blocks, a few copies of one window's logits, four float32 copies of the trained parameters; with a
reference, that model as float32.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from os import PathLike
from pathlib import Path
from shlex import quote
from typing import Any

import torch

from cluscomp_export.outputs import check_apart
from cluscomp_export.ranges import MOST, MOST_RATE, MOST_SEED, check_range
from cluscomp_export.sources import open_source, source_bytes
from cluscomp_export.training.data import TuningData, read_data
from cluscomp_export.training.examples import Example, make_batch, shuffled_batches
from cluscomp_export.training.loop import Precision, Schedule, Training, TrainingOptions
from cluscomp_export.training.losses import PredictionLoss
from cluscomp_export.training.parameters import TrainableModel
from cluscomp_export.work_folder import fingerprint, work_folder
from cluscomp_formats.delta import Delta, changes, write_delta
from cluscomp_formats.errors import InvalidFileError, InvalidRequestError, Problem
from cluscomp_formats.files.atomic import check_output
from cluscomp_formats.ir import DTYPES, Model
from cluscomp_formats.parameters import kind_of
from cluscomp_formats.progress import Progress, silent
from cluscomp_formats.sections.digest import check_claim
from cluscomp_formats.tokens import no_tokenizer
from cluscomp_formats.version import __version__
from cluscomp_runtime.devices import check_device
from cluscomp_runtime.language_model import LanguageModel
from cluscomp_runtime.memory import memory_faults
from cluscomp_runtime.tokenizer import Tokenizer

__all__ = ["TuneOptions", "TunePlan", "TuneReport", "checked_digest", "plan_tuning", "tune"]

HELD_OUT_BATCH = 4

_MEMORY_REMEDY = "use a smaller `batch` or `context`, or free memory, and run it again: finished work has been kept"

_KINDS = {"codebooks": "codebook", "scales": "row_scale", "norms": "norm"}
"""Kinds of parameters as options name them, and as `cluscomp_formats.parameters` does."""


@dataclass(frozen=True, kw_only=True)
class TuneOptions:
    """What to train on, and how.

    One of `text` and `chat`, a file of chats (`chats.py`), is the data. `steps` or `epochs` over the examples (1 by default)
    say how long. `held_out` is a share of the examples, above 0 and below 1, or another file of the same kind. `train` names
    the kinds of parameters. With `reference`, the original model, `kl` times the divergence from it is added to the loss.
    `lr` is relative to a parameter's size; the other options are those of `TrainingOptions`.
    """

    text: str | PathLike[str] | None = None
    chat: str | PathLike[str] | None = None
    steps: int | None = None
    epochs: float | None = None
    batch: int = 4
    context: int = 512
    lr: float = 1e-3
    schedule: Schedule = "cosine"
    warmup: int = 0
    held_out: float | str | PathLike[str] = 0.1
    checks: int = 8
    patience: int = 3
    train: Sequence[str] = tuple(_KINDS)
    reference: str | PathLike[str] | None = None
    kl: float = 0.0
    precision: Precision = "float32"
    seed: int = 0
    device: str = "cpu"

    @property
    def data(self) -> Path:
        """The file to train on. Raises InvalidRequestError unless there is exactly one."""
        if self.text is not None and self.chat is None:
            return Path(self.text)
        if self.chat is not None and self.text is None:
            return Path(self.chat)
        raise InvalidRequestError(Problem("bad_option", "give either `text` or `chat`"))

    @property
    def held_out_data(self) -> float | Path:
        """The share or the file to hold out."""
        return self.held_out if isinstance(self.held_out, int | float) else Path(self.held_out)

    @property
    def original(self) -> Path | None:
        """The model to stay close to."""
        return None if self.reference is None else Path(self.reference)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds to train, as `cluscomp_formats.parameters` names them."""
        return tuple(_KINDS[name] for name in self.train)

    def training(self, steps: int) -> TrainingOptions:
        """How to train for so many steps."""
        return TrainingOptions(
            steps=steps,
            batch=self.batch,
            rate=self.lr,
            schedule=self.schedule,
            warmup=self.warmup,
            checks=self.checks,
            patience=self.patience,
            precision=self.precision,
            seed=self.seed,
        )


@dataclass(frozen=True)
class TunePlan:
    """A finetuning before any training: steps, examples, scored predictions among them, the size of the delta."""

    steps: int
    examples: int
    predictions: int
    held_out_examples: int
    parameters: Mapping[str, int]
    """Number of values to train, by kind."""
    delta_bytes: int
    model_bytes: int
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class TuneReport:
    """What `tune` did: the delta, digests of the model and of the model with it, the curve of `Trained`.

    `held_out` is the loss on held-out examples before and after, in nats per token. `resumed_at` is the step from which
    an interrupted training was resumed, otherwise 0.
    """

    output: str
    file_bytes: int
    share_of_model: float
    base: str
    result: str
    steps: int
    examples: int
    predictions: int
    held_out: tuple[float, float]
    curve: Sequence[Mapping[str, float]]
    stopped: str | None
    changed: Mapping[str, int]
    resumed_at: int
    seconds: float
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class _Prepared:
    model: Model
    trainable: TrainableModel
    data: TuningData
    plan: TunePlan


def plan_tuning(model_path: Path, options: TuneOptions) -> TunePlan:
    """Read model and data, check the options, train nothing. Raises what `tune` does."""
    return _prepare(model_path, options).plan


@memory_faults(_MEMORY_REMEDY)
def tune(
    model_path: Path, output: Path, options: TuneOptions, *, force: bool = False, on_progress: Progress = silent
) -> TuneReport:
    """Train and write the delta; the model is not changed.

    An interrupted training keeps its last checkpoint in a folder next to the output (`work_path`). The same call resumes it
    and produces the same bytes on the same machine with the same number of threads. Raises InvalidRequestError for
    options that do not fit, InvalidFileError for a damaged model, bad lines in a file of chats or other data that cannot be
    used, UnsupportedError, OutputExistsError, StorageError.
    """
    started = time.perf_counter()
    held_out, original_path = options.held_out_data, options.original
    check_apart([output], [model_path, options.data, held_out if isinstance(held_out, Path) else None, original_path])
    check_output(output, force=force)
    prepared = _prepare(model_path, options)
    plan, trainable = prepared.plan, prepared.trainable
    warnings = list(plan.warnings)
    base = checked_digest(prepared.model, model_path, on_progress)
    teacher, reference = None, None
    if original_path is not None:
        original = open_source(original_path)
        _check_tokenizer(prepared.model, original, original_path)
        reference = checked_digest(original, original_path, on_progress)
        teacher = LanguageModel.from_model(original, kernel="dense", dtype="float32", device=options.device).decoder
    how = options.training(plan.steps)
    made = {
        "version": __version__,
        "base": base,
        "options": _recorded(options, how, reference),
        "data": prepared.data.description,
    }
    unseen = prepared.data.held_out
    with work_folder(output) as work:
        kept, deleted = work.begin(fingerprint(made))
        if deleted and not kept:
            warnings.append("the unfinished work of another training was discarded: model, data or options differ")
        training = Training(
            trainable,
            PredictionLoss(trainable.decoder, teacher, task=1.0, kl=options.kl),
            shuffled_batches(prepared.data.kept, how.batch, how.seed),
            [make_batch(unseen[start : start + HELD_OUT_BATCH]) for start in range(0, len(unseen), HELD_OUT_BATCH)],
            how,
            work=work,
            name="tuning",
            on_progress=on_progress,
        )
        result = training.run()
        arrays = changes(prepared.model, result.model)
        record = {"tool": "cluscomp-export", **made, "training": result.record()}
        delta = Delta(base, result.model.digest(), arrays, record)
        file_bytes = write_delta(delta, output, force=force)
    losses = [entry["held_out"] for entry in result.curve]
    if not arrays:
        warnings.append("no step lowered the loss on held-out examples: the delta is empty; use a smaller `lr` or more steps")
    return TuneReport(
        output=str(output),
        file_bytes=file_bytes,
        share_of_model=file_bytes / plan.model_bytes,
        base=base,
        result=delta.result,
        steps=int(result.curve[-1]["step"]),
        examples=plan.examples,
        predictions=plan.predictions,
        held_out=(losses[0], min(losses)),
        curve=result.curve,
        stopped=result.stopped,
        changed=dict(Counter(kind_of(name) for name in arrays)),
        resumed_at=training.resumed_at,
        seconds=time.perf_counter() - started,
        warnings=tuple(warnings),
    )


def checked_digest(model: Model, path: Path, on_progress: Progress = silent) -> str:
    """Compute the model's digest. Raises InvalidFileError if its file claims another one."""
    on_progress("computing the digest", 0, 1)
    digest = model.digest()
    on_progress("computing the digest", 1, 1)
    check_claim(model, digest, str(path))
    return digest


def _prepare(model_path: Path, options: TuneOptions) -> _Prepared:
    _check_options(options)
    model = open_source(model_path)
    if not model.clustered:
        message, remedy = "only a clustered model can be tuned", f"cluscomp-export convert {quote(str(model_path))} model.clus"
        raise InvalidRequestError(Problem("not_clustered", message, str(model_path), remedy=remedy))
    tokenizer = Tokenizer.from_files(model.files)
    if tokenizer is None:
        raise InvalidRequestError(replace(no_tokenizer(model), file=str(model_path)))
    data = read_data(
        options.data,
        options.held_out_data,
        model,
        tokenizer,
        chat=options.chat is not None,
        context=options.context,
        seed=options.seed,
    )
    trainable = TrainableModel(model, options.kinds, device=check_device(options.device))
    longest = trainable.decoder.description.max_position_embeddings
    if options.context > longest:
        found, expected = str(options.context), f"at most {longest} (max_position_embeddings)"
        raise InvalidRequestError(Problem("out_of_range", "`context` is too long", None, None, found, expected))
    _check_ids([*data.kept, *data.held_out], trainable.decoder.description.vocab_size, options.data)
    counts: Counter[str] = Counter()
    for name, values in trainable.parameters.items():
        counts[kind_of(name)] += values.numel()
    plan = TunePlan(
        steps=options.steps or max(1, math.ceil((options.epochs or 1) * len(data.kept) / options.batch)),
        examples=len(data.kept),
        predictions=sum(sum(example.scored) for example in data.kept),
        held_out_examples=len(data.held_out),
        parameters=dict(counts),
        delta_bytes=sum(math.prod(shape) * DTYPES[dtype].itemsize for dtype, shape in trainable.specs().values()),
        model_bytes=source_bytes(model_path),
        warnings=data.warnings,
    )
    return _Prepared(model, trainable, data, plan)


def _check_options(options: TuneOptions) -> None:
    problem = None
    if options.steps is not None and options.epochs is not None:
        problem = Problem("bad_option", "`steps` and `epochs` exclude each other", remedy="give one of them")
    elif (options.reference is None) != (options.kl == 0):
        problem = Problem("bad_option", "`reference` and `kl` go together")
    elif isinstance(options.held_out, int | float) and not 0 < options.held_out < 1:
        found, expected = f"{options.held_out:g}", "above 0 and below 1, or a file"
        problem = Problem("bad_option", "`held_out` is out of range", found=found, expected=expected)
    elif not set(options.train) <= set(_KINDS) or not options.train:
        found, expected = ", ".join(options.train), ", ".join(_KINDS)
        problem = Problem("bad_option", "`train` names kinds of parameters", found=found[:200], expected=expected)
    if problem:
        raise InvalidRequestError(problem)
    for option in ("batch", "checks", "patience"):
        check_range(option, getattr(options, option), 1, MOST)
    if options.steps is not None:
        check_range("steps", options.steps, 1, MOST)
    if options.epochs is not None:
        check_range("epochs", options.epochs, 0, MOST, above=True)
    check_range("warmup", options.warmup, 0, MOST)
    check_range("context", options.context, 2, MOST)
    check_range("seed", options.seed, 0, MOST_SEED)
    check_range("lr", options.lr, 0, MOST_RATE, above=True)
    check_range("kl", options.kl, 0, MOST)


def _check_ids(examples: Sequence[Example], vocab_size: int, path: Path) -> None:
    largest = max(max(example.ids) for example in examples)
    if largest >= vocab_size:
        message = "the tokenizer has tokens that the model does not have"
        found, expected = f"token {largest}", f"below {vocab_size}"
        raise InvalidFileError(Problem("token_out_of_range", message, str(path), None, found, expected))


def _check_tokenizer(model: Model, original: Model, path: Path) -> None:
    name = "tokenizer.json"
    if name in original.files and original.files[name].read().tobytes() == model.files[name].read().tobytes():
        return
    message, remedy = "the reference has a different tokenizer, or none", "give the model from which this one was made"
    raise InvalidRequestError(Problem("other_tokenizer", message, str(path), remedy=remedy))


def _recorded(options: TuneOptions, how: TrainingOptions, reference: str | None) -> dict[str, Any]:
    """The options that determine the result, without file names."""
    return {
        **asdict(how),
        "context": options.context,
        "kinds": sorted(options.kinds),
        "device": torch.device(options.device).type,
        "kl": options.kl,
        "reference": reference,
    }
