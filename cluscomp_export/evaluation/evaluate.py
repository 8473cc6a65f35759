"""Measure how well a model predicts a text and how far it is from a reference; `docs/evaluation.md` defines both.

Both models run together, a few windows at a time. In addition to the models, memory holds the logits of 1024 tokens of each, or
of one window if that is longer.
"""

from __future__ import annotations

import hashlib
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import distributions
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np
import torch

from cluscomp_export.calibration.activations import read_text
from cluscomp_export.evaluation.protocols import Join, choose_protocol
from cluscomp_export.evaluation.protocols import Protocol as ScoringProtocol
from cluscomp_export.evaluation.statistics import Scores, TokenScores
from cluscomp_export.sources import open_source
from cluscomp_formats.architectures import describe
from cluscomp_formats.errors import InvalidRequestError, Problem, UnsupportedError
from cluscomp_formats.ir import Model
from cluscomp_formats.progress import Progress, silent
from cluscomp_formats.sections.digest import check_claim
from cluscomp_formats.version import __version__
from cluscomp_runtime import LanguageModel
from cluscomp_runtime.memory import memory_faults
from cluscomp_runtime.tokenizer import Tokenizer

if TYPE_CHECKING:
    from cluscomp_export.evaluation.transformers_model import TransformersModel

__all__ = [
    "Evaluation",
    "Runner",
    "Scorer",
    "TaskEvaluation",
    "evaluate",
    "evaluate_files",
    "load_runner",
    "max_tokens",
    "run_record",
    "tokenize",
    "tokenizer_of",
]

BATCH_TOKENS = 1024
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
LIBRARIES = ("torch", "numpy", "tokenizers", "transformers", "lm_eval")


class Scorer(Protocol):
    """A model to score: gives logits `[batch, tokens, vocab_size]` for ids `[batch, tokens]`."""

    def forward(self, input_ids: torch.Tensor, /) -> torch.Tensor: ...


Runner: TypeAlias = "LanguageModel | TransformersModel"


@dataclass(frozen=True)
class Evaluation(Scores):
    """Statistics over all scored tokens; of `evaluate_files` also a JSON `record` of what is needed to repeat them."""

    windows: int = 0
    context: int = 0
    record: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TaskEvaluation:
    """`results` by task as the harness reports them, versions of the tasks, and a `record` of what is needed to repeat it."""

    results: Mapping[str, Mapping[str, Any]]
    task_versions: Mapping[str, Any]
    record: Mapping[str, Any]


