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
    # After the standard library, so that nothing beside jinja2 takes the place of a module of it.
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
"""Templates get out of the sandbox of older ones (CVE-2025-27516)."""


class _RefusedByTemplateError(Exception):
    """The template called `raise_exception`: these messages are not what the model was trained on."""


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` around what the model says: writes its content, and tells what it is and where.

    `spans` has, for each block, how many characters were written before it, and its text.
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
        return jinja2.nodes.CallBlock(self.call_method("note"), [], [], body).set_lineno(line)

    def note(self, caller: Callable[[], str]) -> str:
        text = caller()
        self.spans.append((self.written, text))
        return text


class _Dict:
    """What `dict` is in a template, as in transformers: makes dictionaries, and is not the type."""

    def __call__(self, *values: Any, **members: Any) -> dict[Any, Any]:
        return dict(*values, **members)

    def fromkeys(self, *values: Any) -> dict[Any, Any]:
        return dict.fromkeys(*values)


class _Namespace(jinja2.utils.Namespace):
    """What `namespace` makes in a template, as in transformers: it holds no attribute that begins with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        # As jinja2's own does, so that a member may be called `self`.
        attributes = dict(*args[1:], **kwargs)
        for name in attributes:
            _check_attribute(name)
        jinja2.utils.Namespace.__init__(args[0], attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_attribute(name)
        super().__setitem__(name, value)


def _check_attribute(name: object) -> None:
    if str(name).startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace does not hold {str(name)[:100]!r}")


def answers(request: dict[str, Any]) -> list[dict[str, Any]]:
    """An answer for each of `chats`, variables of the template.

    It has `text`, and `spans`: begin and end of what `{% generation %}` blocks wrote, None if there are none or it is not known
    where in the text they are. Or it has `error` (`refused`, `unsafe`, `endless`, `bad`, `old`) and `message`.
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
        # A lone surrogate, which no tokenizer takes.
        text.encode()
        return text

    error, text = _guarded(render)
    if error:
        return error
    if text is None:
        return {"error": "endless", "message": f"more than {max_characters} characters"}
    spans = [(begin, begin + len(said)) for begin, said in generation.spans]
    # A block in a macro, or in a text that is kept first, does not write where the text has come to.
    known = all(text[begin:end] == said for (begin, end), (_, said) in zip(spans, generation.spans, strict=True))
    return {"text": text, "spans": spans if generation.present and known else None}


def _guarded(work: Callable[[], Any]) -> tuple[dict[str, Any], Any]:
    """What went wrong (else an empty dictionary) and the result."""
    try:
        return {}, work()
    except _RefusedByTemplateError as error:
        return {"error": "refused", "message": str(error)}, None
    except jinja2.exceptions.SecurityError as error:
        return {"error": "unsafe", "message": str(error)}, None
    except MemoryError:
        return {"error": "endless", "message": f"more than {MEMORY_BYTES >> 20} MB of memory"}, None
    except Exception as error:  # noqa: BLE001 - whatever a program of unknown origin raises is its own fault
        return {"error": "bad", "message": f"{type(error).__name__}: {error}"[:500]}, None


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Unlike Jinja's own filter, which escapes for HTML: prompts are not HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: object) -> NoReturn:
    raise _RefusedByTemplateError(str(message)[:500])


def _limit() -> None:
    """Bound memory and time where the system can; elsewhere the parent's clock bounds both."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))


def _end_with_parent() -> None:
    """On Linux; elsewhere the limit of processor time ends what a killed parent leaves."""
    with contextlib.suppress(ImportError, OSError, AttributeError):
        import ctypes
        import signal

        # PR_SET_PDEATHSIG. The thread that starts this process waits for it, so it is there as long as the parent.
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


if __name__ == "__main__":
    _end_with_parent()
    _limit()
    sys.stdout.write(json.dumps(answers(json.load(sys.stdin))))
