"""The Python API: a function for each command, with the command's options as keywords.

Importing this module is cheap: each function imports what it needs when it is called. `docs/python.md` is the guide.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias, TypedDict, Unpack

from cluscomp_formats.progress import Progress, silent

if TYPE_CHECKING:
    from cluscomp_export.benchmarking.bench import Speed
    from cluscomp_export.conversion.convert import ConversionReport
    from cluscomp_export.conversion.merge import MergeReport
    from cluscomp_export.conversion.plan_report import PlanReport
    from cluscomp_export.evaluation.evaluate import Evaluation, TaskEvaluation
    from cluscomp_export.inspection.inspect import DeltaInspection, Inspection
    from cluscomp_export.inspection.verify import Verification
    from cluscomp_export.training.finetuning import TunePlan, TuneReport
    from cluscomp_formats.ir import Model

__all__ = [
    "ConversionKeywords",
    "TuneKeywords",
    "bench",
    "convert",
    "evaluate",
    "evaluate_tasks",
    "inspect",
    "inspect_delta",
    "merge",
    "open_source",
    "plan",
    "plan_tuning",
    "tune",
    "verify",
]

StrPath: TypeAlias = str | PathLike[str]
Schedule: TypeAlias = Literal["cosine", "linear", "constant"]
Precision: TypeAlias = Literal["float32", "bfloat16"]


class ConversionKeywords(TypedDict, total=False):
    """The options of `convert` and `plan`. What is left out, or None, has the default of the command line."""

    to: str
    """The format to write: "packed" (the default), "hf", "gguf", "onnx" or a plug-in's."""
    gguf_type: str | None
    """With `to="gguf"`: decode, and store as this type for stock llama.cpp."""
    bits: float | None
    """Most bits per weight of the linear layers, codebooks and scales counted; 4 if no target is given."""
    budget: int | str | None
    """Most bytes of the whole artefact, or a size such as "55MB"."""
    match_loss: float | None
    """The smallest artefact whose predicted divergence from the source is at most this, in nats per token."""
    plan: StrPath | None
    """A plan that `plan` saved, edited or not."""
    dim: int | None
    """Weights per code, as in the paper; needs `clusters`."""
    clusters: int | None
    """Centroids per codebook; needs `dim`."""
    share: Literal["none", "kind", "model"] | None
    """A codebook per matrix, per kind of matrix over all layers, or one for all."""
    embedding_bits: float | None
    """Most bits per weight of embedding and head; 16 keeps them dense."""
    codebook_bits: int | None
    """Bits per value of a codebook: 8 or 16."""
    sensitivity: Literal["measured", "equal"] | None
    """Measure how much predictions suffer from errors in each tensor, or treat all weights alike."""
    optimize: Literal["size", "speed"] | None
    """Ignore the time for a token, or weigh it more than by default."""
    machine: str | None
    """The machine whose time counts, and whose tokens per second are predicted: a profile's name, or "this"."""
    calibration: StrPath | None
    """The calibration text, or "none"."""
    effort: Literal["fast", "balanced", "best"] | None
    """How much work goes into the codes and codebooks."""
    feedback: bool | None
    """Error feedback (True) or the nearest centroid (False)."""
    calibration_windows: int | None
    calibration_context: int | None
    blockwise_epochs: int | None
    """Epochs per block; 0 disables block-wise tuning."""
    blockwise_batch: int | None
    blockwise_lr: float | None
    blockwise_schedule: Schedule | None
    blockwise_same_input: float | None
    blockwise_held_out: float | None
    blockwise_patience: int | None
    blockwise_precision: Precision | None
    recovery_steps: int | None
    """Steps of recovery, which is distillation end to end; 0 disables it."""
    recovery_batch: int | None
    recovery_context: int | None
    recovery_lr: float | None
    recovery_schedule: Schedule | None
    recovery_warmup: int | None
    recovery_checks: int | None
    recovery_patience: int | None
    recovery_precision: Precision | None
    method: Literal["fast", "lloyd"]
    """The k-means variant."""
    seed: int
    threads: int | None
    workers: str | None
    """Cluster with N processes ("4") or threads ("threads:4"), or on Ray ("ray", "ray://host:port")."""
    device: str
    """Where to compute: "cpu", "cuda", "cuda:1", ..."""


class TuneKeywords(TypedDict, total=False):
    """The options of `tune` and `plan_tuning`; give either `text` or `chat`."""

    text: StrPath | None
    """Train on a UTF-8 text, to predict the next token."""
    chat: StrPath | None
    """Train on chats, a JSON object per line, to predict what the assistant says."""
    steps: int | None
    epochs: float | None
    """Epochs over the data, 1 by default; not with `steps`."""
    batch: int
    context: int
    lr: float
    """Learning rate, relative to the magnitude of each tensor."""
    schedule: Schedule
    warmup: int
    held_out: float | StrPath
    """Share of the data, or a file, that is not trained on and decides which state is kept."""
    checks: int
    patience: int
    train: Sequence[str]
    """What to train: some of "codebooks", "scales" and "norms"."""
    reference: StrPath | None
    """The original model, to stay close to; needs `kl`."""
    kl: float
    """Weight of the divergence from `reference` in the loss."""
    precision: Precision
    seed: int
    device: str


