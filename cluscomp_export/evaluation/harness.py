"""Run tasks of EleutherAI's lm-evaluation-harness on any model that the runtime runs; needs the extra `lm-eval`.

Importing this module registers the model class `cluscomp` with the harness, which has no entry points for models. The
harness's own command line, with that class, is

    python -m cluscomp_export.evaluation.harness run --model cluscomp --model_args path=model.clus --tasks hellaswag

Requests are scored as by the harness's `hf` class with the same tokens, so that figures are comparable.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from cluscomp_formats.errors import InvalidRequestError, Problem, UnsupportedError

# Read once, when the harness and its libraries are imported.
os.environ.setdefault("HF_EVALUATE_OFFLINE", os.environ.setdefault("HF_HUB_OFFLINE", "1"))

try:
    from lm_eval import simple_evaluate
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.config.evaluate_config import EvaluatorConfig
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
    from yaml import YAMLError
except ImportError as error:
    remedy = "pip install cluscomp-export[lm-eval]"
    missing = Problem("no_lm_eval", f"lm-evaluation-harness is not installed: {error}", remedy=remedy)
    raise UnsupportedError(missing) from error

import torch
from tqdm import tqdm

from cluscomp_export.evaluation.evaluate import (
    BATCH_TOKENS,
    TaskEvaluation,
    load_runner,
    max_tokens,
    run_record,
    tokenizer_of,
)
from cluscomp_export.sources import open_source
from cluscomp_formats.files.regular_file import read_whole
from cluscomp_formats.ir import Model
from cluscomp_runtime import LanguageModel
from cluscomp_runtime.tokenizer import end_tokens

__all__ = ["ClusCompLM", "evaluate_tasks", "main"]

MAX_NEW_TOKENS = 256
"""For tasks that do not say how much to generate; the harness's own default."""


@register_model("cluscomp")
class ClusCompLM(TemplateLM):  # type: ignore[misc]
    """A model of ours to the harness.

    `path` is any artefact or source, `device`, `dtype` and `kernel` are those of `LanguageModel.from_model`, `max_length` is
    the most tokens the model sees at a time (by default all it was made for), `batch_size` the most requests at a time (by
    default as many as make 1024 tokens).
    """

    def __init__(
        self,
        path: str | Path,
        *,
        device: str | None = None,
        dtype: str | None = None,
        kernel: str = "auto",
        max_length: int | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        self.path = Path(path)
        self.stored: Model = open_source(self.path)
        self.model = load_runner(self.stored, device=device or "cpu", dtype=dtype, kernel=kernel)
        self.max_length = max_length or max_tokens(self.model)
        self._tokenizer = tokenizer_of(self.model, self.path)
        self._most = max_batch_size if batch_size in (None, "auto") else int(str(batch_size).removeprefix("auto:"))
        ends = [self._tokenizer.eos_id, *sorted(end_tokens(self.stored.config, self.stored.files, self._tokenizer))]
        self._end = next((token for token in ends if token is not None), None)

    @property
    def _generating(self) -> LanguageModel:
        """The model, if it can generate and chat. Raises UnsupportedError."""
        if isinstance(self.model, LanguageModel):
            return self.model
        message, found = "only the runtime's own decoder generates and chats", str(self.stored.config.get("model_type"))
        remedy = "convert it with `to='hf'`, and use the harness's model class hf after `import cluscomp_runtime.hf`"
        raise UnsupportedError(Problem("unsupported_architecture", message, str(self.path), found=found, remedy=remedy))

    @property
    def eot_token_id(self) -> int:
        if self._end is None:
            problem = Problem("no_end_token", "the tokenizer has no token that ends a text", str(self.path))
            raise InvalidRequestError(problem)
        return self._end

    @property
    def prefix_token_id(self) -> int:
        bos = self._tokenizer.bos_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        return str(self.path).replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return self._generating.chat_templates.get("default", "")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return self._generating.chat(chat_history, add_generation_prompt=add_generation_prompt)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        # A text that already has its first token, as chat templates write it, gets none.
        begun = self._tokenizer.bos_token is not None and string.startswith(self._tokenizer.bos_token)
        wanted = not begun if add_special_tokens is None else add_special_tokens
        return self._tokenizer.encode(string, add_special_tokens=wanted)

    @torch.inference_mode()
    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **others: Any
    ) -> list[tuple[float, bool]]:
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        with tqdm(total=len(requests), disable=disable_tqdm, desc="Scoring requests") as bar:
            for batch in self._batches([len(before) + len(after) for _, before, after in requests]):
                rows = [(requests[index][1] + requests[index][2])[-(self.max_length + 1) :] for index in batch]
                width = max(map(len, rows)) - 1
                # Padding follows the tokens, so it does not affect the logits that are scored.
                logits = self.model.forward(torch.tensor([[*row[:-1], *[0] * (width - len(row) + 1)] for row in rows]))
                for index, row, scores in zip(batch, rows, logits, strict=True):
                    asked, _, after = requests[index]
                    targets = torch.tensor(after, device=scores.device)[:, None]
                    predicted = torch.log_softmax(scores[len(row) - 1 - len(after) : len(row) - 1].float(), dim=-1)
                    greedy = bool((predicted.argmax(1) == targets[:, 0]).all())
                    answers[index] = (float(predicted.gather(1, targets).double().sum()), greedy)
                    if asked is not None:
                        self.cache_hook.add_partial("loglikelihood", asked, answers[index])
                bar.update(len(batch))
        return answers

    def _batches(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        """Indices of requests in batches, longest first."""
        batch: list[int] = []
        for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
            most = self._most or max(1, BATCH_TOKENS // lengths[batch[0]] if batch else 1)
            if batch and len(batch) >= most:
                yield batch
                batch = []
            batch.append(index)
        if batch:
            yield batch

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        totals = []
        for request in requests:
            (text,) = request.args
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(text), prefix_token=self.prefix_token_id, max_seq_len=self.max_length, context_len=1
            )
            pairs = [(None, *make_disjoint_window(window)) for window in windows]
            totals.append(sum(score for score, _ in self._loglikelihood_tokens(pairs, disable_tqdm=True)))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), totals[-1])
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        texts = []
        for prompt, settings in tqdm([request.args for request in requests], disable=disable_tqdm, desc="Generating"):
            texts.append(self._generate(prompt, dict(settings)))
            self.cache_hook.add_partial("generate_until", (prompt, settings), texts[-1])
        return texts

    def _generate(self, prompt: str, settings: dict[str, Any]) -> str:
        until = settings.get("until") or []
        stops = [stop for stop in ([until] if isinstance(until, str) else until) if stop]
        new_tokens = int(settings.get("max_gen_toks") or MAX_NEW_TOKENS)
        model = self._generating
        room = min(self.max_length, model.context) - new_tokens
        if room < 1:
            found, expected = f"max_gen_toks {new_tokens}", f"less than the context of {room + new_tokens} tokens"
            raise InvalidRequestError(Problem("bad_option", "there is no space for a prompt", None, None, found, expected))
        temperature = float(settings.get("temperature") or 0) if settings.get("do_sample") else 0.0
        tokens: list[int] = []
        stream = model.stream(
            self.tok_encode(prompt)[-room:],
            max_new_tokens=new_tokens,
            temperature=temperature,
            top_k=settings.get("top_k") if temperature else None,
            top_p=settings.get("top_p") if temperature else None,
            on_token=tokens.append,
        )
        written = ""
        for piece in stream:
            written += piece
            if any(stop in written for stop in stops):
                break
        # As in the harness, the new tokens are decoded alone; some tokenizers drop a leading space.
        text = self._tokenizer.decode(tokens)
        return text[: min((place for stop in stops if (place := text.find(stop)) >= 0), default=len(text))]


