"""The chat templates in a model's side files, by name.

They are searched in transformers' order: `chat_template.jinja` and `additional_chat_templates/NAME.jinja`; if there is neither,
`chat_template` in `tokenizer_config.json`, which is a template or a list of named ones; otherwise the `chat_template.json` of a
processor.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cluscomp_formats.errors import InvalidFileError, InvalidRequestError, Problem
from cluscomp_formats.ir import Array
from cluscomp_formats.tokens.json_files import read_json_file

__all__ = ["DEFAULT", "choose_chat_template", "find_chat_templates", "is_template_file"]

DEFAULT = "default"
TOOL_USE = "tool_use"
"""Name of the template that is used for chats with tools, if it exists."""

_FILE, _FOLDER, _SUFFIX = "chat_template.jinja", "additional_chat_templates/", ".jinja"
_JSON_FILES = ("tokenizer_config.json", "chat_template.json")


def is_template_file(name: str) -> bool:
    """Return whether the side file of this name may have chat templates."""
    return name in (_FILE, *_JSON_FILES) or _is_additional(name)


def find_chat_templates(files: Mapping[str, Array]) -> dict[str, str]:
    """Return templates by name, a single one as `default`; empty if there are none.

    Raises InvalidFileError if a file with templates is malformed.
    """
    named = {name.removeprefix(_FOLDER).removesuffix(_SUFFIX): _text(files, name) for name in files if _is_additional(name)}
    if _FILE in files:
        named.setdefault(DEFAULT, _text(files, _FILE))
    return named or _in_json(files, _JSON_FILES[0]) or _in_json(files, _JSON_FILES[1])


def choose_chat_template(templates: Mapping[str, str], *, tools: bool = False, remedy: str = "give a plain prompt") -> str:
    """Return the template that transformers uses for a chat, with or without tools. Raises InvalidRequestError if none fits."""
    if tools and TOOL_USE in templates:
        return templates[TOOL_USE]
    if DEFAULT in templates:
        return templates[DEFAULT]
    if templates:
        message, found = "none of the model's chat templates is the default one", ", ".join(sorted(templates))
        raise InvalidRequestError(Problem("no_chat_template", message, None, None, found[:200], DEFAULT, remedy))
    raise InvalidRequestError(Problem("no_chat_template", "this model has no chat template", remedy=remedy))


def _is_additional(name: str) -> bool:
    return name.startswith(_FOLDER) and name.endswith(_SUFFIX)


def _text(files: Mapping[str, Array], name: str) -> str:
    try:
        # transformers reads templates as text files, which converts all line ends to \n.
        return files[name].read().tobytes().decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise InvalidFileError(Problem("bad_template", "not UTF-8", name, found=f"byte {error.start}")) from error


def _in_json(files: Mapping[str, Array], name: str) -> dict[str, str]:
    stored: Any = read_json_file(files, name).get("chat_template")
    if stored is None:
        return {}
    if isinstance(stored, list):
        stored = {
            entry["name"]: entry.get("template")
            for entry in stored
            if isinstance(entry, Mapping) and _is_name(entry.get("name"))
        }
    else:
        stored = {DEFAULT: stored}
    broken = [key for key, template in stored.items() if not isinstance(template, str)]
    if broken:
        found = type(stored[broken[0]]).__name__
        raise InvalidFileError(Problem("bad_template", "chat_template is not a text", name, broken[0][:200], found, "a text"))
    return dict(stored)


def _is_name(value: object) -> bool:
    return isinstance(value, str)