def convert(
    source: StrPath,
    output: StrPath,
    *,
    force: bool = False,
    on_progress: Progress = silent,
    on_warning: Callable[[str], None] = lambda text: None,
    **options: Unpack[ConversionKeywords],
) -> ConversionReport:
    """Compress `source` and write it to `output`; repack it without loss if it is a codebook model already.

    `output` is complete or absent, and `source` is never changed. A conversion that fails or is interrupted keeps its finished
    work in a folder next to `output`; the same call resumes it and produces the same bytes. `force` replaces an output that
    exists. `on_warning` is called with each warning as soon as it is known; the report has them all.

    Raises InvalidRequestError for options that contradict each other or cannot be met, InvalidFileError, UnsupportedError,
    OutputExistsError, StorageError, SelfTestError, WorkersLostError.
    """
    from cluscomp_export.conversion.convert import convert as run
    from cluscomp_export.conversion.options import ConversionOptions

    chosen = ConversionOptions(**options)
    return run(Path(source), Path(output), chosen, force=force, on_progress=on_progress, on_warning=on_warning)


def plan(
    source: StrPath,
    *,
    save: StrPath | None = None,
    force: bool = False,
    on_progress: Progress = silent,
    **options: Unpack[ConversionKeywords],
) -> PlanReport:
    """Say how `source` would be stored, the size of the artefact and the memory that converting needs; convert nothing.

    `save` writes the plan as JSON, for `convert(..., plan=...)`; `force` replaces a file that exists. Unless sensitivities are
    measured, a folder that holds a `config.json` is enough as `source`. Raises what `convert` does before its work.
    """
    from cluscomp_export.conversion.options import ConversionOptions
    from cluscomp_export.conversion.plan_report import explain
    from cluscomp_export.conversion.prepare import prepare
    from cluscomp_export.outputs import check_apart
    from cluscomp_export.planning.plan_file import write_plan
    from cluscomp_formats.errors import InvalidRequestError, Problem
    from cluscomp_formats.files.atomic import check_output

    chosen, file = ConversionOptions(**options), _path(save)
    if file is not None:
        check_apart([file], [Path(source), *chosen.files()])
        check_output(file, force=force)
    prepared = prepare(Path(source), chosen, on_progress, to_plan=True)
    if file is not None:
        if prepared.plan is None:
            message, remedy = "there is no plan to save: the source is clustered already", "leave out `save`"
            raise InvalidRequestError(Problem("already_clustered", message, str(source), remedy=remedy))
        write_plan(prepared.plan, file, force=force)
    return explain(prepared)


def inspect(
    model: StrPath, *, reference: StrPath | None = None, quick: bool = False, on_progress: Progress = silent
) -> Inspection:
    """Describe a model of any format; `docs/inspect.md` describes every member of the report.

    `reference` is the original, and adds the error of each tensor. `quick` reads shapes only. A model with invalid contents
    gets a report that lists all problems; only what cannot be opened raises InvalidFileError. Raises UnsupportedError,
    StorageError, InvalidRequestError.
    """
    from cluscomp_export.inspection.inspect import inspect_model

    return inspect_model(Path(model), reference=_path(reference), quick=quick, on_progress=on_progress)


def inspect_delta(delta: StrPath, *, reference: StrPath | None = None) -> DeltaInspection:
    """Describe a delta; `reference` is the model it belongs to, and adds how far the new values are from the old ones.

    Raises InvalidFileError, also if `reference` is another model, StorageError.
    """
    from cluscomp_export.inspection.inspect import inspect_delta as run

    return run(Path(delta), reference=_path(reference))


def verify(
    a: StrPath, b: StrPath, *, delta: StrPath | None = None, device: str = "cpu", on_progress: Progress = silent
) -> Verification:
    """Check that two models are the same, or that one was made from the other; `docs/verify.md` has the rules.

    `delta` is applied to `b` first. Raises ClusCompError if one of them cannot be read.
    """
    from cluscomp_export.inspection.verify import verify as run

    return run(Path(a), Path(b), delta=_path(delta), device=device, on_progress=on_progress)


def evaluate(
    model: StrPath,
    text: StrPath,
    *,
    reference: StrPath | None = None,
    protocol: Literal["llama.cpp", "gptq"] = "llama.cpp",
    windows: int | None = None,
    delta: StrPath | None = None,
    context: int | None = None,
    stride: int | None = None,
    join: Literal["rows", "none"] | None = None,
    device: str = "cpu",
    dtype: str | None = None,
    threads: int | None = None,
    on_progress: Progress = silent,
) -> Evaluation:
    """Measure how well `model` predicts a UTF-8 text and, with `reference`, how far it is from the original.

    `docs/evaluation.md` defines the protocols and figures. The report's `record` holds what is needed to repeat it. Raises
    InvalidRequestError, InvalidFileError, UnsupportedError.
    """
    from cluscomp_export.evaluation.evaluate import evaluate_files
    from cluscomp_export.threads import torch_threads

    with torch_threads(threads):
        return evaluate_files(
            Path(model),
            text=Path(text),
            reference=_path(reference),
            protocol=protocol,
            windows=windows,
            delta=_path(delta),
            context=context,
            stride=stride,
            join=join,
            device=device,
            dtype=dtype,
            on_progress=on_progress,
        )