def evaluate_tasks(
    model_path: Path,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
    device: str = "cpu",
    dtype: str | None = None,
) -> TaskEvaluation:
    """Run tasks, which are names or YAML files.

    Raises InvalidRequestError for an unknown task, InvalidFileError for a file that is not valid YAML, and what
    `LanguageModel.from_model` raises.
    """
    started = time.perf_counter()
    for task in tasks:
        if Path(task).suffix in (".yaml", ".yml"):
            # The harness would read any file.
            read_whole(Path(task), remedy="name a YAML file of a task")
    config = EvaluatorConfig(tasks=list(tasks))
    try:
        manager = config.process_tasks()
    except (ValueError, OSError, YAMLError) as error:
        expected = "names that `lm-eval ls tasks` lists, or YAML files"
        raise InvalidRequestError(Problem("no_task", "no such task", None, None, str(error), expected)) from error
    model = ClusCompLM(model_path, device=device, dtype=dtype)
    try:
        found = simple_evaluate(
            model, tasks=config.tasks, limit=limit, num_fewshot=num_fewshot, task_manager=manager, log_samples=False
        )
    except (OSError, ConnectionError) as error:
        message = f"a data set cannot be read: {str(error).splitlines()[0]}"
        remedy = "put it on this machine, or let the harness fetch it: HF_HUB_OFFLINE=0"
        raise InvalidRequestError(Problem("no_data_set", message, found=", ".join(tasks), remedy=remedy)) from error
    record = {
        "tasks": list(tasks),
        "limit": limit,
        "num_fewshot": found["n-shot"],
        "samples": found["n-samples"],
        **run_record({"model": (model_path, model.stored)}, model.model),
        "seconds": time.perf_counter() - started,
    }
    return TaskEvaluation(results=found["results"], task_versions=found["versions"], record=record)


def main() -> None:
    """The harness's command line, with the model class `cluscomp` registered."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
