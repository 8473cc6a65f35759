"""Chat templates: messages to prompt text, by the Jinja template a model brings along.

A template is a program from a file of unknown origin. It runs in Jinja's immutable sandbox, sees plain data only, and the
length of what it writes is bounded.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from cluscomp_formats.errors import InvalidFileError, InvalidRequestError, Problem, UnsupportedError
from cluscomp_formats.ir import Array
from cluscomp_runtime.tokenizer import read_json_file

__all__ = ["find_chat_template", "render_chat"]

MAX_CHARACTERS = 16 * 1024 * 1024
"""No real prompt is longer; a template that loops is stopped here."""


class _RefusedByTemplateError(Exception):
    """The template called `raise_exception`: these messages are not what the model was trained on."""


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
    reaches outside the sandbox or writes without end.
    """
    import jinja2
    import jinja2.exceptions
    import jinja2.ext
    import jinja2.sandbox

    malformed = [index for index, message in enumerate(messages) if not isinstance(message.get("role"), str)]
    if malformed or not messages:
        message = f"message {malformed[0]} has no role" if malformed else "a chat needs at least one message"
        raise InvalidRequestError(Problem("bad_messages", message, expected="messages with role and content"))
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda layout: datetime.datetime.now().astimezone().strftime(layout)
    variables = {**special_tokens, "messages": list(messages), "add_generation_prompt": add_generation_prompt}
    pieces: list[str] = []
    length = 0
    try:
        for piece in environment.from_string(template).generate(**variables):
            pieces.append(piece)
            length += len(piece)
            if length > MAX_CHARACTERS:
                expected = f"at most {MAX_CHARACTERS} characters"
                raise UnsupportedError(Problem("endless_template", "the chat template writes without end", expected=expected))
    except _RefusedByTemplateError as error:
        raise InvalidRequestError(Problem("refused_messages", f"the chat template refuses these messages: {error}")) from error
    except jinja2.exceptions.SecurityError as error:
        raise UnsupportedError(Problem("unsafe_template", f"the chat template reaches outside its sandbox: {error}")) from error
    except (jinja2.TemplateError, ArithmeticError, LookupError, TypeError, ValueError, AttributeError) as error:
        raise InvalidFileError(Problem("bad_template", f"the chat template fails: {error}")) from error
    return "".join(pieces)


def _to_json(value: object, indent: int | None = None) -> str:
    # Unlike Jinja's own filter, which escapes for HTML: prompts are not HTML.
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _refuse(message: object) -> NoReturn:
    raise _RefusedByTemplateError(str(message)[:500])
