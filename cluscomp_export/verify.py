"""Does an artefact compute the same thing as another, or come from the source it claims?

Two artefacts are compared by digest, tensor by tensor, and by their logits on the self-test records. An artefact and a dense
source are compared by the source digest in the artefact's provenance; the error of every tensor and of the logits is then
reported, not judged, and the artefact's own self-test decides whether it is sound.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from cluscomp_export.onnx_graph.running import OnnxSession
from cluscomp_export.progress import Progress, silent
from cluscomp_export.sources import open_source
from cluscomp_formats.errors import ClusCompError, UnsupportedError
from cluscomp_formats.ir import Model
from cluscomp_formats.onnx import looks_onnx
from cluscomp_runtime import LanguageModel
from cluscomp_runtime.architecture import DecoderSettings
from cluscomp_runtime.memory import is_memory_fault
from cluscomp_runtime.selftest import check_record, compare_with_record, run_self_test

__all__ = ["TensorError", "Verification", "compare_tensors", "verify"]

Verdict = Literal["equal", "derived", "different", "unknown"]


@dataclass(frozen=True)
class TensorError:
    """How far one tensor of B is from A: `relative` is the root mean square of the difference over that of A."""

    name: str
    relative: float
    max_absolute: float


@dataclass(frozen=True)
class Verification:
    """The verdict, the reasons for it, and what was measured.

    `equal`: the same model. `derived`: made from that source, and sound. `different`: neither. `unknown`: could not tell.
    `logits`: on the self-test sequences, the largest absolute difference, mean KL divergence (nats per token) and top-1
    agreement of B against A, where both run.
    """

    verdict: Verdict
    reasons: tuple[str, ...]
    digests: tuple[str, str]
    tensors: tuple[TensorError, ...] = ()
    self_tests: dict[str, dict[str, Any]] = field(default_factory=dict)
    logits: dict[str, float] | None = None

    @property
    def exit_code(self) -> int:
        """0 equal or derived, 1 different, 2 could not tell."""
        return {"equal": 0, "derived": 0, "different": 1, "unknown": 2}[self.verdict]


def verify(
    path_a: Path, path_b: Path, *, delta: Path | None = None, device: str = "cpu", on_progress: Progress = silent
) -> Verification:
    """Compare two models of any kind, the second perhaps with a delta.

    Raises ClusCompError if one of them cannot be read: then nothing can be told.
    """
    model_a, model_b = open_source(path_a), open_source(path_b, delta)
    on_progress("computing digests", 0, 2)
    digest_a = model_a.digest()
    on_progress("computing digests", 1, 2)
    digest_b = model_b.digest()
    on_progress("computing digests", 2, 2)
    tensors, structure = compare_tensors(model_a, model_b, on_progress)
    paths = {str(path_a): model_a, str(path_b): model_b}
    runnable, skipped = _load(paths, device)
    self_tests = {name: _self_test(model, runnable.get(name)) for name, model in paths.items() if model.self_test}
    for path, model in ((path_a, model_a), (path_b, model_b)):
        if model.self_test and looks_onnx(path):
            on_progress(f"running {path} in onnxruntime", 0, 1)
            self_tests[f"{path} in onnxruntime"] = _self_test_in_onnxruntime(path, model, skipped)
    records = [model.self_test for model in paths.values() if model.self_test]
    logits = _compare_logits(list(runnable.values()), records) if len(runnable) == 2 and not structure else None

    verdict, reasons = _judge(path_a, path_b, model_a, model_b, digest_a, digest_b, tensors, structure)
    digests = ((path_a, model_a, digest_a), (path_b, model_b, digest_b))
    damaged = [str(path) for path, model, digest in digests if model.claimed_digest not in (None, digest)]
    broken = [name for name, result in self_tests.items() if result.get("passed") is False]
    if broken or damaged:
        verdict = "different"
        reasons = [*reasons, *(f"{name} is not what its own digest says: it is damaged" for name in damaged)]
        reasons += [f"{name} fails its self-test" for name in broken]
    elif verdict == "derived" and not any(result.get("passed") for result in self_tests.values()):
        verdict = "unknown"
        reasons = [*reasons, "no self-test could be run, so whether it computes the right thing is not known"]
    return Verification(verdict, (*reasons, *skipped), (digest_a, digest_b), tuple(tensors), self_tests, logits)


def _judge(
    path_a: Path,
    path_b: Path,
    model_a: Model,
    model_b: Model,
    digest_a: str,
    digest_b: str,
    tensors: Sequence[TensorError],
    structure: Sequence[str],
) -> tuple[Verdict, list[str]]:
    if digest_a == digest_b:
        return "equal", ["the digests are equal: the same configuration, codebooks, codes, scales and dense tensors"]
    if bool(model_a.clustered) != bool(model_b.clustered):
        source, artefact = (path_a, path_b) if model_b.clustered else (path_b, path_a)
        source_digest = digest_a if model_b.clustered else digest_b
        provenance = (model_b if model_b.clustered else model_a).provenance
        claimed = provenance.get("source", {}).get("digest") if isinstance(provenance.get("source"), dict) else None
        if claimed is None:
            return "unknown", [f"{artefact} does not say which source it was made from"]
        if claimed != source_digest:
            return "different", [f"{artefact} was made from another source: {claimed}; {source} is {source_digest}"]
        return "derived", [f"{artefact} was made from {source}: its provenance holds the source's digest"]
    if structure:
        return "different", list(structure)
    differing = [error for error in tensors if error.max_absolute > 0]
    if differing:
        worst = max(differing, key=lambda error: error.relative)
        return "different", [
            f"{len(differing)} of {len(tensors)} tensors differ; most: {worst.name} by {worst.relative:.3g} relative"
        ]
    return "different", ["every decoded tensor is equal, but the configuration or the way the weights are stored is not"]


def compare_tensors(model_a: Model, model_b: Model, on_progress: Progress) -> tuple[list[TensorError], list[str]]:
    """Errors of the tensors both have, and in words what only one has or what differs in shape."""
    structure = []
    for label, one, other in (("first", model_a, model_b), ("second", model_b, model_a)):
        missing = sorted(set(one.tensors) - set(other.tensors))
        if missing:
            structure.append(
                f"only the {label} has {len(missing)} tensor(s): {', '.join(missing[:3])}{' ...' if missing[3:] else ''}"
            )
    errors = []
    names = sorted(set(model_a.tensors) & set(model_b.tensors))
    for done, name in enumerate(names):
        on_progress("comparing tensors", done, len(names))
        tensor_a, tensor_b = model_a.tensors[name], model_b.tensors[name]
        if tensor_a.shape != tensor_b.shape:
            structure.append(f"{name} has shape {list(tensor_a.shape)} in the first, {list(tensor_b.shape)} in the second")
            continue
        values = tensor_a.decode()
        difference = tensor_b.decode() - values
        energy = float(np.square(values, dtype=np.float64).sum())
        error = float(np.square(difference, dtype=np.float64).sum())
        relative = math.sqrt(error / energy) if energy else (0.0 if error == 0 else math.inf)
        errors.append(TensorError(name, relative, float(np.abs(difference).max(initial=0.0))))
    on_progress("comparing tensors", len(names), len(names))
    return errors, structure


def _load(paths: dict[str, Model], device: str) -> tuple[dict[str, LanguageModel], list[str]]:
    """The models the runtime can run, and what is to be said about the others and about how they run."""
    runnable: dict[str, LanguageModel] = {}
    notes: list[str] = []
    for name, model in paths.items():
        # A dense source may be larger than the memory: its matrices are read one at a time, at every call.
        loaded = _try_load(model, device, "auto" if model.clustered else "reference")
        if loaded is None:
            notes.append(f"{name} does not fit the memory as a whole: it was run matrix by matrix, not by its kernels")
            loaded = _try_load(model, device, "reference")
        if isinstance(loaded, LanguageModel):
            runnable[name] = loaded
        else:
            notes.append(f"{name} was not run: {loaded or 'not enough memory'}")
    return runnable, notes


def _try_load(model: Model, device: str, kernel: str) -> LanguageModel | str | None:
    """The model ready to run, why it cannot be, or None if it does not fit the memory."""
    try:
        return LanguageModel.from_model(model, device=device, kernel=kernel)
    except ClusCompError as error:
        return error.problems[0].message
    except (MemoryError, RuntimeError) as error:
        if not is_memory_fault(error):
            raise
        return None


def _self_test(model: Model, runnable: LanguageModel | None) -> dict[str, Any]:
    if runnable is None or model.self_test is None:
        return {"passed": None}
    try:
        report = run_self_test(runnable, model.self_test)
    except ClusCompError as error:
        return {"passed": False, "problems": [problem.as_dict() for problem in error.problems]}
    return {"passed": report.ok, "max_difference": report.max_difference, "tolerance": report.tolerance}


def _self_test_in_onnxruntime(path: Path, model: Model, skipped: list[str]) -> dict[str, Any]:
    """The same with the graph of an ONNX folder, in the mode that keeps the weights as codes."""
    record = model.self_test or {}
    try:
        settings = DecoderSettings.from_config(model.config)
        check_record(record, settings.vocab_size, settings.max_position_embeddings)
        session = OnnxSession(path, compact=True)
    except UnsupportedError as error:
        skipped.append(f"{path} was not run in onnxruntime: {error.problems[0].message}")
        return {"passed": None}
    report = compare_with_record(record, "float32", session.forward, session.forward_cached)
    return {"passed": report.ok, "max_difference": report.max_difference, "tolerance": report.tolerance}


@torch.inference_mode()
def _compare_logits(models: Sequence[LanguageModel], records: Sequence[Any]) -> dict[str, float] | None:
    """B against A on the sequences of all self-test records."""
    sequences = {tuple(sequence["input_ids"]) for record in records for sequence in record["sequences"]}
    if not sequences:
        return None
    largest, divergences, agreements = 0.0, [], []
    # All at once, as every call may read the whole model; what follows a sequence does not reach its logits.
    longest = max(len(sequence) for sequence in sequences)
    ids = [[*sequence, *[0] * (longest - len(sequence))] for sequence in sorted(sequences)]
    all_logits = [model.forward(ids).cpu() for model in models]
    for index, sequence in enumerate(sorted(sequences)):
        logits_a, logits_b = (logits[index, : len(sequence)].double() for logits in all_logits)
        largest = max(largest, float((logits_a - logits_b).abs().max()))
        expected, scores = torch.log_softmax(logits_a, -1), torch.log_softmax(logits_b, -1)
        divergences.append((expected.exp() * (expected - scores)).sum(-1))
        agreements.append((logits_a.argmax(-1) == logits_b.argmax(-1)).double())
    return {"max_difference": largest, "kl": float(torch.cat(divergences).mean()), "top1": float(torch.cat(agreements).mean())}