def evaluate_tasks(
    model: StrPath,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
    device: str = "cpu",
    dtype: str | None = None,
    threads: int | None = None,
) -> TaskEvaluation:
    """Run tasks of lm-evaluation-harness, names or YAML files, on `model`; needs the extra `lm-eval`.

    `limit` is the most examples of each task. Nothing is downloaded unless `HF_HUB_OFFLINE=0` is in the environment. Raises
    InvalidRequestError for unknown tasks, InvalidFileError, UnsupportedError, also if the harness is not installed.
    """
    from cluscomp_export.evaluation.harness import evaluate_tasks as run
    from cluscomp_export.threads import torch_threads

    with torch_threads(threads):
        return run(Path(model), tasks, limit=limit, num_fewshot=num_fewshot, device=device, dtype=dtype)


def bench(
    model: StrPath,
    *,
    against: Sequence[StrPath] = (),
    threads: Sequence[int] | None = None,
    prompt_tokens: int | None = None,
    new_tokens: int | None = None,
    repetitions: int = 5,
    on_progress: Progress = silent,
    on_warning: Callable[[str], None] = lambda text: None,
) -> list[Speed]:
    """Measure how fast `model` runs on this machine, and its memory; `docs/bench.md` defines the figures.

    The models in `against` are measured in turn with it, and their speeds also given as ratios to it. `threads` are the numbers
    of threads to measure, by default 1 and all cores. The result has one row for each model and number of threads. Each
    measurement runs in a new process, so what this one has imported does not matter.

    Raises SelfTestError if a model fails its self-test, InvalidRequestError, InvalidFileError, UnsupportedError, and
    WorkersLostError if a process that measures dies.
    """
    from cluscomp_export.benchmarking.bench import bench as run

    return run(
        [Path(model), *map(Path, against)],
        threads=threads,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        repetitions=repetitions,
        on_progress=on_progress,
        on_warning=on_warning,
    )


def tune(
    model: StrPath,
    delta: StrPath,
    *,
    force: bool = False,
    on_progress: Progress = silent,
    **options: Unpack[TuneKeywords],
) -> TuneReport:
    """Train the codebooks, row scales and norms of a codebook model on a text or on chats; write what changed to `delta`.

    `model` is never changed. An interrupted training keeps its state in a folder next to `delta`; the same call resumes it.
    Raises InvalidRequestError, InvalidFileError, UnsupportedError, OutputExistsError, StorageError.
    """
    from cluscomp_export.training.finetuning import TuneOptions
    from cluscomp_export.training.finetuning import tune as run

    return run(Path(model), Path(delta), TuneOptions(**options), force=force, on_progress=on_progress)


def plan_tuning(model: StrPath, **options: Unpack[TuneKeywords]) -> TunePlan:
    """Say what `tune` with these options would train, for how many steps, and the size of the delta; train nothing.

    Raises what `tune` does.
    """
    from cluscomp_export.training.finetuning import TuneOptions
    from cluscomp_export.training.finetuning import plan_tuning as run

    return run(Path(model), TuneOptions(**options))


def merge(
    model: StrPath,
    deltas: Sequence[StrPath],
    output: StrPath,
    *,
    to: str = "packed",
    gguf_type: str | None = None,
    weights: Sequence[float] | None = None,
    force: bool = False,
    on_progress: Progress = silent,
) -> MergeReport:
    """Apply deltas to their model and write the result, in any format.

    Of several deltas, the weighted differences from the model are added; `weights` has a number for each, equal shares by
    default. Raises InvalidFileError, also for a delta of another model, InvalidRequestError, UnsupportedError,
    OutputExistsError, StorageError.
    """
    from cluscomp_export.conversion.merge import merge as run

    return run(
        Path(model),
        [Path(delta) for delta in deltas],
        Path(output),
        to=to,
        gguf_type=gguf_type,
        weights=weights,
        force=force,
        on_progress=on_progress,
    )


def open_source(path: StrPath, *, delta: StrPath | None = None) -> Model:
    """Open whatever `convert` reads, lazily: shapes and dtypes cost no IO, values are read one tensor at a time.

    `delta` is applied. Raises InvalidFileError with every problem found, UnsupportedError, StorageError.
    """
    from cluscomp_export.sources import open_source as run

    return run(Path(path), _path(delta))


def _path(path: StrPath | None) -> Path | None:
    return None if path is None else Path(path)
