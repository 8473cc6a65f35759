"""Does an artefact compute the same as another, or come from the source it claims?

Two artefacts are compared by digest, by tensors and by outputs. An artefact names its dense source in its provenance.
Everything that can be computed is checked against that source: structure, configuration and tensors (`derivation`), outputs
(`judging_outputs`), and the self-test record, which is computed again and run in the runtimes. The report says what is proven
and what is only claimed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from cluscomp_export.inspection.derivation import TensorError, compare_tensors, compare_with_source, is_trained
from cluscomp_export.inspection.judging_outputs import OutputComparison, chosen_sequences, compare_outputs
from cluscomp_export.inspection.onnxruntime import OnnxSession
from cluscomp_export.sources import open_source
from cluscomp_formats.errors import ClusCompError, Problem, SelfTestError, UnsupportedError
from cluscomp_formats.ir import Model
from cluscomp_formats.onnx import looks_onnx
from cluscomp_formats.progress import Progress, silent
from cluscomp_runtime import LanguageModel
from cluscomp_runtime.memory import is_memory_fault, memory_faults
from cluscomp_runtime.selftest import (
    SelfTestReport,
    check_against_weights,
    check_record,
    compare_with_record,
    make_self_test,
    run_self_test,
)

__all__ = ["Verification", "verify"]

MOST_REASONS = 10
"""Reasons listed one by one."""

MORE = "convert with more bits, or more calibration text"

Verdict = Literal["equal", "derived", "degraded", "different", "unknown"]

_EXIT_CODES: Mapping[Verdict, int] = {"equal": 0, "derived": 0, "degraded": 1, "different": 1, "unknown": 2}

TEXT_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
"""The side files that turn text into tokens and tokens into text. The digest does not cover them."""


@dataclass(frozen=True)
class Verification:
    """The verdict, the reasons for it, and what was measured.

    `equal`: the same model. `derived`: made from that source, and correct. `degraded`: a tensor or the outputs keep too little
    of that source to tell, or to be useful. `different`: none of these. `unknown`: could not tell. `proven` and `claimed` say
    in words what was computed here and what the artefact only claims. `self_tests` has those of the runtimes and of the records
    themselves. `logits` has the figures of `OutputComparison`, of B compared with A, if both run.
    """

    verdict: Verdict
    reasons: tuple[str, ...]
    digests: tuple[str, str]
    tensors: tuple[TensorError, ...] = ()
    self_tests: dict[str, dict[str, Any]] = field(default_factory=dict)
    logits: dict[str, float] | None = None
    proven: tuple[str, ...] = ()
    claimed: tuple[str, ...] = ()

    @property
    def exit_code(self) -> int:
        """0 equal or derived, 1 degraded or different, 2 could not tell."""
        return _EXIT_CODES[self.verdict]


@dataclass(frozen=True)
class _Pair:
    """The two models and what was computed from them."""

    paths: tuple[Path, Path]
    models: tuple[Model, Model]
    digests: tuple[str, str]
    tensors: Sequence[TensorError]
    structure: Sequence[str]

    @property
    def source(self) -> int | None:
        """Which one is the dense source of the other; None if both or none are clustered."""
        clustered = [bool(model.clustered) for model in self.models]
        return None if clustered[0] == clustered[1] else clustered.index(False)


@memory_faults("run it again with more memory free")
def verify(
    path_a: Path, path_b: Path, *, delta: Path | None = None, device: str = "cpu", on_progress: Progress = silent
) -> Verification:
    """Compare two models of any kind; `delta` is applied to the second.

    Raises ClusCompError if one of them cannot be read.
    """
    models = (open_source(path_a), open_source(path_b, delta))
    digests: list[str] = []
    for model in models:
        on_progress("computing digests", len(digests), 2)
        digests.append(model.digest())
    on_progress("computing digests", 2, 2)
    tensors, structure = compare_tensors(*models, on_progress)
    pair = _Pair((path_a, path_b), models, (digests[0], digests[1]), tensors, structure)
    paths = {str(path): model for path, model in zip(pair.paths, models, strict=True)}
    runnable, notes = _load(paths, device)
    self_tests = _self_tests(pair, runnable, notes, on_progress)
    outputs = None
    if len(runnable) == len(paths) == 2 and not structure:
        on_progress("comparing outputs", 0, 1)
        outputs = _compare_outputs(pair, runnable)
    verdict, reasons = _judge(pair, outputs, trained=delta is not None)
    faults = _faults(pair, self_tests)
    if faults:
        verdict, reasons = "different", [*reasons, *faults]
    elif verdict == "derived" and not any(result.get("passed") for result in self_tests.values()):
        verdict = "unknown"
        reasons.append("no self-test could be run, so it is unknown whether it computes the right thing")
    return Verification(
        verdict=verdict,
        reasons=(*reasons, *_file_notes(pair), *notes),
        digests=pair.digests,
        tensors=tuple(tensors),
        self_tests=self_tests,
        logits=None if outputs is None else asdict(outputs),
        proven=tuple(_proven(pair, verdict, self_tests, outputs)),
        claimed=tuple(_claimed(pair)),
    )


def _judge(pair: _Pair, outputs: OutputComparison | None, *, trained: bool) -> tuple[Verdict, list[str]]:
    if pair.digests[0] == pair.digests[1]:
        return "equal", ["the digests are equal: the same configuration, codebooks, codes, scales and dense tensors"]
    if pair.source is not None:
        return _judge_derivation(pair, pair.source, outputs, trained=trained)
    if pair.structure:
        return "different", list(pair.structure)
    differing = [error for error in pair.tensors if error.max_absolute != 0]
    if differing:
        worst = max(differing, key=lambda error: error.relative)
        return "different", [
            f"{len(differing)} of {len(pair.tensors)} tensors differ; most: {worst.name} by {worst.relative:.3g} relative"
        ]
    return "different", ["every decoded tensor is equal, but the configuration or the storage of the weights differs"]


def _judge_derivation(pair: _Pair, index: int, outputs: OutputComparison | None, *, trained: bool) -> tuple[Verdict, list[str]]:
    source, artefact = pair.paths[index], pair.paths[1 - index]
    original, made = pair.models[index], pair.models[1 - index]
    recorded = made.provenance.get("source")
    claimed = recorded.get("digest") if isinstance(recorded, Mapping) else None
    if claimed is not None and claimed != pair.digests[index]:
        return "different", [f"{artefact} was made from another source: {claimed}; {source} is {pair.digests[index]}"]
    found = compare_with_source(original, made, pair.tensors, trained=trained or is_trained(made.provenance))
    if found.against:
        return "different", [f"{artefact} cannot have been made from {source}:", *_first(found.against)]
    if claimed is None:
        return "unknown", [f"{artefact} does not say which source it was made from"]
    derived = f"{artefact} was made from {source}: its provenance has the source's digest, and its content agrees"
    if found.degraded:
        told = f"{artefact} has the digest, structure and dense tensors of {source}, but its matrices keep too little of it:"
        return "degraded", [told, *_first(found.degraded), MORE]
    if outputs is None:
        return "unknown", [derived, "outputs could not be compared, so it is unknown whether it computes the right thing"]
    if not outputs.tells:
        return "derived", [derived, "the source's predictions hardly depend on its input: outputs show nothing"]
    if not outputs.beats_chance:
        what = f"a divergence of {outputs.kl:.3g} nats per token, by chance {outputs.chance:.3g}"
        return "degraded", [derived, f"its outputs are no closer to the source than chance: {what}", MORE]
    return "derived", [derived]


def _first(reasons: Sequence[str]) -> list[str]:
    more = len(reasons) - MOST_REASONS
    return [*reasons[:MOST_REASONS], *([f"and {more} more"] if more > 0 else [])]


def _faults(pair: _Pair, self_tests: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Reasons why a model is not what it says, whatever it is compared with."""
    reasons = [
        f"{path} is not what its own digest says: it is damaged"
        for path, model, digest in zip(pair.paths, pair.models, pair.digests, strict=True)
        if model.claimed_digest not in (None, digest)
    ]
    reasons += [f"{name}: {result['reason']}" for name, result in self_tests.items() if result["passed"] is False]
    made = 1 if pair.source is None else 1 - pair.source
    if pair.source is not None or pair.digests[0] == pair.digests[1]:
        reasons += [
            f"{pair.paths[made]}: {name} is not that of {pair.paths[1 - made]}"
            for name in TEXT_FILES
            if name in pair.models[made].files and _content(pair.models[0], name) != _content(pair.models[1], name)
        ]
    return reasons


