"""From a source to an artefact: plan, check the source, cluster while writing, self-test, rename.

What a clustering has finished is kept beside the output until that is there: see `work_folder`.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cluscomp_export.calibration import (
    calibration_tokens,
    calibration_windows,
    channel_energies,
    most_windows,
    read_text,
    shipped_text,
)
from cluscomp_export.clustering import cluster_model
from cluscomp_export.effort import Effort, Levels, levels_of
from cluscomp_export.error_feedback import ErrorFeedback
from cluscomp_export.jobs import Computing, Method
from cluscomp_export.memory_model import Peak, conversion_memory, memory_warnings
from cluscomp_export.planning import CODEBOOK_DTYPES, Plan, Share, embedding_tensors, plan_bits, plan_fixed
from cluscomp_export.progress import Progress, silent
from cluscomp_export.sizes import Sizes, model_sizes
from cluscomp_export.sources import CONFIG_ONLY, open_source, source_bytes
from cluscomp_export.tuning import RecoveryOptions, TrainableModel, recover
from cluscomp_export.tuning.training import Curve, curve_array, curve_entries, finite_curve
from cluscomp_export.work_folder import WorkFolder, fingerprint, remove_work, work_folder, work_path
from cluscomp_export.workers import Workers, open_workers, parse_workers
from cluscomp_export.writers import find_writer
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
from cluscomp_formats.version import __version__
from cluscomp_runtime.language_model import check_device

__all__ = ["ConversionOptions", "ConversionReport", "Prepared", "convert", "prepare", "record_self_test", "scan_source"]

DEFAULT_BITS = 4.0


@dataclass(frozen=True)
class ConversionOptions:
    """What to make of the source.

    Either `bits` (a budget per weight of the linear layers, codebooks and scales counted) or `cluster_dim` and `num_clusters`
    (the paper's setting, the same for every matrix); neither means 4 bits. `share=None` lets the planner choose.
    `embedding_bits` is a budget per weight of embedding and head; 16 keeps them dense, None keeps the width of the source
    where that is below 16. `codebook_bits` is 8 or 16 per value of a codebook whose weights have row scales, None for whichever
    is expected to be best. `calibration` is a text file whose activations weight the clustering, "none", or None: the text the
    package ships with `bits`, none with the paper's setting. `effort="fast"` only clusters; "balanced", the default where there
    is a calibration text, also chooses codes with error feedback and tunes block by block; "best" then trains codebooks, scales
    and norms end to end. `feedback`, `calibration_windows`, `blockwise` and `recovery` change the effort: see `levels_of`.
    `gguf_type` decodes for stock llama.cpp. `workers`, what `parse_workers` takes, cluster in parallel, else this process
    does. `workers`, `threads` (of each worker) and `device` do not change the result, except that of a training.
    """

    bits: float | None = None
    cluster_dim: int | None = None
    num_clusters: int | None = None
    share: Share | None = None
    embedding_bits: float | None = None
    codebook_bits: int | None = None
    calibration: str | None = None
    effort: Effort | None = None
    feedback: bool | None = None
    calibration_windows: int | None = None
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
    def asks_clustering(self) -> bool:
        """Whether any option says how to cluster."""
        how = (self.bits, self.cluster_dim, self.num_clusters, self.share, self.embedding_bits, self.codebook_bits)
        levels = (self.effort, self.feedback, self.calibration_windows, *self.blockwise.values(), *self.recovery.values())
        given = (*how, self.calibration, *levels)
        return any(value is not None for value in given)

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

    def recorded(self) -> dict[str, Any]:
        """The options that determine the result, for the provenance."""
        without_effect = (
            "threads",
            "device",
            "workers",
            "to",
            "effort",
            "feedback",
            "calibration_windows",
            "blockwise",
            "recovery",
        )
        return {key: value for key, value in asdict(self).items() if value is not None and key not in without_effect}


@dataclass(frozen=True)
class Prepared:
    """A conversion that has been planned.

    `model` tells sizes, `plan` is None when a clustered source is only repacked, `memory` is what each phase needs at most.
    """

    source: Model
    plan: Plan | None
    model: Model
    sizes: Sizes
    source_file_bytes: int
    memory: tuple[Peak, ...]
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class ConversionReport:
    """What `convert` did.

    `curves` are the losses of trainings: `recovery`, and `block 0` and so on for each block that was tuned. `reused` counts the
    units of work (codebooks, tensors) that an interrupted attempt had finished.
    """

    output: str
    file_bytes: int
    source_file_bytes: int
    digest: str | None
    bits_per_weight: Mapping[str, float]
    self_test: bool
    curves: Mapping[str, Curve]
    reused: int
    seconds: float
    warnings: tuple[str, ...]


def prepare(source_path: Path, options: ConversionOptions, *, to_plan: bool = False) -> Prepared:
    """Open and plan; reads shapes only. What `--dry-run` shows.

    `to_plan` asks for nothing but the plan: the source may be a folder with a `config.json` and no weights, the device another
    machine's.

    Raises InvalidRequestError for options that contradict each other or a budget that cannot be met, InvalidFileError,
    UnsupportedError.
    """
    _check_options(options)
    if not to_plan:
        check_device(options.device)
    source = open_source(source_path, to_plan=to_plan)
    plan = None
    if source.clustered:
        if options.asks_clustering:
            remedy = "convert the original model instead, or drop the clustering options to repack it as it is"
            raise InvalidRequestError(
                Problem("already_clustered", "the source is clustered already", str(source_path), remedy=remedy)
            )
        model = source
    else:
        plan = _make_plan(source, options)
        model = cluster_model(source, plan)
    sizes = model_sizes(model)
    only_config = source.provenance.get("format") == CONFIG_ONLY
    file_bytes = model_sizes(source).payload_bytes if only_config else source_bytes(source_path)
    text = options.calibration_text()
    memory = conversion_memory(
        source,
        model,
        plan,
        output_bytes=sizes.payload_bytes,
        calibrated=text is not None,
        levels=levels_of("fast") if text is None else options.levels(),
        windows=most_windows(text or "", options.levels().windows),
        cuda=options.device.startswith("cuda"),
    )
    warnings = [*_warnings(source, sizes, file_bytes), *memory_warnings(memory)]
    return Prepared(source, plan, model, sizes, file_bytes, memory, tuple(warnings))


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
    OutputExistsError, StorageError, SelfTestError, WorkersLostError.
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
    prepared = prepare(source_path, options)
    writer.check_model(prepared.model)
    warnings = list(prepared.warnings)
    model = prepared.model
    record: Mapping[str, Any] | None = None
    curves: dict[str, Curve] = {}

    def self_test(written: Model) -> Mapping[str, Any] | None:
        nonlocal record
        record = model.self_test or record_self_test(written, warnings, on_progress)
        return record

    with contextlib.ExitStack() as unfinished:
        work = unfinished.enter_context(work_folder(output)) if prepared.plan is not None else None
        _check_space(output, prepared, work)
        if prepared.plan is not None and work is not None:
            with _opened(options, on_progress) as workers:
                model = _clustered(
                    prepared.source, prepared.plan, source_path, options, work, workers, curves, warnings, on_progress
                )
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
        bits_per_weight=prepared.sizes.bits_per_weight(),
        self_test=record is not None,
        curves={name: finite_curve(curve) for name, curve in curves.items() if curve},
        reused=work.reused if work is not None else 0,
        seconds=time.perf_counter() - started,
        warnings=tuple(warnings),
    )


def _opened(options: ConversionOptions, on_progress: Progress) -> contextlib.AbstractContextManager[Workers | None]:
    """The workers that are asked for, if any."""
    if options.workers is None:
        return contextlib.nullcontext()
    computing = Computing(options.method, options.seed, options.threads, options.device)
    return open_workers(parse_workers(options.workers), computing, on_progress)


def _clustered(
    source: Model,
    plan: Plan,
    source_path: Path,
    options: ConversionOptions,
    work: WorkFolder,
    workers: Workers | None,
    curves: dict[str, Curve],
    warnings: list[str],
    on_progress: Progress,
) -> Model:
    """The model to write, with its provenance: what it was made from, and how. Fills `curves` and `warnings`, if need be not
    before it is read."""
    text = options.calibration_text()
    recorded = options.recorded()
    if text is not None:
        recorded["calibration"] = f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"
    levels = levels_of("fast") if text is None else options.levels()
    recorded |= levels.recorded()
    provenance = {
        "tool": "cluscomp-export",
        "version": __version__,
        "source": {**source.provenance, "digest": scan_source(source, source_path, on_progress)},
        "options": recorded,
    }
    kept, deleted = work.begin(fingerprint(provenance))
    if kept:
        on_progress(f"resuming with {kept} finished parts", kept, kept)
    if deleted:
        warnings.append("the unfinished work of a conversion of another source or with other options was discarded")
    energies = feedback = None
    if text is not None:
        try:
            energies = _energies(source, text, work, on_progress)
            if levels.block_by_block:
                feedback = ErrorFeedback(
                    source,
                    calibration_windows(source, text, levels.windows),
                    levels.blockwise,
                    feedback=levels.feedback,
                    curves=curves,
                    device=options.device,
                    on_progress=on_progress,
                )
        except (InvalidRequestError, UnsupportedError) as error:
            if options.calibration is not None or options.effort is not None:
                raise
            levels = levels_of("fast")
            recorded.pop("calibration")
            recorded |= levels.recorded()
            warnings.append(f"clustered without a calibration text: {error.problems[0].message}")
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
        workers=workers,
        on_progress=on_progress,
    )
    if levels.recovery is not None and text is not None:
        return _recovered(model, source, text, levels.recovery, work, curves, warnings, on_progress)
    return model


def _recovered(
    model: Model,
    source: Model,
    text: str,
    options: RecoveryOptions,
    work: WorkFolder,
    curves: dict[str, Curve],
    warnings: list[str],
    on_progress: Progress,
) -> Model:
    """The model after recovery training, unless an earlier attempt has done it."""
    trainable = TrainableModel(model)
    curve_form = {"curve": ("float64", (options.most_checks, 3))}
    arrays = work.load("recovery", trainable.forms() | curve_form)
    if arrays is None:
        result = recover(trainable, source, calibration_tokens(source, text), options, on_progress, work=work)
        if result.stopped is not None:
            warnings.append(f"recovery: {result.stopped}")
        arrays = {**result.values, "curve": curve_array(result.curve, options.most_checks)}
        work.save("recovery", arrays)
    curves["recovery"] = curve_entries(arrays["curve"])
    return trainable.with_values({name: values for name, values in arrays.items() if name != "curve"})


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


def _check_options(options: ConversionOptions) -> None:
    problem = None
    if (options.cluster_dim is None) != (options.num_clusters is None):
        problem = Problem("bad_option", "--dim and --clusters go together", remedy="give both, or --bits")
    elif options.bits is not None and options.cluster_dim is not None:
        problem = Problem("bad_option", "--bits and --dim/--clusters exclude each other", remedy="give one of them")
    elif options.bits is not None and not 0 < options.bits <= 16:
        problem = Problem("bad_option", "--bits is out of range", found=f"{options.bits:g}", expected="more than 0, at most 16")
    elif options.embedding_bits is not None and not 0 < options.embedding_bits <= 16:
        problem = Problem(
            "bad_option",
            "--embedding-bits is out of range",
            found=f"{options.embedding_bits:g}",
            expected="more than 0, at most 16",
        )
    elif options.codebook_bits not in (None, *CODEBOOK_DTYPES):
        found, expected = str(options.codebook_bits), " or ".join(map(str, CODEBOOK_DTYPES))
        problem = Problem("bad_option", "--codebook-bits is out of range", found=found, expected=expected)
    elif options.calibration == "none" and options.levels().needs_text:
        found, remedy = "--calibration none", "give a text, or --effort fast and none of the options of other levels"
        problem = Problem("bad_option", "this effort needs a calibration text", found=found, remedy=remedy)
    if problem:
        raise InvalidRequestError(problem)
    options.levels()
    if options.workers is not None:
        parse_workers(options.workers)


def _make_plan(source: Model, options: ConversionOptions) -> Plan:
    stored = source.provenance.get("stored_bits", {})
    embedding_bits = options.embedding_bits
    if embedding_bits is None:
        embedding_bits = max((stored.get(name, 16.0) for name in embedding_tensors(source)), default=16.0)
    if options.cluster_dim is not None and options.num_clusters is not None:
        return plan_fixed(
            source,
            cluster_dim=options.cluster_dim,
            num_clusters=options.num_clusters,
            share=options.share or "none",
            embedding_bits=embedding_bits,
            codebook_bits=options.codebook_bits,
        )
    return plan_bits(
        source,
        bits=options.bits or DEFAULT_BITS,
        share=options.share,
        embedding_bits=embedding_bits,
        codebook_bits=options.codebook_bits,
    )


def _warnings(source: Model, sizes: Sizes, source_file_bytes: int) -> list[str]:
    warnings = []
    if "tokenizer.json" not in source.files and source.provenance.get("format") != CONFIG_ONLY:
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
    needed = max(peak.disk for peak in prepared.memory)
    if work is not None:
        needed = max(prepared.sizes.payload_bytes, needed - work.stored_bytes())
    free = shutil.disk_usage(output.parent).free
    if free < needed:
        found, expected = f"{free / 1e6:.1f} MB free", f"{needed / 1e6:.1f} MB for the artefact and the work on it"
        raise StorageError(
            Problem("no_space", "not enough space", str(output), None, found, expected, "free some, or write elsewhere")
        )


def record_self_test(written: Model, warnings: list[str], on_progress: Progress) -> Mapping[str, Any] | None:
    """The self-test record of the model just written, or None where the runtime cannot run its architecture."""
    from cluscomp_runtime.selftest import make_self_test

    on_progress("recording the self-test", 0, 1)
    try:
        record = make_self_test(written)
    except UnsupportedError as error:
        warnings.append(f"no self-test record: {error.problems[0].message}")
        return None
    on_progress("recording the self-test", 1, 1)
    return record
