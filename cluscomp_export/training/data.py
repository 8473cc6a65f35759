"""The files of a finetuning: examples to train on, and held-out examples."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluscomp_export.calibration.activations import read_text
from cluscomp_export.training.chats import chat_examples, read_chats
from cluscomp_export.training.examples import Example, cut, split, text_examples
from cluscomp_formats.errors import InvalidRequestError, Problem
from cluscomp_formats.ir import Model
from cluscomp_formats.tokens.chat_templates import choose_chat_template, find_chat_templates
from cluscomp_runtime.tokenizer import Tokenizer

__all__ = ["TuningData", "read_data"]

MAX_HELD_OUT_TOKENS = 4096
"""Held-out tokens evaluated at a check, the first ones. More would soon take longer than the training."""


@dataclass(frozen=True)
class TuningData:
    """Examples to train on, held-out examples, a JSON description of their origin, and warnings."""

    kept: Sequence[Example]
    held_out: Sequence[Example]
    description: Mapping[str, Any]
    warnings: tuple[str, ...]


def read_data(
    path: Path, held_out: float | Path, model: Model, tokenizer: Tokenizer, *, chat: bool, context: int, seed: int
) -> TuningData:
    """Read a text or a file of chats for a model. No example is longer than `context` tokens.

    `held_out` is a share of the examples, or another such file. Raises InvalidFileError and InvalidRequestError for files that
    cannot be used.
    """
    warnings: list[str] = []

    def read(file: Path) -> list[Example]:
        return _chats(file, model, tokenizer, context, warnings) if chat else _windows(file, tokenizer, context)

    description = {"kind": "chat" if chat else "text", "sha256": _sha256(path), "held_out": held_out}
    examples = read(path)
    if isinstance(held_out, Path):
        unseen = read(held_out)
        description["held_out"] = _sha256(held_out)
    elif len(examples) < 2:
        message, remedy = (
            "there are too few examples to hold one out",
            "use more data, a smaller `context`, or a file as `held_out`",
        )
        raise InvalidRequestError(Problem("too_few_examples", message, str(path), None, "1 example", "at least 2", remedy))
    else:
        # The end of a text resembles the rest less than windows in between do: a fairer test.
        examples, unseen = split(examples, held_out, seed if chat else None)
    ends = itertools.accumulate(len(example.ids) for example in unseen)
    few = max(1, sum(end <= MAX_HELD_OUT_TOKENS for end in ends))
    return TuningData(examples, unseen[:few], description, tuple(warnings))


def _windows(path: Path, tokenizer: Tokenizer, context: int) -> list[Example]:
    examples = text_examples(tokenizer, read_text(path), context)
    if not examples:
        raise InvalidRequestError(Problem("text_too_short", "the text is too short to train on", str(path)))
    return examples


def _chats(path: Path, model: Model, tokenizer: Tokenizer, context: int, warnings: list[str]) -> list[Example]:
    remedy = "tune on a `text`, or convert from a source with a chat template"
    template = choose_chat_template(find_chat_templates(model.files), remedy=remedy)
    whole = chat_examples(read_chats(path), template, tokenizer, path)
    examples = cut(whole, context)
    long = sum(len(example.ids) > context for example in whole)
    if long:
        warnings.append(f"{path}: {long} of {len(whole)} chats are longer than `context={context}` and were cut")
    if len(examples) < len(whole):
        warnings.append(f"{path}: {len(whole) - len(examples)} chats were left out: `context` cuts off their answers")
    if not examples:
        remedy = "use a larger `context`"
        raise InvalidRequestError(Problem("nothing_to_learn", "no answer begins within the context", str(path), remedy=remedy))
    return examples


def _sha256(path: Path) -> str:
    return f"sha256:{hashlib.sha256(read_text(path).encode()).hexdigest()}"
