"""Chats to train on: a file with one JSON object per line, in one of three common forms.

- `{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}, ...]}`
- `{"prompt": "...", "completion": "..."}`
- `{"question": "...", "answer": "..."}`

The last two are a user's message and the assistant's. Other members of the object and empty lines are ignored.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluscomp_export.calibration.activations import read_text
from cluscomp_export.training.examples import Example
from cluscomp_formats.errors import ClusCompError, InvalidFileError, InvalidRequestError, Problem
from cluscomp_formats.strict_json import StrictJsonError, parse_strict
from cluscomp_runtime.chat import Chat, Rendered, render_chats
from cluscomp_runtime.tokenizer import Tokenizer

__all__ = ["ChatLine", "chat_examples", "read_chats"]

ASSISTANT = "assistant"
PAIRS = (("prompt", "completion"), ("question", "answer"))


@dataclass(frozen=True)
class ChatLine:
    """The messages of a line, and its number, counted from 1."""

    number: int
    messages: Sequence[Mapping[str, Any]]


def read_chats(path: Path) -> list[ChatLine]:
    """All chats of a file. Raises InvalidFileError with a problem per invalid line, or if there is no chat."""
    chats: list[ChatLine] = []
    problems: list[Problem] = []
    # JSON has no byte order mark; some editors write one.
    for number, text in enumerate(read_text(path).removeprefix("\ufeff").split("\n"), 1):
        if not text.strip():
            continue
        found = _messages(text)
        if isinstance(found, str):
            problems.append(_line_problem(path, number, found, text))
        else:
            chats.append(ChatLine(number, found))
    if not (chats or problems):
        problems.append(Problem("no_chats", "the file contains no chat", str(path), expected="a JSON object per line"))
    if problems:
        raise InvalidFileError(problems)
    return chats


def _line_problem(path: Path, number: int, message: str, found: str | None = None) -> Problem:
    expected = '{"messages": [{"role": ..., "content": ...}, ...]}, {"prompt", "completion"} or {"question", "answer"}'
    return Problem("bad_chat", message, str(path), f"line {number}", found[:200] if found else None, expected)


def _messages(text: str) -> list[dict[str, Any]] | str:
    """The messages of a line, or its problem."""
    try:
        value = parse_strict(text.encode())
    except StrictJsonError as error:
        return f"not valid JSON: {error}"
    if not isinstance(value, dict):
        return "not a JSON object"
    if "messages" in value:
        messages = value["messages"]
        if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
            return "messages is not a list of objects"
        for index, message in enumerate(messages):
            if not isinstance(message.get("role"), str) or not isinstance(message.get("content"), str):
                return f"message {index} has no role, or its content is not a text"
        if all(message["role"] != ASSISTANT for message in messages):
            return "no message is from the assistant, so there is nothing to learn"
        return messages
    for asked, answered in PAIRS:
        if asked in value and answered in value:
            if not (isinstance(value[asked], str) and isinstance(value[answered], str)):
                return f"{asked} or {answered} is not a text"
            return [{"role": "user", "content": value[asked]}, {"role": ASSISTANT, "content": value[answered]}]
    return "no messages, no prompt with completion and no question with answer"


def chat_examples(chats: Sequence[ChatLine], template: str, tokenizer: Tokenizer, path: Path) -> list[Example]:
    """The chats as the model's template renders them, one row of tokens each, of which the assistant's are scored.

    Scored is what the generation blocks of the template write. In a template without them, it is the text that an assistant's
    message adds after the opening of its turn: content and end of turn. Raises InvalidFileError with a problem for every line
    that the template refuses, or for which that text cannot be found.
    """
    special = tokenizer.special_tokens
    whole = render_chats(template, [Chat(line.messages, prompt=False) for line in chats], special_tokens=special)
    beginnings: list[Chat] = []
    for line, rendered in zip(chats, whole, strict=True):
        if isinstance(rendered, Rendered) and rendered.generated is None:
            for index in _turns(line):
                beginnings += [Chat(line.messages[:index]), Chat(line.messages[: index + 1], prompt=False)]
    outcomes = iter(render_chats(template, beginnings, special_tokens=special))
    examples: list[Example] = []
    problems: list[Problem] = []
    for line, rendered in zip(chats, whole, strict=True):
        spans = _learnt(line, rendered, outcomes)
        if isinstance(spans, str) or isinstance(rendered, ClusCompError):
            problems.append(_line_problem(path, line.number, str(spans)))
            continue
        ids, where = tokenizer.encode_with_spans(rendered.text)
        learnt = [any(end > first and begin < last for first, last in spans) for begin, end in where]
        # The prediction at a token is that of the next one.
        examples.append(Example(tuple(ids), (*learnt[1:], False)))
    if problems:
        raise InvalidFileError(problems)
    if not any(any(example.scored) for example in examples):
        raise InvalidRequestError(Problem("nothing_to_learn", "no chat has a token of the assistant", str(path)))
    return examples


def _turns(line: ChatLine) -> list[int]:
    """Positions of the assistant's messages. A first message is left out: a template cannot render what precedes it."""
    return [index for index, message in enumerate(line.messages) if message["role"] == ASSISTANT and index]


def _learnt(
    line: ChatLine, rendered: Rendered | ClusCompError, outcomes: Iterator[Rendered | ClusCompError]
) -> Sequence[tuple[int, int]] | str:
    """Spans of characters of the whole chat that are the assistant's, or the chat's problem.

    Without generation blocks, `outcomes` has, for each of its turns, the chat before the turn and the chat up to its end.
    """
    if isinstance(rendered, ClusCompError):
        return rendered.problems[0].message
    if rendered.generated is not None:
        return rendered.generated
    spans: list[tuple[int, int]] = []
    fault = None
    for _ in _turns(line):
        before, after = next(outcomes), next(outcomes)
        error = next((outcome for outcome in (before, after) if isinstance(outcome, ClusCompError)), None)
        if error is not None:
            fault = fault or error.problems[0].message
        elif isinstance(before, Rendered) and isinstance(after, Rendered):
            if not (after.text.startswith(before.text) and rendered.text.startswith(after.text)):
                fault = fault or "the chat template changes earlier text when a chat continues"
            spans.append((len(before.text), len(after.text)))
    return fault or spans
