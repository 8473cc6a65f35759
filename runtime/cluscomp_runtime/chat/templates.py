"""Render chat messages to prompt text with the Jinja chat template of a model.

A template is a program from an untrusted file. It runs in Jinja's immutable sandbox, in a separate process that receives only
plain data, with limits on time, memory and the length of the output.
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
"""Limit of the output, above any real prompt; it stops templates that loop."""

MAX_SECONDS = 30
"""Wall-clock limit of a process; if the system supports it, the process has a tighter limit of processor time."""

CHATS_PER_PROCESS = 64
"""Chats per process. Starting one takes longer than rendering many chats, but the chats share its time limit."""

_PROCESS = Path(__file__).with_name("process.py")
_FOLDER = _PROCESS.parent
_LIBRARIES = ("jinja2", "markupsafe")
_KEPT_VARIABLES = ("SYSTEMROOT", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")
"""Environment variables that Python may need to start."""

_REASONING = ("reasoning_content", "thinking", "reasoning")
"""Names of a message's reasoning. Templates read the first, except that of gpt-oss, which reads the second."""

_CONTINUE_MARK = "CONTINUE-THE-FINAL-MESSAGE-HERE "
"""Marks the end of a final message that is to be continued. A template that strips the message removes the space."""


@dataclass(frozen=True)
class Chat:
    """The messages of a chat, each with `role` and usually `content`, and the other inputs of a template.

    With `prompt`, the text ends with the beginning of the assistant's turn. With `continue_final`, it ends with the content of
    the final message, so that the model continues it; `prompt` should then be False. `tools` are JSON schemas of functions;
    `documents` are objects with `title` and `text`. `variables` are specific to a template, such as `enable_thinking`.
    """

    messages: Sequence[Mapping[str, Any]]
    prompt: bool = True
    tools: Sequence[Mapping[str, Any]] | None = None
    documents: Sequence[Mapping[str, Any]] | None = None
    continue_final: bool = False
    variables: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Rendered:
    """The text of a chat.

    `generated` has the spans (begin, end), in characters, of the output of the template's generation blocks. It is None if the
    template has no such blocks, or if the position of their output is unknown.
    """

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
    """Return the text of one chat, with arguments as in `Chat`. Raises the errors that `render_chats` returns or raises."""
    prompt = add_generation_prompt and not continue_final_message
    chat = Chat(messages, prompt, tools, documents, continue_final_message, variables)
    outcome = render_chats(template, [chat], special_tokens=special_tokens)[0]
    if isinstance(outcome, ClusCompError):
        raise outcome
    return outcome.text


def render_chats(template: str, chats: Sequence[Chat], *, special_tokens: Mapping[str, str]) -> list[Rendered | ClusCompError]:
    """Return, for each chat, its text or the error it caused.

    The template gets `messages`, `tools` and `documents` (None if there are none), `add_generation_prompt`, the special tokens
    by name (`bos_token`, ...), the chat's variables, and the additions of transformers: `raise_exception`, `strftime_now`, the
    `tojson` filter with its options, loop controls and `{% generation %}`. Members of a message that are None are omitted;
    reasoning is available by every name that templates read.

    A chat's error is InvalidRequestError if its messages are malformed or the template rejects them; InvalidFileError if the
    template has an error; UnsupportedError if the template leaves the sandbox or exceeds its limits of time, memory or output.
    Raises UnsupportedError if the process does not start.
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
        # Each chat was converted to JSON by itself, so that one chat's error does not affect the others.
        answers = _run(f'{json.dumps(settings)[:-1]}, "chats": [{", ".join(requests.values())}]}}', len(requests))
        for index, answer in zip(requests, answers, strict=True):
            outcomes[index] = _outcome(answer, chats[index])
    return [outcomes[index] for index in range(len(chats))]


def _request(chat: Chat, special_tokens: Mapping[str, str]) -> str | ClusCompError:
    """Return the template's variables for a chat as JSON, or the error in the chat."""
    try:
        return json.dumps(_variables(chat, special_tokens))
    except InvalidRequestError as error:
        return error
    except (TypeError, ValueError, RecursionError) as fault:
        message = f"messages must be plain data: texts, numbers, lists, objects ({fault})"
        return InvalidRequestError(Problem("bad_messages", message))


