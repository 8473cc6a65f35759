"""Chat templates: messages to prompt text, by the Jinja template a model brings along.

A template is a program from a file of unknown origin. It runs in Jinja's immutable sandbox, in a process of its own that sees
plain data only, and its time, its memory and the length of what it writes are bounded.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluscomp_formats.errors import ClusCompError, InvalidFileError, InvalidRequestError, Problem, UnsupportedError
from cluscomp_formats.ir import Array
from cluscomp_runtime.tokenizer import read_json_file

__all__ = ["Chat", "find_chat_template", "render_chat", "render_chats"]

MAX_CHARACTERS = 16 * 1024 * 1024
"""No real prompt is longer; a template that loops is stopped here."""

MAX_SECONDS = 30
"""Wall-clock time for a template; the process bounds its own processor time more tightly where the system can."""

CHATS_PER_PROCESS = 64
"""Starting a process takes longer than rendering many chats, but they share its time."""

_PROCESS = Path(__file__).with_name("chat_process.py")
_START = "import runpy, sys; sys.path[:] = {path!r}; runpy.run_path({program!r}, run_name='__main__')"


def find_chat_template(files: Mapping[str, Array]) -> str | None:
    """The template in `chat_template.jinja`, else the default one in `tokenizer_config.json`. Raises InvalidFileError."""
    if "chat_template.jinja" in files:
        try:
            return files["chat_template.jinja"].read().tobytes().decode("utf-8")
        except UnicodeDecodeError as error:
            raise InvalidFileError(Problem("bad_template", "not UTF-8", "chat_template.jinja")) from error
    template = read_json_file(files, "tokenizer_config.json").get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, Mapping)}
        template = named.get("default")
    if template is not None and not isinstance(template, str):
        raise InvalidFileError(Problem("bad_template", "chat_template is not a text", "tokenizer_config.json"))
    return template


@dataclass(frozen=True)
class Chat:
    """Messages, each with `role` and `content`; with `prompt`, the assistant's turn is opened at the end."""

    messages: Sequence[Mapping[str, Any]]
    prompt: bool = True


def render_chat(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    special_tokens: Mapping[str, str],
    add_generation_prompt: bool = True,
) -> str:
    """The prompt for `messages`, each with `role` and `content`. Raises what `render_chats` gives or raises."""
    outcome = render_chats(template, [Chat(messages, add_generation_prompt)], special_tokens=special_tokens)[0]
    if isinstance(outcome, ClusCompError):
        raise outcome
    return outcome


def render_chats(template: str, chats: Sequence[Chat], *, special_tokens: Mapping[str, str]) -> list[str | ClusCompError]:
    """The text of each chat, or the error that it gives.

    The template sees `messages`, `add_generation_prompt`, the special tokens by name (`bos_token`, ...) and what transformers
    offers: `raise_exception`, `strftime_now`, the `tojson` filter, loop controls. An error is InvalidRequestError for messages
    that are malformed or that the template refuses, InvalidFileError for a template with an error, UnsupportedError for one
    that reaches outside the sandbox or takes too much time, memory or space. Raises UnsupportedError if the process they run in
    does not start.
    """
    outcomes: list[str | ClusCompError] = []
    for start in range(0, len(chats), CHATS_PER_PROCESS):
        outcomes += _render(template, chats[start : start + CHATS_PER_PROCESS], special_tokens)
    return outcomes


def _render(template: str, chats: Sequence[Chat], special_tokens: Mapping[str, str]) -> list[str | ClusCompError]:
    outcomes: dict[int, str | ClusCompError] = {}
    requests: dict[int, str] = {}
    for index, chat in enumerate(chats):
        variables = {**special_tokens, "messages": list(chat.messages), "add_generation_prompt": chat.prompt}
        error = _malformed(chat.messages)
        try:
            requests[index] = json.dumps(variables)
        except (TypeError, ValueError, RecursionError) as fault:
            message = f"messages are plain data: texts, numbers, lists, objects ({fault})"
            error = error or InvalidRequestError(Problem("bad_messages", message))
        if error is not None:
            requests.pop(index, None)
            outcomes[index] = error
    if requests:
        limits = f'"template": {json.dumps(template)}, "max_characters": {MAX_CHARACTERS}'
        answers = _run(f'{{{limits}, "chats": [{", ".join(requests.values())}]}}', len(requests))
        outcomes |= {index: _outcome(answer) for index, answer in zip(requests, answers, strict=True)}
    return [outcomes[index] for index in range(len(chats))]


def _malformed(messages: Sequence[Mapping[str, Any]]) -> ClusCompError | None:
    malformed = [index for index, message in enumerate(messages) if not isinstance(message.get("role"), str)]
    if messages and not malformed:
        return None
    message = f"message {malformed[0]} has no role" if malformed else "a chat needs at least one message"
    return InvalidRequestError(Problem("bad_messages", message, expected="messages with role and content"))


def _outcome(answer: Mapping[str, str]) -> str | ClusCompError:
    if "text" in answer:
        return answer["text"]
    reason, message = answer["error"], answer["message"]
    if reason == "refused":
        return InvalidRequestError(Problem("refused_messages", f"the chat template refuses these messages: {message}"))
    if reason == "unsafe":
        return UnsupportedError(Problem("unsafe_template", f"the chat template reaches outside its sandbox: {message}"))
    if reason == "endless":
        return UnsupportedError(Problem("endless_template", "the chat template takes too much", found=message))
    return InvalidFileError(Problem("bad_template", f"the chat template fails: {message}"))


def _run(request: str, count: int) -> list[dict[str, str]]:
    """What the template's process answers for each of `count` chats, or that it was stopped."""
    code = _START.format(path=sys.path, program=str(_PROCESS))
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], input=request, capture_output=True, encoding="ascii", timeout=MAX_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return count * [{"error": "endless", "message": f"more than {MAX_SECONDS} seconds"}]
    except OSError as error:
        problem = Problem("no_process", f"the process chat templates run in does not start: {error}")
        raise UnsupportedError(problem) from error
    if done.returncode < 0:
        stopped = f"more processor time than it is given (signal {-done.returncode})"
        return count * [{"error": "endless", "message": stopped}]
    if done.returncode > 0:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise UnsupportedError(Problem("no_process", f"the process chat templates run in fails: {reason}"))
    answers: list[dict[str, str]] = json.loads(done.stdout)
    return answers