def _content(model: Model, name: str) -> bytes | None:
    return model.files[name].read().tobytes() if name in model.files else None


def _file_notes(pair: _Pair) -> list[str]:
    """Side files that only one has, and differing ones that do not affect text."""
    notes = []
    for label, one, other in (("first", 0, 1), ("second", 1, 0)):
        names = sorted(pair.models[one].files.keys() - pair.models[other].files.keys())
        if names:
            notes.append(f"only the {label} has the side files {', '.join(names[:5])}{' ...' if names[5:] else ''}")
    both = sorted(pair.models[0].files.keys() & pair.models[1].files.keys() - set(TEXT_FILES))
    changed = [name for name in both if _content(pair.models[0], name) != _content(pair.models[1], name)]
    if changed:
        notes.append(f"side files differ: {', '.join(changed[:5])}{' ...' if changed[5:] else ''}")
    return notes


def _proven(
    pair: _Pair, verdict: Verdict, self_tests: Mapping[str, Mapping[str, Any]], outputs: OutputComparison | None
) -> Iterator[str]:
    """What was computed here and is proven."""
    if verdict not in ("equal", "derived", "degraded"):
        return
    if any(model.claimed_digest is not None for model in pair.models):
        yield "the content is what the digest says"
    if verdict == "equal":
        yield "configuration and every payload are the same, bit for bit"
    else:
        clustered = len(pair.models[1 - (pair.source or 0)].clustered)
        yield (
            f"the source's structure and configuration; {len(pair.tensors) - clustered} dense tensors with its values, or with "
            f"trained values close to them; {clustered} clustered tensors closer to it than chance"
        )
    if outputs is not None and outputs.tells and outputs.beats_chance:
        yield (
            f"outputs on {outputs.positions} positions of our choice: divergence {outputs.kl:.3g} nats per token, by chance "
            f"{outputs.chance:.3g}"
        )
    if all(_content(pair.models[0], name) == _content(pair.models[1], name) for name in TEXT_FILES):
        yield "tokenizer, chat template and generation settings are the same"
    for name, result in self_tests.items():
        if result.get("passed"):
            yield f"{name}: the logits of its self-test record"


