"""Finetuning: a clustered model's codebooks, row scales and norms trained on a text or on chats, kept as a delta.

The downstream level of ClusComp (Liao et al., arXiv 2503.13089): codes stay, so that the result is small and goes with the
model in any format. Memory: codes at 16 bits, embedding and head in the precision of the activations, the activations between
blocks, one window's logits a few times, four float32 copies of what is trained; with a reference, also that as float32.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from shlex import quote
from typing import Any

import torch

from cluscomp_export.outputs import check_apart
from cluscomp_export.progress import Progress, silent
from cluscomp_export.ranges import MOST, MOST_RATE, MOST_SEED, check_range
from cluscomp_export.sources import open_source, source_bytes
from cluscomp_export.training.data import TuningData, read_data
from cluscomp_export.training.examples import Example, make_batch, shuffled_batches
from cluscomp_export.training.loop import Training, TrainingOptions
from cluscomp_export.training.losses import PredictionLoss
from cluscomp_export.training.parameters import TrainableModel
from cluscomp_export.work_folder import fingerprint, work_folder
from cluscomp_formats.delta import Delta, changes, write_delta
from cluscomp_formats.errors import InvalidFileError, InvalidRequestError, Problem
from cluscomp_formats.files.atomic import check_output
from cluscomp_formats.ir import DTYPES, Model
from cluscomp_formats.parameters import KINDS, kind_of
from cluscomp_formats.sections.digest import check_claim
from cluscomp_formats.tokens import no_tokenizer
from cluscomp_formats.version import __version__
from cluscomp_runtime.language_model import LanguageModel, check_device
from cluscomp_runtime.memory import memory_faults
from cluscomp_runtime.tokenizer import Tokenizer

__all__ = ["TuneOptions", "TunePlan", "TuneReport", "checked_digest", "plan_tuning", "tune"]

HELD_OUT_BATCH = 4

_MEMORY_REMEDY = "run it again with a smaller --batch or --context, or with more memory free: what is finished has been kept"


@dataclass(frozen=True)
class TuneOptions:
    """What to train on, and how.

    `data` is a text or, with `chat`, a file of chats (`chats.py`). Without `training`, or with 0 steps in it, there are as many
    as `epochs` times over the examples take. `held_out` is a share of the examples, above 0 and below 1, or another file of the
    same kind. `kinds` of parameters are trained, those of `cluscomp_formats.parameters`. With `reference`, the original model,
    `kl` times the divergence from it is added to the loss.
    """

    data: Path
    chat: bool = False
    epochs: float = 1.0
    context: int = 512
    held_out: float | Path = 0.1
    kinds: tuple[str, ...] = KINDS
    reference: Path | None = None
    kl: float = 0.0
    device: str = "cpu"
    training: TrainingOptions = field(default_factory=lambda: TrainingOptions(steps=0))


@dataclass(frozen=True)
class TunePlan:
    """A finetuning before any training: `steps`, examples and the predictions among them that count, the size of the delta."""

    steps: int
    examples: int
    predictions: int
    held_out_examples: int
    parameters: Mapping[str, int]
    """Values to train by kind."""
    delta_bytes: int
    model_bytes: int
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class TuneReport:
    """What `tune` did: the delta, digests of the model and of the model with it, the curve of `Trained`.

    `held_out` is the loss on held-out examples before and after, in nats per token. `resumed_at` is the step that an
    interrupted attempt had reached, 0 if there was none.
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
    """Read model and data and check the options; what `--dry-run` shows. Raises what `tune` does."""
    return _prepare(model_path, options).plan


@memory_faults(_MEMORY_REMEDY)
def tune(
    model_path: Path, output: Path, options: TuneOptions, *, force: bool = False, on_progress: Progress = silent
) -> TuneReport:
    """Train and write the delta; the model is not touched.

    An interrupted training goes on from its last checkpoint, kept in a folder beside the output (`work_path`), when the same
    call is made again, and ends with the same bytes on the same machine and number of threads. Raises InvalidRequestError for
    options that do not fit, InvalidFileError for a damaged model, bad lines in a file of chats or other data that cannot be
    used, UnsupportedError, OutputExistsError, StorageError.
    """
    started = time.perf_counter()
    other_data = options.held_out if isinstance(options.held_out, Path) else None
    check_apart([output], [model_path, options.data, other_data, options.reference])
    check_output(output, force=force)
    prepared = _prepare(model_path, options)
    plan, trainable = prepared.plan, prepared.trainable
    warnings = list(plan.warnings)
    base = checked_digest(prepared.model, model_path, on_progress)
    teacher, reference = None, None
    if options.reference is not None:
        original = open_source(options.reference)
        _check_tokenizer(prepared.model, original, options.reference)
        reference = checked_digest(original, options.reference, on_progress)
        teacher = LanguageModel.from_model(original, kernel="dense", dtype="float32", device=options.device).decoder
    how = replace(options.training, steps=plan.steps)
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
    held_out = [entry["held_out"] for entry in result.curve]
    if not arrays:
        warnings.append("nothing lowered the loss on held-out examples: the delta is empty; try a smaller rate or more steps")
    return TuneReport(
        output=str(output),
        file_bytes=file_bytes,
        share_of_model=file_bytes / plan.model_bytes,
        base=base,
        result=delta.result,
        steps=int(result.curve[-1]["step"]),
        examples=plan.examples,
        predictions=plan.predictions,
        held_out=(held_out[0], min(held_out)),
        curve=result.curve,
        stopped=result.stopped,
        changed=dict(Counter(kind_of(name) for name in arrays)),
        resumed_at=training.resumed_at,
        seconds=time.perf_counter() - started,
        warnings=tuple(warnings),
    )