def _variables(chat: Chat, special_tokens: Mapping[str, str]) -> dict[str, Any]:
    """Return the template's variables for a chat. Raises InvalidRequestError if its messages are malformed."""
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
    """Return the messages as transformers passes them to a template; the end of a message to be continued is marked."""
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
    """Return the content with the mark after its last text. Raises InvalidRequestError if there is no text."""
    if isinstance(content, str):
        return content + _CONTINUE_MARK
    parts = list(content) if isinstance(content, (list, tuple)) else []
    index = _last_text(parts)
    if index is None:
        raise InvalidRequestError(Problem("bad_messages", "the final message has no text to continue"))
    parts[index] = {**parts[index], "text": parts[index]["text"] + _CONTINUE_MARK}
    return parts


def _last_text(parts: Sequence[Any]) -> int | None:
    """Return the index of the last part that has a text, None if there is none."""
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
    """Return the text of a chat up to the mark in its final message, which has this content."""
    end = text.rfind(_CONTINUE_MARK.strip())
    original = content if isinstance(content, str) else str(content[_last_text(content) or 0]["text"])
    # A message that the template changed (quoted, say) or wrote in part cannot be continued.
    if end < 0 or original.strip() not in text:
        message = "the chat template does not write the final message unchanged, so it cannot be continued"
        return InvalidRequestError(Problem("refused_messages", message))
    return Rendered(text[:end] if text.startswith(_CONTINUE_MARK, end) else text[:end].rstrip())


def _error(reason: str, message: str) -> ClusCompError:
    if reason == "refused":
        return InvalidRequestError(Problem("refused_messages", f"the chat template rejects these messages: {message}"))
    if reason == "unsafe":
        return UnsupportedError(Problem("unsafe_template", f"the chat template tries to leave its sandbox: {message}"))
    if reason == "endless":
        return UnsupportedError(Problem("endless_template", "the chat template exceeds a limit", found=message))
    if reason == "old":
        old, remedy = "chat templates can leave the sandbox of this jinja2", 'pip install --upgrade "jinja2>=3.1.6"'
        return UnsupportedError(Problem("old_jinja2", old, found=message, expected="3.1.6 or newer", remedy=remedy))
    return InvalidFileError(Problem("bad_template", f"the chat template fails: {message}"))


def _run(request: str, count: int) -> list[dict[str, Any]]:
    """Return the answer of the template's process for each of `count` chats, or that it was stopped.

    The process is isolated (`-I -S`): it runs no code from the environment, the current folder or installed packages.
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
        problem = Problem("no_process", f"the process for chat templates does not start: {error}")
        raise UnsupportedError(problem) from error
    if done.returncode < 0:
        stopped = f"more processor time than allowed (signal {-done.returncode})"
        return count * [{"error": "endless", "message": stopped}]
    if done.returncode > 0:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise UnsupportedError(Problem("no_process", f"the process for chat templates fails: {reason}"))
    answers: list[dict[str, Any]] = json.loads(done.stdout)
    return answers


def _library_folders() -> list[str]:
    """Return the folders of jinja2 and its dependencies. Raises UnsupportedError if they are not installed.

    The current folder is excluded even if it is on `sys.path`: it may belong to a model and contain files of any name.
    """
    installed = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    searched = [entry for entry in sys.path if entry in installed or not _is_current(entry)]
    folders = []
    for name in _LIBRARIES:
        found = PathFinder.find_spec(name, searched)
        if found is None or found.origin is None:
            remedy = f"pip install {name}, in a folder other than the current one"
            raise UnsupportedError(Problem("no_jinja2", f"chat templates need {name}, which is not installed", remedy=remedy))
        folders.append(str(Path(found.origin).absolute().parents[1]))
    return list(dict.fromkeys(folders))


def _is_current(entry: str) -> bool:
    """Return whether an entry of `sys.path` is the current folder."""
    try:
        return not entry or os.path.samefile(entry, os.curdir)  # noqa: PTH121 - an entry need not be a path at all
    except OSError:
        return False
