"""From a source to an artefact: plan, check the source, cluster while writing, self-test, rename.

What a clustering has finished is kept beside the output until that is there: see `work_folder`.
"""

from __future__ import annotations

import contextlib
import itertools
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from cluscomp_export.calibration import (
    MAX_FEEDBACK_WINDOWS,
    calibration_tokens,
    calibration_windows,
    channel_energies,
    read_text,
    shipped_text,
)
from cluscomp_export.clustering import Method, cluster_model, work_bytes
from cluscomp_export.error_feedback import ErrorFeedback
from cluscomp_export.planning import Plan, Sensitivity, Share
from cluscomp_export.preparing import check_targets, make_plan, provenance_of, sensitivities_of
from cluscomp_export.progress import Progress, silent
from cluscomp_export.sizes import Sizes, model_sizes
from cluscomp_export.sources import open_source, source_bytes
from cluscomp_export.tuning import RecoveryOptions, TrainableModel, recover
from cluscomp_export.work_folder import WorkFolder, fingerprint, remove_work, work_folder, work_path
from cluscomp_export.writers import Writer, find_writer
from cluscomp_formats.errors import (
    ClusCompError,
    InvalidFileError,
    InvalidRequestError,
    OutputExistsError,
    Problem,
    StorageError,
    UnsupportedError,
)
from cluscomp_formats.ir import FLOAT_DTYPES, AnyArray, Array, Model
from cluscomp_formats.packed.payloads import is_finite
from cluscomp_formats.packed.writer import NO_DIGEST
from cluscomp_runtime.language_model import check_device
from cluscomp_runtime.selftest import longest_record, make_self_test

__all__ = ["ConversionOptions", "ConversionReport", "Prepared", "convert", "prepare", "scan_source"]

Effort = Literal["fast", "balanced", "best"]


@dataclass(frozen=True)
class ConversionOptions:
    """What to make of the source.

    One of `bits` (a budget per weight of the linear layers, codebooks and scales counted), `cluster_dim` with `num_clusters`
    (the paper's setting, the same for every matrix), `budget` (bytes of the whole artefact), `match_loss` (the divergence from
    the source, nats per token, as predicted) and `plan` (a file); none means 4 bits. `share=None` lets the planner choose.
    `sensitivity` says whether the planner measures how much every tensor matters, or takes all weights for equal; None
    measures where there is a calibration text and the runtime knows the architecture.
    `embedding_bits` is a budget per weight of embedding and head; 16 keeps them dense, None keeps the width of the source
    where that is below 16. `calibration` is a text file whose activations weight the clustering, "none", or None: the text the
    package ships with `bits`, none with the paper's setting. `effort="fast"` only clusters; "balanced", the default where there
    is a calibration text, also chooses codes with error feedback; "best" then trains codebooks, scales and norms on the text.
    `gguf_type` decodes for stock llama.cpp. `threads` and `device` do not change the result, except that of a training.
    """

    bits: float | None = None
    budget: int | None = None
    match_loss: float | None = None
    plan: Path | None = None
    sensitivity: Literal["measured", "equal"] | None = None
    cluster_dim: int | None = None
    num_clusters: int | None = None
    share: Share | None = None
    embedding_bits: float | None = None
    calibration: str | None = None
    effort: Effort | None = None
    method: Method = "fast"
    seed: int = 0
    to: str = "packed"
    gguf_type: str | None = None
    threads: int | None = None
    device: str = "cpu"

    @property
    def asks_clustering(self) -> bool:
        """Whether any option says how to cluster."""
        how = (*self.targets().values(), self.cluster_dim, self.num_clusters, self.share, self.embedding_bits)
        given = (*how, self.sensitivity, self.calibration, self.effort)
        return any(value is not None for value in given)

    @property
    def allocates(self) -> bool:
        """Whether the planner chooses the sizes of codebooks."""
        return self.cluster_dim is None and self.plan is None

    def targets(self) -> dict[str, Any]:
        """What can be asked for, by option."""
        return {"--bits": self.bits, "--budget": self.budget, "--match-loss": self.match_loss, "--plan": self.plan}

    def calibration_text(self) -> str | None:
        """The text to calibrate on, if any. Raises InvalidFileError."""
        bare = self.cluster_dim is not None and self.effort in (None, "fast")
        if self.calibration == "none" or (self.calibration is None and bare):
            return None
        return shipped_text() if self.calibration is None else read_text(Path(self.calibration))

    def recorded(self) -> dict[str, Any]:
        """The options that determine the result, for the provenance."""
        unrecorded = ("threads", "device", "plan", *(() if self.budget is not None else ("to",)))
        return {key: value for key, value in asdict(self).items() if value is not None and key not in unrecorded}


