"""Chat templates: messages to prompt text, by the Jinja template a model brings along.

A template is a program from a file of unknown origin. It runs in Jinja's immutable sandbox, in a process of its own that sees
plain data only, and its time, its memory and the length of what it writes are bounded.
"""

from __future__ import annotations

import datetime
import json
import os
import subprocess
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from cluscomp_formats.errors import ClusCompError, InvalidFileError, InvalidRequestError, Problem, UnsupportedError

__all__ = ["Chat", "Rendered", "render_chat", "render_chats"]

MAX_CHARACTERS = 16 * 1024 * 1024
"""No real prompt is longer; a template that loops is stopped here."""

MAX_SECONDS = 30
"""Wall-clock time for a template; the process bounds its own processor time more tightly where the system can."""

CHATS_PER_PROCESS = 64
"""Starting a process takes longer than rendering many chats, but they share its time."""

_PROCESS = Path(__file__).with_name("process.py")
_FOLDER = _PROCESS.parent
_LIBRARIES = ("jinja2", "markupsafe")
_KEPT_VARIABLES = ("SYSTEMROOT", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")
"""Of the environment, what Python itself may not start without."""

_REASONING = ("reasoning_content", "thinking", "reasoning")
"""Members that a message's reasoning goes by; the first is what templates read, but for gpt-oss's, which reads the second."""

_CUT = "CONTINUE-THE-FINAL-MESSAGE-HERE "
"""Marks the end of a final message that is to be continued. A template that strips the message takes the space away."""


@dataclass(frozen=True)
class Chat:
    """Messages, each with `role` and mostly `content`, and what else the template is given.

    With `prompt`, the assistant's turn is opened at the end. With `continue_final`, the text ends with the content of the final
    message, its turn still open; `prompt` should be False then. `tools` are JSON schemas of functions, `documents` objects with
    `title` and `text`. `variables` are those that a template has of its own, such as `enable_thinking`.
    """

    messages: Sequence[Mapping[str, Any]]
    prompt: bool = True
    tools: Sequence[Mapping[str, Any]] | None = None
    documents: Sequence[Mapping[str, Any]] | None = None
    continue_final: bool = False
    variables: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Rendered:
    """The text of a chat. `generated` are the begins and ends, in characters, of what the template's generation blocks wrote;
    None for a template without such blocks, or with blocks that do not tell where they write."""

    text: str
    generated: tuple[tuple[int, int], ...] | None = None


def render_chat(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    special_tokens: Mapping[str, str],
    tools: Sequence[Mapping[str, Any]] | None = None,
    documents: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    **variables: Any,
) -> str:
    """The text of one chat, a `Chat` of these members. Raises what `render_chats` gives or raises."""
    prompt = add_generation_prompt and not continue_final_message
    chat = Chat(messages, prompt, tools, documents, continue_final_message, variables)
    outcome = render_chats(template, [chat], special_tokens=special_tokens)[0]
    if isinstance(outcome, ClusCompError):
        raise outcome
    return outcome.text


def render_chats(template: str, chats: Sequence[Chat], *, special_tokens: Mapping[str, str]) -> list[Rendered | ClusCompError]:
    """The text of each chat, or the error that it gives.

    The template sees `messages`, `tools` and `documents` (none where there are none), `add_generation_prompt`, the special
    tokens by name (`bos_token`, ...), a chat's variables, and what transformers offers: `raise_exception`, `strftime_now`, the
    `tojson` filter with its options, loop controls and `{% generation %}`. Members of messages that are None are left out, and
    reasoning is there by the names that templates read.

    An error is InvalidRequestError for messages that are malformed or that the template refuses, InvalidFileError for a
    template with an error, UnsupportedError for one that reaches outside the sandbox or takes too much time, memory or space.
    Raises UnsupportedError if the process they run in does not start.
    """
    outcomes: list[Rendered | ClusCompError] = []
    for start in range(0, len(chats), CHATS_PER_PROCESS):
        outcomes += _render(template, chats[start : start + CHATS_PER_PROCESS], special_tokens)
    return outcomes


def _render(template: str, chats: Sequence[Chat], special_tokens: Mapping[str, str]) -> list[Rendered | ClusCompError]:
    outcomes: dict[int, Rendered | ClusCompError] = {}
    requests: dict[int, str] = {}
    for index, chat in enumerate(chats):
        request = _request(chat, special_tokens)
        if isinstance(request, ClusCompError):
            outcomes[index] = request
        else:
            requests[index] = request
    if requests:
        settings = {"template": template, "max_characters": MAX_CHARACTERS, "now": datetime.datetime.now().isoformat()}
        # Every chat is JSON already: it was looked at by itself.
        answers = _run(f'{json.dumps(settings)[:-1]}, "chats": [{", ".join(requests.values())}]}}', len(requests))
        for index, answer in zip(requests, answers, strict=True):
            outcomes[index] = _outcome(answer, chats[index])
    return [outcomes[index] for index in range(len(chats))]


def _request(chat: Chat, special_tokens: Mapping[str, str]) -> str | ClusCompError:
    """The template's variables for a chat, as JSON, or what is wrong with the chat."""
    try:
        return json.dumps(_variables(chat, special_tokens))
    except InvalidRequestError as error:
        return error
    except (TypeError, ValueError, RecursionError) as fault:
        message = f"messages are plain data: texts, numbers, lists, objects ({fault})"
        return InvalidRequestError(Problem("bad_messages", message))


def _variables(chat: Chat, special_tokens: Mapping[str, str]) -> dict[str, Any]:
    """What the template sees of a chat. Raises InvalidRequestError."""
    malformed = [
        index
        for index, message in enumerate(chat.messages)
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str)
    ]
    if malformed or not chat.messages:
        message = f"message {malformed[0]} has no role" if malformed else "a chat needs at least one message"
        raise InvalidRequestError(Problem("bad_messages", message, expected="messages with role and content"))
    return {
        **special_tokens,
        **chat.variables,
        "messages": _messages(chat),
        "tools": _objects("tools", chat.tools),
        "documents": _objects("documents", chat.documents),
        "add_generation_prompt": chat.prompt,
    }