@torch.inference_mode()
def evaluate(
    model: Scorer,
    windows: Sequence[Sequence[int]],
    *,
    protocol: ScoringProtocol | None = None,
    reference: Scorer | None = None,
    on_progress: Progress = silent,
) -> Evaluation:
    """Score the windows of `protocol`, by default llama.cpp's with windows of their length; compare with `reference`."""
    context = len(windows[0])
    protocol = protocol or choose_protocol(context=context)
    scores = TokenScores()
    batch = max(1, BATCH_TOKENS // context)
    for start in range(0, len(windows), batch):
        ids = torch.tensor(windows[start : start + batch])
        logits = model.forward(ids)
        expected = None if reference is None else reference.forward(ids)
        if expected is not None and expected.shape != logits.shape:
            found, wanted = f"{logits.shape[-1]} tokens", f"{expected.shape[-1]} tokens"
            raise InvalidRequestError(
                Problem("other_vocabulary", "the reference has another vocabulary", None, None, found, wanted)
            )
        for row in range(len(ids)):
            first = protocol.first_scored(start + row)
            predicting = slice(first - 1, context - 1)
            scores.add(logits[row, predicting], None if expected is None else expected[row, predicting], ids[row, first:])
        on_progress("scoring", min(start + batch, len(windows)), len(windows))
    return Evaluation(**vars(scores.statistics()), windows=len(windows), context=context)


@memory_faults("run it again with more memory free, or with a smaller `context`")
def evaluate_files(
    model_path: Path,
    *,
    text: Path,
    reference: Path | None = None,
    protocol: str = "llama.cpp",
    windows: int | None = None,
    context: int | None = None,
    stride: int | None = None,
    join: Join | None = None,
    delta: Path | None = None,
    device: str = "cpu",
    dtype: str | None = None,
    on_progress: Progress = silent,
) -> Evaluation:
    """`evaluate` for files: an artefact or source, a delta to apply, a UTF-8 text, and the original to compare with.

    `windows` is the most windows to use; the other options are those of `choose_protocol` and `LanguageModel.from_model`. Both
    models must have the same tokenizer. Raises InvalidFileError, InvalidRequestError, UnsupportedError.
    """
    started = time.perf_counter()
    # Now, because the text may change while the models run.
    words = read_text(text)
    text_digest = hashlib.sha256(words.encode()).hexdigest()
    stored = {"model": (model_path, open_source(model_path, delta))}
    if reference is not None:
        stored["reference"] = (reference, open_source(reference))
    on_progress("loading", 0, len(stored))
    loaded = {}
    for role, (_, opened) in stored.items():
        loaded[role] = load_runner(opened, device=device, dtype=dtype)
        on_progress("loading", len(loaded), len(stored))
    limit = min(max_tokens(runner) for runner in loaded.values())
    chosen = choose_protocol(protocol, context=context, stride=stride, join=join, limit=limit)
    token_ids, bos_id = tokenize(tokenizer_of(loaded["model"], model_path), words, chosen)
    if reference is not None and tokenize(tokenizer_of(loaded["reference"], reference), words, chosen)[0] != token_ids:
        problem = Problem("other_tokenizer", "the reference tokenizes the text differently", str(reference))
        raise InvalidRequestError(problem)
    cut = chosen.windows(token_ids, count=windows, bos_id=bos_id)
    result = evaluate(loaded["model"], cut, protocol=chosen, reference=loaded.get("reference"), on_progress=on_progress)
    record = {
        "text": {"path": str(text), "sha256": text_digest},
        "tokens": {"count": len(token_ids), "sha256": hashlib.sha256(np.array(token_ids, "<u4").tobytes()).hexdigest()},
        "protocol": {**asdict(chosen), "begin_token": bos_id, "windows": result.windows, "scored_tokens": result.scored_tokens},
        **run_record(stored, loaded["model"], on_progress),
        "seconds": time.perf_counter() - started,
    }
    return Evaluation(**{**vars(result), "record": record})


def load_runner(model: Model, *, device: str, dtype: str | None, kernel: str = "auto") -> Runner:
    """The model in our runtime; in transformers, if only that knows the architecture and it is installed.

    It uses as many threads as torch. With the kernel "auto", models without codes run in torch, whose dense products of many
    tokens are faster.

    Raises UnsupportedError, InvalidFileError, InvalidRequestError.
    """
    try:
        context = describe(model.config).max_position_embeddings
    except UnsupportedError:
        if find_spec("transformers") is None:
            raise
        from cluscomp_export.evaluation.transformers_model import TransformersModel

        return TransformersModel(model, device=device, dtype=dtype)
    if kernel == "auto" and not model.clustered:
        kernel = "dense"
    threads = torch.get_num_threads()
    return LanguageModel.from_model(model, device=device, dtype=dtype, kernel=kernel, context=context, threads=threads)


def max_tokens(runner: Runner) -> int:
    """The most tokens that the model was made for."""
    return runner.description.max_position_embeddings if isinstance(runner, LanguageModel) else runner.max_positions


def run_record(stored: Mapping[str, tuple[Path, Model]], runner: Runner, on_progress: Progress = silent) -> dict[str, Any]:
    """What ran: paths, digests and tokenizer files of the models by role, versions, device, dtype, threads.

    Reads every model once for its digest. Raises InvalidFileError if a file claims another one.
    """
    models: dict[str, Any] = {}
    for role, (path, model) in stored.items():
        on_progress("computing digests", len(models), len(stored))
        digest = model.digest()
        # Figures must belong to the model that has the digest.
        check_claim(model, digest, str(path))
        models[role] = {"path": str(path), "digest": digest}
        files = {name: model.files[name].read().tobytes() for name in TOKENIZER_FILES if name in model.files}
        models[role]["tokenizer"] = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    on_progress("computing digests", len(models), len(stored))
    return {
        **models,
        "versions": _versions(),
        "machine": f"{platform.system()} {platform.machine()}",
        "device": str(runner.device),
        "dtype": str(runner.dtype).removeprefix("torch."),
        "kernel": runner.kernel_summary,
        "threads": torch.get_num_threads(),
    }


def _versions() -> dict[str, str]:
    installed = {each.name.lower(): each.version for each in distributions() if each.name}
    libraries = {library: installed[library] for library in LIBRARIES if library in installed}
    return {"cluscomp-export": __version__, "python": platform.python_version(), **libraries}


def tokenizer_of(runner: Runner, path: Path) -> Tokenizer:
    """The tokenizer of a model that was read from `path`. Raises InvalidRequestError if it has none."""
    if runner.tokenizer is None:
        remedy = "convert from a source with tokenizer.json"
        raise InvalidRequestError(Problem("no_tokenizer", "this model has no tokenizer", str(path), remedy=remedy))
    return runner.tokenizer


def tokenize(tokenizer: Tokenizer, text: str, protocol: ScoringProtocol) -> tuple[list[int], int | None]:
    """The text's tokens by a protocol, and the id of the token that the tokenizer adds at the beginning, if any."""
    token_ids = tokenizer.encode(protocol.prepare(text), parse_special=protocol.parse_special)
    begins = tokenizer.bos_id is not None and token_ids[:1] == [tokenizer.bos_id]
    return token_ids, tokenizer.bos_id if begins else None