def _claimed(pair: _Pair) -> Iterator[str]:
    """What an artefact says about itself that cannot be checked here."""
    for path, model in zip(pair.paths, pair.models, strict=True):
        if not model.clustered:
            continue
        provenance = model.provenance
        tool = " ".join(str(provenance[key])[:50] for key in ("tool", "version") if key in provenance) or "an unknown tool"
        yield f"{path} was made by {tool}, with the options, calibration and trainings of its provenance (not authenticated)"


def _load(paths: dict[str, Model], device: str) -> tuple[dict[str, LanguageModel], list[str]]:
    """The models that the runtime can run, and notes about the others and about how they run."""
    runnable: dict[str, LanguageModel] = {}
    notes: list[str] = []
    for name, model in paths.items():
        # A dense source may be larger than memory: its matrices are read one at a time, at every call.
        loaded = _try_load(model, device, "auto" if model.clustered else "reference")
        if loaded is None:
            notes.append(f"{name} does not fit into memory as a whole: it was run matrix by matrix, not by its kernels")
            loaded = _try_load(model, device, "reference")
        if isinstance(loaded, LanguageModel):
            runnable[name] = loaded
        else:
            notes.append(f"{name} was not run: {loaded or 'not enough memory'}")
    return runnable, notes


def _try_load(model: Model, device: str, kernel: str) -> LanguageModel | str | None:
    """The model ready to run, the reason why it cannot run, or None if it does not fit into memory."""
    try:
        return LanguageModel.from_model(model, device=device, kernel=kernel)
    except ClusCompError as error:
        return error.problems[0].message
    except (MemoryError, RuntimeError) as error:
        if not is_memory_fault(error):
            raise
        return None