@dataclass(frozen=True)
class Prepared:
    """A conversion that has been planned: `model` tells sizes, `plan` is None when a clustered source is only repacked.

    `file_bytes` is the size of the artefact, at most; None where the format cannot tell. `sensitivities` are what the plan was
    made with, None if every weight counted alike.
    """

    source: Model
    plan: Plan | None
    model: Model
    sizes: Sizes
    file_bytes: int | None
    source_file_bytes: int
    sensitivities: Mapping[str, Sensitivity] | None
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class ConversionReport:
    """What `convert` did.

    `recovery` is the record of a recovery training, if this call did one: its loss `curve` and why it `stopped` early. `reused`
    counts the units of work (codebooks, tensors) that an interrupted attempt had finished.
    """

    output: str
    file_bytes: int
    source_file_bytes: int
    digest: str | None
    bits_per_weight: Mapping[str, float]
    self_test: bool
    recovery: Mapping[str, Any] | None
    reused: int
    seconds: float
    warnings: tuple[str, ...]


def prepare(source_path: Path, options: ConversionOptions, on_progress: Progress = silent, *, measure: bool = True) -> Prepared:
    """Open, measure what the plan needs, and plan. What `--dry-run` shows.

    Without `measure` only shapes are read, and every weight counts alike. Raises InvalidRequestError for options that
    contradict each other or a budget that cannot be met, InvalidFileError, UnsupportedError.
    """
    writer = find_writer(options.to, options.gguf_type)
    _check_options(options, writer)
    source = open_source(source_path)
    plan = sensitivities = None
    warnings: list[str] = []
    if source.clustered:
        if options.asks_clustering:
            remedy = "convert the original model instead, or drop the clustering options to repack it as it is"
            raise InvalidRequestError(
                Problem("already_clustered", "the source is clustered already", str(source_path), remedy=remedy)
            )
        model = source
    else:
        text = options.calibration_text()
        provenance = provenance_of(source, options, text, NO_DIGEST)
        if measure:
            sensitivities = sensitivities_of(source, options, text, None, warnings, on_progress)
        plan = make_plan(source, options, writer, provenance, sensitivities)
        model = cluster_model(source, plan, provenance=provenance)
    sizes = model_sizes(model)
    artefact = None if writer.size is None else writer.size(replace(model, self_test=model.self_test or longest_record(source)))
    in_file = source_bytes(source_path)
    warnings += _warnings(source, sizes, in_file)
    return Prepared(source, plan, model, sizes, artefact, in_file, sensitivities, tuple(warnings))


def convert(
    source_path: Path,
    output: Path,
    options: ConversionOptions,
    *,
    force: bool = False,
    on_progress: Progress = silent,
) -> ConversionReport:
    """Convert and write. The output is complete or not there, and the source is never touched.

    A clustering that fails or is interrupted, by whatever, leaves what it has finished in a folder beside the output
    (`work_path`); the same call goes on from there, and ends with the same bytes. Raises what `prepare` does,
    OutputExistsError, StorageError, SelfTestError.
    """
    started = time.perf_counter()
    writer = find_writer(options.to, options.gguf_type)
    try:
        writer.check(output, force=force)
    except OutputExistsError:
        _remove_finished_work(output)
        raise
    if output.exists() and output.resolve() == source_path.resolve():
        raise InvalidRequestError(
            Problem("output_is_source", "the output is the source itself", str(output), remedy="name another output")
        )
    # Tells early what cannot be done; the plan that counts is made when the source has been checked and measured.
    prepared = prepare(source_path, options, measure=False)
    writer.check_model(prepared.model)
    warnings = list(prepared.warnings)
    model = prepared.model
    record: Mapping[str, Any] | None = None
    recovery: Mapping[str, Any] | None = None

    def self_test(written: Model) -> Mapping[str, Any] | None:
        nonlocal record
        record = model.self_test or _self_test(written, warnings, on_progress)
        return record

    with contextlib.ExitStack() as unfinished:
        work = unfinished.enter_context(work_folder(output)) if prepared.plan is not None else None
        _check_space(output, prepared, work)
        if prepared.plan is not None and work is not None:
            model, recovery = _clustered(prepared, source_path, options, writer, work, warnings, on_progress)
        written = writer.write(
            model,
            output,
            force=force,
            self_test=self_test,
            on_progress=lambda done, total: on_progress("writing", done, total),
        )
    return ConversionReport(
        output=str(output),
        file_bytes=written.file_bytes,
        source_file_bytes=prepared.source_file_bytes,
        digest=written.digest,
        bits_per_weight=model_sizes(model).bits_per_weight(),
        self_test=record is not None,
        recovery=recovery,
        reused=work.reused if work is not None else 0,
        seconds=time.perf_counter() - started,
        warnings=tuple(warnings),
    )


