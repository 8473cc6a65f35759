"""The process a chat template runs in: reads a request from standard input, writes the answer to standard output, both JSON.

A template can loop without end and multiply texts without bound; only a process of its own can be stopped. `chat.py` starts
this file by its path: it imports nothing of the package, so that it starts quickly.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import sys
from typing import Any, NoReturn

import jinja2
import jinja2.exceptions
import jinja2.ext
import jinja2.sandbox

MEMORY_BYTES = 1 << 29
CPU_SECONDS = 10


class _RefusedByTemplateError(Exception):
    """The template called `raise_exception`: these messages are not what the model was trained on."""


def answers(request: dict[str, Any]) -> list[dict[str, str]]:
    """For each of `chats`, variables of the template: `text`, or `error` (`refused`, `unsafe`, `endless`, `bad`), `message`."""
    return [_answer(request["template"], variables, request["max_characters"]) for variables in request["chats"]]


def _answer(template: str, variables: dict[str, Any], max_characters: int) -> dict[str, str]:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda layout: datetime.datetime.now().astimezone().strftime(layout)
    pieces: list[str] = []
    length = 0
    try:
        for piece in environment.from_string(template).generate(**variables):
            pieces.append(piece)
            length += len(piece)
            if length > max_characters:
                return {"error": "endless", "message": f"more than {max_characters} characters"}
        text = "".join(pieces)
        # A lone surrogate, which no tokenizer takes.
        text.encode()
    except _RefusedByTemplateError as error:
        return {"error": "refused", "message": str(error)}
    except jinja2.exceptions.SecurityError as error:
        return {"error": "unsafe", "message": str(error)}
    except MemoryError:
        return {"error": "endless", "message": f"more than {MEMORY_BYTES >> 20} MB of memory"}
    except Exception as error:  # noqa: BLE001 - whatever a program of unknown origin raises is its own fault
        return {"error": "bad", "message": f"{type(error).__name__}: {error}"[:500]}
    return {"text": text}


def _to_json(value: object, indent: int | None = None) -> str:
    # Unlike Jinja's own filter, which escapes for HTML: prompts are not HTML.
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _refuse(message: object) -> NoReturn:
    raise _RefusedByTemplateError(str(message)[:500])


def _limit() -> None:
    """Bound memory and time where the system can; elsewhere the parent's clock bounds both."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))


if __name__ == "__main__":
    _limit()
    sys.stdout.write(json.dumps(answers(json.load(sys.stdin))))