def _self_tests(
    pair: _Pair, runnable: Mapping[str, LanguageModel], notes: list[str], on_progress: Progress
) -> dict[str, dict[str, Any]]:
    """For every record: whether these weights produce it, and whether the runtimes installed here pass it."""
    found: dict[str, dict[str, Any]] = {}
    for path, model in zip(pair.paths, pair.models, strict=True):
        name, record = str(path), model.self_test
        if record is None:
            continue
        on_progress(f"computing the self-test of {name}", 0, 1)
        again = functools.partial(check_against_weights, model, record)
        found[f"{name}, its record"] = _tested(again, "the self-test record is not what these weights compute in float64")
        loaded = runnable.get(name)
        found[name] = {"passed": None} if loaded is None else _tested(functools.partial(run_self_test, loaded, record))
        if looks_onnx(path):
            on_progress(f"running {name} in onnxruntime", 0, 1)
            found[f"{name} in onnxruntime"] = _self_test_in_onnxruntime(path, model, notes)
    return found


def _tested(run: Callable[[], SelfTestReport], failure: str = "the self-test fails") -> dict[str, Any]:
    try:
        with memory_faults():
            report = run()
    except UnsupportedError as error:
        return {"passed": None, "reason": error.problems[0].message}
    except ClusCompError as error:
        reason = f"{failure}: {error.problems[0].message}"
        return {"passed": False, "reason": reason, "problems": [problem.as_dict() for problem in error.problems]}
    found = {"passed": report.ok, "max_difference": report.max_difference, "tolerance": report.tolerance}
    return found if report.ok else {**found, "reason": failure}


def _self_test_in_onnxruntime(path: Path, model: Model, notes: list[str]) -> dict[str, Any]:
    """The same with the graph of an ONNX folder, in the mode that keeps the weights as codes.

    The runtime does not run the graph in the file. The graph is therefore also compared with what the weights compute on
    sequences that the file does not choose.
    """
    record = model.self_test or {}

    def run() -> SelfTestReport:
        reference = LanguageModel.from_model(model, kernel="reference")
        check_record(record, reference.description.vocab_size, reference.description.max_position_embeddings)
        ours = make_self_test(model, sequences=chosen_sequences(reference))
        try:
            session = OnnxSession(path, compact=True)
            reports = [compare_with_record(each, "float32", session.forward, session.forward_cached) for each in (record, ours)]
        except Exception as error:
            # onnxruntime may raise anything for an untrusted graph; its errors have no common type.
            if isinstance(error, ClusCompError) or is_memory_fault(error):
                raise
            found = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise SelfTestError(Problem("not_runnable", "onnxruntime cannot run the graph", str(path), found=found)) from error
        return max(reports, key=lambda report: report.max_difference / report.tolerance)

    result = _tested(run)
    if result["passed"] is None:
        notes.append(f"{path} was not run in onnxruntime: {result['reason']}")
    return result


def _compare_outputs(pair: _Pair, runnable: Mapping[str, LanguageModel]) -> OutputComparison:
    first, second = (runnable[str(path)] for path in pair.paths)
    return compare_outputs(first, second, chosen_sequences(first))