def _clustered(
    prepared: Prepared,
    source_path: Path,
    options: ConversionOptions,
    writer: Writer,
    work: WorkFolder,
    warnings: list[str],
    on_progress: Progress,
) -> tuple[Model, Mapping[str, Any] | None]:
    """The model to write, with its provenance (what it was made from, and how), and the record of its training, if any."""
    source, text = prepared.source, options.calibration_text()
    provenance = provenance_of(source, options, text, scan_source(source, source_path, on_progress))
    recorded = provenance["options"]
    effort = recorded["effort"]
    kept, deleted = work.begin(fingerprint(provenance))
    if kept:
        on_progress(f"resuming with {kept} finished parts", kept, kept)
    if deleted:
        warnings.append("the unfinished work of a conversion of another source or with other options was discarded")
    plan = prepared.plan
    sensitivities = sensitivities_of(source, options, text, work, warnings, on_progress)
    if sensitivities is not None or plan is None:
        plan = make_plan(source, options, writer, provenance, sensitivities)
    energies = feedback = None
    if text is not None:
        try:
            energies = _energies(source, text, work, on_progress)
            if effort != "fast":
                feedback = ErrorFeedback(source, calibration_windows(source, text, MAX_FEEDBACK_WINDOWS), on_progress)
        except (InvalidRequestError, UnsupportedError) as error:
            if options.calibration is not None:
                raise
            del recorded["calibration"]
            recorded["effort"] = "fast"
            what = "calibration" if effort == "fast" else "calibration and error feedback"
            warnings.append(f"clustered without {what}: {error.problems[0].message}")
    model = cluster_model(
        source,
        plan,
        method=options.method,
        seed=options.seed,
        threads=options.threads,
        device=options.device,
        energies=energies,
        feedback=feedback,
        provenance=provenance,
        work=work,
        on_progress=on_progress,
    )
    if effort == "best" and feedback is not None and text is not None:
        return _recovered(model, source, text, options, work, on_progress)
    return model, None


def _recovered(
    model: Model, source: Model, text: str, options: ConversionOptions, work: WorkFolder, on_progress: Progress
) -> tuple[Model, Mapping[str, Any] | None]:
    """The model after recovery training and how that went; unless an earlier attempt has done it."""
    trainable = TrainableModel(model)
    values = work.load("recovery", trainable.forms())
    if values is not None:
        return trainable.with_values(values), None
    token_ids = calibration_tokens(source, text)
    result = recover(trainable, source, token_ids, RecoveryOptions(seed=options.seed), on_progress)
    work.save("recovery", result.values)
    return result.model, result.record()


def _energies(source: Model, text: str, work: WorkFolder, on_progress: Progress) -> Mapping[str, AnyArray]:
    """`channel_energies`, computed unless an earlier attempt has done so."""
    matrices = {name: tensor.shape for name, tensor in source.tensors.items() if len(tensor.shape) == 2}
    found = work.load("energies", {name: ("float32", (shape[1],)) for name, shape in matrices.items()})
    if found is not None:
        return found
    energies = channel_energies(source, text, on_progress)
    work.save("energies", energies)
    return energies


def _remove_finished_work(output: Path) -> None:
    """Remove the work folder of the conversion that made `output`, if it was killed after that and before it could."""
    if work_path(output).is_dir():
        with contextlib.suppress(ClusCompError):
            remove_work(output, fingerprint(open_source(output).provenance))