def _objects(name: str, values: Sequence[Mapping[str, Any]] | None) -> list[dict[str, Any]] | None:
    if values is None:
        return None
    if isinstance(values, (str, Mapping)) or not all(isinstance(value, Mapping) for value in values):
        expected = "a list of objects" + (": JSON schemas of functions" if name == "tools" else "")
        raise InvalidRequestError(Problem("bad_messages", f"{name} is malformed", found=repr(values)[:200], expected=expected))
    return [dict(value) for value in values]


def _messages(chat: Chat) -> list[dict[str, Any]]:
    """Messages as transformers hands them to a template, the end of a final one that is to be continued marked."""
    messages = []
    for message in chat.messages:
        present = {name: value for name, value in message.items() if value is not None}
        reasoning = next((present[name] for name in _REASONING if name in present), None)
        if reasoning is not None:
            present = {"thinking": reasoning, **present, "reasoning_content": reasoning}
        messages.append(present)
    if chat.continue_final:
        messages[-1]["content"] = _marked(messages[-1].get("content"))
    return messages


def _marked(content: object) -> str | list[Any]:
    """The content with the mark after its last text. Raises InvalidRequestError if there is no text."""
    if isinstance(content, str):
        return content + _CUT
    parts = list(content) if isinstance(content, (list, tuple)) else []
    index = _last_text(parts)
    if index is None:
        raise InvalidRequestError(Problem("bad_messages", "the final message has no text to continue"))
    parts[index] = {**parts[index], "text": parts[index]["text"] + _CUT}
    return parts


def _last_text(parts: Sequence[Any]) -> int | None:
    """The index of the last part of a content that has a text."""
    texts = [index for index, part in enumerate(parts) if isinstance(part, Mapping) and isinstance(part.get("text"), str)]
    return texts[-1] if texts else None


def _outcome(answer: Mapping[str, Any], chat: Chat) -> Rendered | ClusCompError:
    if "text" not in answer:
        return _error(answer["error"], answer["message"])
    if chat.continue_final:
        return _continued(answer["text"], chat.messages[-1]["content"])
    spans = answer["spans"]
    return Rendered(answer["text"], None if spans is None else tuple((begin, end) for begin, end in spans))


def _continued(text: str, content: str | list[Any] | tuple[Any, ...]) -> Rendered | ClusCompError:
    """The text of a chat up to the mark in its final message, which has this content."""
    end = text.rfind(_CUT.strip())
    said = content if isinstance(content, str) else str(content[_last_text(content) or 0]["text"])
    # Written otherwise than it is (quoted, say), or in part, it cannot be gone on with.
    if end < 0 or said.strip() not in text:
        message = "the chat template does not write the final message as it is, so it cannot be continued"
        return InvalidRequestError(Problem("refused_messages", message))
    return Rendered(text[:end] if text.startswith(_CUT, end) else text[:end].rstrip())


def _error(reason: str, message: str) -> ClusCompError:
    if reason == "refused":
        return InvalidRequestError(Problem("refused_messages", f"the chat template refuses these messages: {message}"))
    if reason == "unsafe":
        return UnsupportedError(Problem("unsafe_template", f"the chat template reaches outside its sandbox: {message}"))
    if reason == "endless":
        return UnsupportedError(Problem("endless_template", "the chat template takes too much", found=message))
    if reason == "old":
        old, remedy = "a chat template can leave the sandbox of this jinja2", 'pip install --upgrade "jinja2>=3.1.6"'
        return UnsupportedError(Problem("old_jinja2", old, found=message, expected="3.1.6 or newer", remedy=remedy))
    return InvalidFileError(Problem("bad_template", f"the chat template fails: {message}"))


def _run(request: str, count: int) -> list[dict[str, Any]]:
    """What the template's process answers for each of `count` chats, or that it was stopped.

    The process is isolated (`-I -S`): of the environment, the current folder and installed packages, nothing runs in it.
    """
    command = [sys.executable, "-I", "-S", str(_PROCESS), *_library_folders()]
    environment = {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ}
    try:
        done = subprocess.run(
            command,
            input=request,
            capture_output=True,
            encoding="ascii",
            timeout=MAX_SECONDS,
            check=False,
            env=environment,
            cwd=_FOLDER,
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
    answers: list[dict[str, Any]] = json.loads(done.stdout)
    return answers


def _library_folders() -> list[str]:
    """The folders that hold jinja2 and what it needs. Raises UnsupportedError.

    The current folder is not one of them, though Python may have it on `sys.path`: it may be a model's, with files of any name.
    """
    installed = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    searched = [entry for entry in sys.path if entry in installed or not _is_current(entry)]
    folders = []
    for name in _LIBRARIES:
        found = PathFinder.find_spec(name, searched)
        if found is None or found.origin is None:
            remedy = f"pip install {name}, into another folder than the current one"
            raise UnsupportedError(Problem("no_jinja2", f"chat templates need {name}, which is not installed", remedy=remedy))
        folders.append(str(Path(found.origin).absolute().parents[1]))
    return list(dict.fromkeys(folders))


def _is_current(entry: str) -> bool:
    """Whether an entry of `sys.path` is the current folder."""
    try:
        return not entry or os.path.samefile(entry, os.curdir)  # noqa: PTH121 - an entry need not be a path at all
    except OSError:
        return False
