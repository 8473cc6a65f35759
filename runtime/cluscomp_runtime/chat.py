"""Chat templates: messages to prompt text, by the Jinja template a model brings along.

A template is a program from a file of unknown origin. It runs in Jinja's immutable sandbox, in a process of its own that sees
plain data only, and its time, its memory and the length of what it writes are bounded.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cluscomp_formats.errors import InvalidFileError, InvalidRequestError, Problem, UnsupportedError
from cluscomp_formats.ir import Array
from cluscomp_runtime.tokenizer import read_json_file

__all__ = ["find_chat_template", "render_chat"]

MAX_CHARACTERS = 16 * 1024 * 1024
"""No real prompt is longer; a template that loops is stopped here."""

MAX_SECONDS = 30
"""Wall-clock time for a template; the process bounds its own processor time more tightly where the system can."""

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


def render_chat(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    special_tokens: Mapping[str, str],
    add_generation_prompt: bool = True,
) -> str:
    """The prompt for `messages`, each with `role` and `content`.

    The template sees `messages`, `add_generation_prompt`, the special tokens by name (`bos_token`, ...) and what transformers
    offers: `raise_exception`, `strftime_now`, the `tojson` filter, loop controls. Raises InvalidRequestError for messages that
    are malformed or that the template refuses, InvalidFileError for a template with an error, UnsupportedError for one that
    reaches outside the sandbox or takes too much time, memory or space.
    """
    malformed = [index for index, message in enumerate(messages) if not isinstance(message.get("role"), str)]
    if malformed or not messages:
        message = f"message {malformed[0]} has no role" if malformed else "a chat needs at least one message"
        raise InvalidRequestError(Problem("bad_messages", message, expected="messages with role and content"))
    variables = {**special_tokens, "messages": list(messages), "add_generation_prompt": add_generation_prompt}
    try:
        request = json.dumps({"template": template, "variables": variables, "max_characters": MAX_CHARACTERS})
    except (TypeError, ValueError, RecursionError) as error:
        message = f"messages are plain data: texts, numbers, lists, objects ({error})"
        raise InvalidRequestError(Problem("bad_messages", message)) from error
    answer = _run(request)
    if "text" in answer:
        return answer["text"]
    reason, message = answer["error"], answer["message"]
    if reason == "refused":
        raise InvalidRequestError(Problem("refused_messages", f"the chat template refuses these messages: {message}"))
    if reason == "unsafe":
        raise UnsupportedError(Problem("unsafe_template", f"the chat template reaches outside its sandbox: {message}"))
    if reason == "endless":
        raise UnsupportedError(Problem("endless_template", "the chat template takes too much", found=message))
    raise InvalidFileError(Problem("bad_template", f"the chat template fails: {message}"))


def _run(request: str) -> dict[str, str]:
    """What the template's process answers, or that it was stopped."""
    code = _START.format(path=sys.path, program=str(_PROCESS))
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], input=request, capture_output=True, encoding="ascii", timeout=MAX_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return {"error": "endless", "message": f"more than {MAX_SECONDS} seconds"}
    except OSError as error:
        problem = Problem("no_process", f"the process chat templates run in does not start: {error}")
        raise UnsupportedError(problem) from error
    if done.returncode < 0:
        return {"error": "endless", "message": f"more processor time than it is given (signal {-done.returncode})"}
    if done.returncode > 0:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise UnsupportedError(Problem("no_process", f"the process chat templates run in fails: {reason}"))
    answer: dict[str, str] = json.loads(done.stdout)
    return answer