def checked_digest(model: Model, path: Path, on_progress: Progress = silent) -> str:
    """The model's digest, computed. Raises InvalidFileError if its file claims another."""
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
        options.held_out,
        model,
        tokenizer,
        chat=options.chat,
        context=options.context,
        seed=options.training.seed,
    )
    trainable = TrainableModel(model, options.kinds, device=check_device(options.device))
    longest = trainable.decoder.description.max_position_embeddings
    if options.context > longest:
        found, expected = str(options.context), f"at most {longest} (max_position_embeddings)"
        raise InvalidRequestError(Problem("out_of_range", "--context is too long", None, None, found, expected))
    _check_ids([*data.kept, *data.held_out], trainable.decoder.description.vocab_size, options.data)
    counts: Counter[str] = Counter()
    for name, values in trainable.parameters.items():
        counts[kind_of(name)] += values.numel()
    plan = TunePlan(
        steps=options.training.steps or max(1, math.ceil(options.epochs * len(data.kept) / options.training.batch)),
        examples=len(data.kept),
        predictions=sum(sum(example.scored) for example in data.kept),
        held_out_examples=len(data.held_out),
        parameters=dict(counts),
        delta_bytes=sum(math.prod(shape) * DTYPES[dtype].itemsize for dtype, shape in trainable.forms().values()),
        model_bytes=source_bytes(model_path),
        warnings=data.warnings,
    )
    return _Prepared(model, trainable, data, plan)


def _check_options(options: TuneOptions) -> None:
    training = options.training
    problem = None
    if (options.reference is None) != (options.kl == 0):
        problem = Problem("bad_option", "--reference and --kl go together")
    elif not isinstance(options.held_out, Path) and not 0 < options.held_out < 1:
        found, expected = f"{options.held_out:g}", "above 0 and below 1, or a file"
        problem = Problem("bad_option", "--held-out is out of range", found=found, expected=expected)
    elif not set(options.kinds) <= set(KINDS) or not options.kinds:
        found, expected = ", ".join(options.kinds), ", ".join(KINDS)
        problem = Problem("bad_option", "no such kind of parameters", found=found, expected=expected)
    elif options.context < 2 or min(training.batch, training.checks, training.patience) < 1 or not options.epochs > 0:
        problem = Problem("bad_option", "--context is at least 2; --batch, --checks, --patience and --epochs are positive")
    elif min(training.steps, training.warmup, training.seed) < 0:
        problem = Problem("bad_option", "--steps, --warmup and --seed are not negative")
    elif not (0 < (training.rate or 0) < math.inf and 0 <= options.kl < math.inf):
        problem = Problem("bad_option", "--lr is positive, and --kl is not negative")
    if problem:
        raise InvalidRequestError(problem)
    for option in ("steps", "batch", "warmup", "checks", "patience"):
        check_range(f"--{option}", getattr(training, option), 0, MOST)
    check_range("--context", options.context, 2, MOST)
    check_range("--epochs", options.epochs, 0, MOST)
    check_range("--seed", training.seed, 0, MOST_SEED)
    check_range("--lr", training.rate or 0, 0, MOST_RATE)
    check_range("--kl", options.kl, 0, MOST)


def _check_ids(examples: Sequence[Example], vocab_size: int, path: Path) -> None:
    largest = max(max(example.ids) for example in examples)
    if largest >= vocab_size:
        message = "the tokenizer has tokens that the model does not"
        found, expected = f"token {largest}", f"below {vocab_size}"
        raise InvalidFileError(Problem("token_out_of_range", message, str(path), None, found, expected))


def _check_tokenizer(model: Model, original: Model, path: Path) -> None:
    name = "tokenizer.json"
    if name in original.files and original.files[name].read().tobytes() == model.files[name].read().tobytes():
        return
    message, remedy = "the reference has another tokenizer, or none", "give the model that this one was made from"
    raise InvalidRequestError(Problem("other_tokenizer", message, str(path), remedy=remedy))


def _recorded(options: TuneOptions, how: TrainingOptions, reference: str | None) -> dict[str, Any]:
    """The options that determine the result, without the names of files."""
    return {
        **asdict(how),
        "context": options.context,
        "kinds": sorted(options.kinds),
        "device": torch.device(options.device).type,
        "kl": options.kl,
        "reference": reference,
    }