def scan_source(source: Model, path: Path, on_progress: Progress = silent) -> str:
    """Read the whole source once, before the long work: its digest, and that every value is finite.

    Raises InvalidFileError with one problem per tensor that holds NaN or infinity.
    """
    problems: list[Problem] = []
    total = sum(1 for _ in source.payloads())
    done = itertools.count(1)

    def check(description: Mapping[str, Any], array: Array, values: AnyArray) -> None:
        on_progress("checking the source", next(done), total)
        position = _first_not_finite(array, values)
        if position is not None:
            name = str(description.get("tensor") or description.get("codebook"))
            found, expected = f"NaN or infinity at {list(position)}", "finite values"
            remedy = "the source is damaged or its training diverged; get a sound copy"
            problems.append(Problem("not_finite", "a value is not finite", str(path), name, found, expected, remedy))

    digest = source.digest(check)
    if problems:
        raise InvalidFileError(problems)
    return digest


def _first_not_finite(array: Array, values: AnyArray) -> tuple[int, ...] | None:
    if array.dtype not in FLOAT_DTYPES:
        return None
    finite = is_finite(values, array.dtype)
    if finite.all():
        return None
    return tuple(int(index) for index in np.unravel_index(int(np.argmin(finite)), values.shape))


def _check_options(options: ConversionOptions, writer: Writer) -> None:
    check_targets(options, writer)
    problem = None
    if (options.cluster_dim is None) != (options.num_clusters is None):
        problem = Problem("bad_option", "--dim and --clusters go together", remedy="give both, or --bits")
    elif options.bits is not None and not 0 < options.bits <= 16:
        problem = Problem("bad_option", "--bits is out of range", found=f"{options.bits:g}", expected="more than 0, at most 16")
    elif options.embedding_bits is not None and not 0 < options.embedding_bits <= 16:
        problem = Problem(
            "bad_option",
            "--embedding-bits is out of range",
            found=f"{options.embedding_bits:g}",
            expected="more than 0, at most 16",
        )
    elif options.effort not in (None, "fast") and options.calibration == "none":
        found, remedy = f"--effort {options.effort} --calibration none", "give a text, or --effort fast"
        problem = Problem("bad_option", "error feedback needs a calibration text", found=found, remedy=remedy)
    if problem:
        raise InvalidRequestError(problem)
    check_device(options.device)


def _warnings(source: Model, sizes: Sizes, source_file_bytes: int) -> list[str]:
    warnings = []
    if "tokenizer.json" not in source.files:
        warnings.append("the source has no tokenizer.json; the artefact will take and give token ids only")
    if sizes.payload_bytes > source_file_bytes:
        dense = (
            "; --embedding-bits 8 or 4 clusters the embedding and the head" if sizes.all_bits > 2 * sizes.linear_bits else ""
        )
        warnings.append(
            f"the artefact ({sizes.payload_bytes / 1e6:.1f} MB) will be larger than the source "
            f"({source_file_bytes / 1e6:.1f} MB): ask for fewer --bits{dense}"
        )
    return warnings


def _check_space(output: Path, prepared: Prepared, work: WorkFolder | None) -> None:
    """Refuse early what would run out of space at the end: the artefact and, until it is there, the unfinished work."""
    needed = prepared.sizes.payload_bytes
    if work is not None:
        needed += max(0, work_bytes(prepared.model) - work.stored_bytes())
    free = shutil.disk_usage(output.parent).free
    if free < needed:
        found, expected = f"{free / 1e6:.1f} MB free", f"{needed / 1e6:.1f} MB for the artefact and the work on it"
        raise StorageError(
            Problem("no_space", "not enough space", str(output), None, found, expected, "free some, or write elsewhere")
        )


def _self_test(written: Model, warnings: list[str], on_progress: Progress) -> Mapping[str, Any] | None:
    """The self-test record of the model just written, or None where the runtime cannot run its architecture."""
    on_progress("recording the self-test", 0, 1)
    try:
        record = make_self_test(written)
    except UnsupportedError as error:
        warnings.append(f"no self-test record: {error.problems[0].message}")
        return None
    on_progress("recording the self-test", 1, 1)
    return record
