"""The process that renders chat templates: reads a JSON request from standard input and writes JSON answers to standard output.

A template can loop forever and produce unlimited text, and only a separate process can be stopped. `templates.py` runs this
file by its path, isolated from the environment and the current folder. It imports only the standard library and jinja2, the
latter from the folders that its arguments name.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import sys
from collections.abc import Callable
from typing import Any, NoReturn

if __name__ == "__main__":
    # Appended after the standard library, so that files next to jinja2 cannot shadow its modules.
    sys.path.extend(sys.argv[1:])

import jinja2
import jinja2.exceptions
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import jinja2.utils

MEMORY_BYTES = 1 << 29
CPU_SECONDS = 10
OLDEST_JINJA2 = (3, 1, 6)
"""Templates can leave the sandbox of older versions (CVE-2025-27516)."""


class _RefusedByTemplateError(Exception):
    """The template called `raise_exception` because it does not support these messages."""


class _Generation(jinja2.ext.Extension):
    """The tag `{% generation %}` around the assistant's text: writes its content and records its position.

    `spans` has, for each block, the number of characters written before it, and its text.
    """

    tags = {"generation"}  # noqa: RUF012 - how jinja2 declares it

    def __init__(self, environment: jinja2.Environment) -> None:
        super().__init__(environment)
        self.present = False
        self.written = 0
        self.spans: list[tuple[int, str]] = []

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        self.present = True
        return jinja2.nodes.CallBlock(self.call_method("record"), [], [], body).set_lineno(line)

    def record(self, caller: Callable[[], str]) -> str:
        text = caller()
        self.spans.append((self.written, text))
        return text


class _Dict:
    """The `dict` of templates, as in transformers: creates dictionaries without exposing the type."""

    def __call__(self, *values: Any, **members: Any) -> dict[Any, Any]:
        return dict(*values, **members)

    def fromkeys(self, *values: Any) -> dict[Any, Any]:
        return dict.fromkeys(*values)


class _Namespace(jinja2.utils.Namespace):
    """The `namespace` of templates, as in transformers: rejects attributes that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        # The signature is jinja2's, so that a member may be named `self`.
        attributes = dict(*args[1:], **kwargs)
        for name in attributes:
            _check_attribute(name)
        jinja2.utils.Namespace.__init__(args[0], attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_attribute(name)
        super().__setitem__(name, value)


def _check_attribute(name: object) -> None:
    if str(name).startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace must not have the attribute {str(name)[:100]!r}")


def answers(request: dict[str, Any]) -> list[dict[str, Any]]:
    """Return an answer for each of `request["chats"]`, which are variables of the template.

    An answer has `text` and `spans`, the begins and ends of the output of `{% generation %}` blocks; `spans` is None if there
    are no blocks or their positions are unknown. Or it has `error` (`refused`, `unsafe`, `endless`, `bad`, `old`) and
    `message`.
    """
    chats = request["chats"]
    version = getattr(jinja2, "__version__", None)
    if version is not None and tuple(int(part) for part in version.split(".")[:3] if part.isdigit()) < OLDEST_JINJA2:
        return len(chats) * [{"error": "old", "message": version}]
    now = request.get("now")
    moment = datetime.datetime.now() if now is None else datetime.datetime.fromisoformat(now)
    environment = _environment(moment)
    error, template = _guarded(lambda: environment.from_string(request["template"]))
    if template is None:
        return len(chats) * [error]
    return [_answer(environment, template, variables, request["max_characters"]) for variables in chats]


def _environment(now: datetime.datetime) -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = now.strftime
    environment.globals["dict"] = _Dict()
    environment.globals["namespace"] = _Namespace
    return environment


def _answer(
    environment: jinja2.Environment, template: jinja2.Template, variables: dict[str, Any], max_characters: int
) -> dict[str, Any]:
    generation = environment.extensions[_Generation.identifier]
    assert isinstance(generation, _Generation)  # noqa: S101 - for the type checker
    generation.written, generation.spans = 0, []

    def render() -> str | None:
        pieces: list[str] = []
        for piece in template.generate(**variables):
            pieces.append(piece)
            generation.written += len(piece)
            if generation.written > max_characters:
                return None
        text = "".join(pieces)
        # Raises for a lone surrogate, which no tokenizer accepts.
        text.encode()
        return text

    error, text = _guarded(render)
    if error:
        return error
    if text is None:
        return {"error": "endless", "message": f"more than {max_characters} characters"}
    spans = [(begin, begin + len(said)) for begin, said in generation.spans]
    # The output of a block in a macro, or in a text that is stored first, is written later, at another position.
    known = all(text[begin:end] == said for (begin, end), (_, said) in zip(spans, generation.spans, strict=True))
    return {"text": text, "spans": spans if generation.present and known else None}


def _guarded(work: Callable[[], Any]) -> tuple[dict[str, Any], Any]:
    """Run `work`. Return an error (empty if there is none) and the result."""
    try:
        return {}, work()
    except _RefusedByTemplateError as error:
        return {"error": "refused", "message": str(error)}, None
    except jinja2.exceptions.SecurityError as error:
        return {"error": "unsafe", "message": str(error)}, None
    except MemoryError:
        return {"error": "endless", "message": f"more than {MEMORY_BYTES >> 20} MB of memory"}, None
    except Exception as error:  # noqa: BLE001 - an untrusted program may raise anything
        return {"error": "bad", "message": f"{type(error).__name__}: {error}"[:500]}, None


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes for HTML, but prompts are not HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: object) -> NoReturn:
    raise _RefusedByTemplateError(str(message)[:500])


def _limit() -> None:
    """Limit memory and time if the system supports it; otherwise the parent's timer is the only limit."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))


def _end_with_parent() -> None:
    """End this process with its parent, on Linux; elsewhere the limit of processor time ends an orphan."""
    with contextlib.suppress(ImportError, OSError, AttributeError):
        import ctypes
        import signal

        # PR_SET_PDEATHSIG. It refers to the parent's thread that started this process, which waits for it.
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


if __name__ == "__main__":
    _end_with_parent()
    _limit()
    sys.stdout.write(json.dumps(answers(json.load(sys.stdin))))
