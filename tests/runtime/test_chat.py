"""Chat templates: texts are those of transformers, and hostile templates are contained."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from runtime_models import byte_tokenizer_files, clustered_model, side_file, small_config

from cluscomp_formats.errors import InvalidFileError, InvalidRequestError, UnsupportedError
from cluscomp_formats.ir import Array
from cluscomp_formats.tokens.chat_templates import choose_chat_template, find_chat_templates
from cluscomp_runtime import LanguageModel
from cluscomp_runtime.chat import Chat, Rendered, process, render_chat, render_chats, templates
from cluscomp_runtime.tokenizer import Tokenizer

TEMPLATE = """{{ bos_token }}
{%- for message in messages %}
    {%- if message.role == 'system' and not loop.first %}
        {{- raise_exception('system comes first') }}
    {%- endif %}
    {%- if message.role == 'skip' %}{% continue %}{% endif %}
<{{ message['role'] }}>{{ message['content'] | trim }}{{ eos_token }}
{% endfor %}
{% if add_generation_prompt %}
<assistant>
{% endif %}
{{ {'a': "<b>"} | tojson }}"""
MESSAGES = [{"role": "user", "content": " Hi "}, {"role": "skip", "content": "x"}, {"role": "assistant", "content": "<Hello>"}]
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}


TOOLS = [
    {"type": "function", "function": {"name": "größe", "parameters": {"type": "object", "properties": {"b": {}, "a": {}}}}}
]
CALL = {"type": "function", "function": {"name": "größe", "arguments": {"x": [1, 2.5, None, True]}}}
TOOL_CHAT: list[dict[str, Any]] = [
    {"role": "user", "content": [{"type": "text", "text": "What <size>?"}, {"type": "image"}]},
    {"role": "assistant", "content": None, "reasoning": "Hm.", "tool_calls": [CALL]},
    {"role": "tool", "name": "größe", "content": "4 m"},
    {"role": "assistant", "content": "Four. "},
]


@pytest.fixture(scope="module")
def peer() -> transformers.PreTrainedTokenizerFast:
    """Return transformers' renderer, with these special tokens."""
    tokenizer = Tokenizer.from_files(byte_tokenizer_files())
    assert tokenizer is not None
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend, **SPECIAL)


@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_templates_render_as_in_transformers(add_generation_prompt: bool, peer: transformers.PreTrainedTokenizerFast) -> None:
    expected = peer.apply_chat_template(
        MESSAGES, chat_template=TEMPLATE, tokenize=False, add_generation_prompt=add_generation_prompt
    )
    found = render_chat(TEMPLATE, MESSAGES, special_tokens=SPECIAL, add_generation_prompt=add_generation_prompt)
    assert found == expected
    assert "<b>" in found


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{% generation %}{{ m.role }}{% endgeneration %}{% endfor %}",
        "{{ tools is defined }} {{ tools is none }} {{ documents is none }} {{ documents is defined }} {{ x is defined }}",
        "{% if tools is not none %}{{ tools | length }}{{ tools | tojson }}{% endif %}",
        "{% for d in documents %}{{ d.text }}{% endfor %}",
        "{{ tools | tojson(indent=2) }}{{ tools | tojson(ensure_ascii=true) }}{{ tools | tojson(true, 1) }}",
        "{{ messages | tojson(separators=(',', ':'), sort_keys=true) }}",
        "{{ messages[1] }} {{ messages[1].content is defined }} {{ messages[1].thinking }} {{ messages[1].reasoning_content }}",
        "{% for call in messages[1].tool_calls %}{{ call.function.arguments | tojson }}{{ call.function }}{% endfor %}",
        "{% for part in messages[0].content %}{{ part.text if part.type == 'text' else part.type }}{% endfor %}",
        "{{ messages[0].content is string }} {{ messages[0].content is iterable }} {{ messages[0].content is mapping }}",
        "{{ bos_token }}{{ sep_token }}{{ pad_token }}{{ image_token }}{{ thinking }}{{ enable_thinking is true }}",
        "{% set ns = namespace(self=1, x=0) %}{% for m in messages %}{% set ns.x = ns.x + ns.self %}{% endfor %}{{ ns.x }}",
        "{% set ns = namespace(_x=0) %}",
        "{% set ns = namespace() %}{% set ns._x = 1 %}",
        "{{ dict(a=1) }} {{ dict.fromkeys(['b', 'c'], 2) }}",
        "{{ dict.mro() }}",
        "{% for m in messages %}{% if m.tool_calls %}{% continue %}{% endif %}{{ m.role }}{% break %}{% endfor %}",
        "{{ messages[0].items() | list | length }}{{ messages[3].content.split(' ') }}{{ messages[3].content[:-1] }}",
        "{{ messages | map(attribute='role') | join(',') }}\n\n{{ messages[-1].content | trim | upper }}\n",
        "{{ raise_exception('no') }}",
        "{{ messages | nofilter }}",
        "  {% if true %}\n  a\n  {%- endif %}\n\r\n  b {# c #}\n",
        "{{ strftime_now('%d %B %Y %H %Z|') }}",
    ],
)
@pytest.mark.parametrize("tools", [None, TOOLS])
@pytest.mark.usefixtures("no_process", "same_clock")
def test_what_templates_are_given(template: str, tools: Any, peer: transformers.PreTrainedTokenizerFast) -> None:
    documents = None if tools is None else [{"title": "T", "text": "Ü"}]
    more: dict[str, Any] = {"tools": tools, "documents": documents, "enable_thinking": True, "image_token": "<i>"}
    expected: str | None
    try:
        expected = str(peer.apply_chat_template(TOOL_CHAT, chat_template=template, tokenize=False, **more))
    except Exception:  # noqa: BLE001 - whatever it is that transformers raises
        expected = None
    found: str | None
    try:
        found = render_chat(template, TOOL_CHAT, special_tokens=SPECIAL, add_generation_prompt=False, **more)
    except (InvalidFileError, InvalidRequestError, UnsupportedError):
        found = None
    assert found == expected


@pytest.mark.usefixtures("no_process")
@pytest.mark.parametrize("trim", ["", " | trim"])
@pytest.mark.parametrize("content", ["Four. ", "Four.", [{"type": "text", "text": "One. "}, {"type": "image"}]])
def test_a_final_message_is_continued_as_in_transformers(
    trim: str, content: Any, peer: transformers.PreTrainedTokenizerFast
) -> None:
    said = "m.content" if isinstance(content, str) else "m.content[0].text"
    template = f"{{% for m in messages %}}<{{{{ m.role }}}}>{{{{ {said}{trim} }}}}</s>{{% endfor %}}"
    messages = [{"role": "assistant", "content": content}]
    expected = peer.apply_chat_template(messages, chat_template=template, tokenize=False, continue_final_message=True)
    assert render_chat(template, messages, special_tokens=SPECIAL, continue_final_message=True) == expected
    assert messages == [{"role": "assistant", "content": content}]


@pytest.mark.usefixtures("no_process")
@pytest.mark.parametrize("message", [{"role": "assistant"}, {"role": "assistant", "content": [{"type": "image"}]}])
def test_a_final_message_without_text_is_not_continued(message: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError, match="no text to continue"):
        render_chat(TEMPLATE, [message], special_tokens=SPECIAL, continue_final_message=True)


@pytest.mark.usefixtures("no_process")
def test_a_template_that_cuts_the_final_message_does_not_continue_it() -> None:
    with pytest.raises(InvalidRequestError, match="does not write the final message"):
        render_chat(
            "{{ messages[0].content[:4] }}",
            [{"role": "a", "content": "long enough"}],
            special_tokens={},
            continue_final_message=True,
        )


@pytest.mark.usefixtures("no_process")
def test_generation_blocks_tell_what_the_model_says() -> None:
    template = """{% for m in messages %}{{ m.role }}: {% if m.role == 'assistant' %}
    {% generation %}{{ m.content }}</s>{% endgeneration %}
    {%- else %}{{ m.content }}{% endif %}
{% endfor %}"""
    messages = [{"role": role, "content": f"{role} {number}"} for number in range(2) for role in ("user", "assistant")]
    (rendered,) = render_chats(template, [Chat(messages, prompt=False)], special_tokens={})
    assert isinstance(rendered, Rendered)
    assert rendered.generated is not None
    assert [rendered.text[begin:end] for begin, end in rendered.generated] == ["assistant 0</s>", "assistant 1</s>"]


@pytest.mark.usefixtures("no_process")
@pytest.mark.parametrize(
    "template",
    [
        "{{ messages[0].content }}",
        "{% macro said() %}before {% generation %}{{ messages[0].content }}{% endgeneration %}{% endmacro %}after {{ said() }}",
    ],
)
def test_blocks_that_do_not_tell_where_they_write(template: str) -> None:
    (rendered,) = render_chats(template, [Chat([{"role": "assistant", "content": "Hello."}])], special_tokens={})
    assert isinstance(rendered, Rendered)
    assert rendered.generated is None


@pytest.mark.usefixtures("no_process")
def test_chats_of_a_template_do_not_see_one_another() -> None:
    template = (
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}{{ x is defined }}"
    )
    chats = [Chat(MESSAGES, variables={"x": 1}), Chat(MESSAGES[:1]), Chat([])]
    first, second, third = render_chats(template, chats, special_tokens={})
    assert (first, second) == (Rendered("3True"), Rendered("1False"))
    assert isinstance(third, InvalidRequestError)


def test_a_template_can_refuse_messages() -> None:
    with pytest.raises(InvalidRequestError, match="system comes first"):
        render_chat(TEMPLATE, [*MESSAGES, {"role": "system", "content": ""}], special_tokens=SPECIAL)


@pytest.mark.parametrize(
    "messages", [[], [{"content": "no role"}], [{"role": 3, "content": ""}], ["text"], [{"role": "a", "b": {1}}]]
)
def test_malformed_messages(messages: list[Any]) -> None:
    with pytest.raises(InvalidRequestError):
        render_chat(TEMPLATE, messages, special_tokens=SPECIAL)


@pytest.mark.parametrize("name", ["tools", "documents"])
@pytest.mark.parametrize("value", ["text", {"a": 1}, [print], [[]]])
def test_malformed_tools_and_documents(name: str, value: Any) -> None:
    with pytest.raises(InvalidRequestError, match=f"{name} is malformed"):
        render_chat(TEMPLATE, MESSAGES, special_tokens=SPECIAL, **{name: value})


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception.__globals__['jinja2'] }}",
        "{% for i in range(100000000) %}x{% endfor %}",
        "{% for i in range(90000) %}{% for j in range(90000) %}{{ 'x' * 1000 }}{% endfor %}{% endfor %}",
    ],
)
def test_hostile_templates_are_stopped(template: str) -> None:
    with pytest.raises((UnsupportedError, InvalidFileError)):
        render_chat(template, MESSAGES, special_tokens={})


@pytest.mark.parametrize(
    "template",
    [
        "{{ 'a' * 10 ** 11 }}",
        "{{ '%9999999999d' % 1 }}",
        "{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}",
        "{{ 9 ** (9 ** 9) > 1 }}",
    ],
)
def test_templates_that_take_memory_or_time_without_end_are_stopped(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(templates, "MAX_SECONDS", 1)
    with pytest.raises(UnsupportedError, match="exceeds a limit"):
        render_chat(template, MESSAGES, special_tokens={})


def test_a_template_process_that_does_not_start_is_an_error_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(UnsupportedError, match="does not start"):
        render_chat(TEMPLATE, MESSAGES, special_tokens=SPECIAL)


def test_a_template_process_that_fails_is_an_error_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(templates, "_PROCESS", Path("/nowhere/process.py"))
    monkeypatch.setattr(templates, "_FOLDER", Path("/"))
    with pytest.raises(UnsupportedError, match="the process for chat templates fails"):
        render_chat(TEMPLATE, MESSAGES, special_tokens=SPECIAL)


def test_without_jinja2_there_are_no_templates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(UnsupportedError, match="need jinja2"):
        render_chat(TEMPLATE, MESSAGES, special_tokens=SPECIAL)


def test_a_jinja2_that_templates_get_out_of_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process.jinja2, "__version__", "3.1.5")
    request = {"template": "{{ 1 }}", "max_characters": 9, "chats": [{"messages": []}]}
    assert process.answers(request) == [{"error": "old", "message": "3.1.5"}]
    monkeypatch.setattr(templates, "_run", lambda _, count: count * [{"error": "old", "message": "3.1.5"}])
    with pytest.raises(UnsupportedError, match=r"jinja2>=3\.1\.6"):
        render_chat(TEMPLATE, MESSAGES, special_tokens=SPECIAL)


TRAPS = (
    "runpy",
    "json",
    "jinja2",
    "markupsafe",
    "datetime",
    "contextlib",
    "encodings",
    "sitecustomize",
    "usercustomize",
    "resource",
)


@pytest.fixture
def trapped_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a current folder with modules named like those that the process imports; each writes a mark when it runs."""
    for name in TRAPS:
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'a').write({name!r})\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("PYTHONSTARTUP", str(tmp_path / "json.py"))
    return tmp_path


@pytest.mark.parametrize("entry", ["", ".", "{folder}"])
def test_nothing_in_the_current_folder_runs(entry: str, trapped_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [entry.format(folder=trapped_folder), *sys.path])
    assert render_chat("{{ messages[0].content }}", MESSAGES, special_tokens={}) == " Hi "
    assert not (trapped_folder / "ran").exists()


@pytest.mark.parametrize("version", ["3.10", "3.11", "3.12", "3.13", "3.14"])
def test_nothing_in_the_current_folder_runs_on_any_python(
    version: str, trapped_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = shutil.which(f"python{version}")
    ask = [python or "", "-I", "-c", "import sys; print(sys.executable)"]
    # Version managers have placeholder commands for versions that are not installed.
    found = subprocess.run(ask, capture_output=True, text=True, check=False) if python else None
    if found is None or found.returncode:
        pytest.skip(f"no Python {version} here")
    monkeypatch.setattr(sys, "executable", found.stdout.strip())
    assert render_chat("{{ messages[0].content }}", MESSAGES, special_tokens={}) == " Hi "
    assert not (trapped_folder / "ran").exists()


def test_the_process_has_no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_KEY", "x")
    started: dict[str, Any] = {}

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        started.update(options, command=command)
        return subprocess.CompletedProcess(command, 0, stdout='[{"text": "", "spans": null}]', stderr="")

    monkeypatch.setattr(templates.subprocess, "run", run)
    render_chat("", MESSAGES, special_tokens={})
    assert started["env"].keys() <= {"SYSTEMROOT", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH"}
    assert started["command"][1:3] == ["-I", "-S"]


@pytest.mark.parametrize(
    "template",
    [
        "{% for %}",
        "{{ 1 / 0 }}",
        "{{ nothing.at.all }}",
        "{{ messages | nofilter }}",
        "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
        "{{" + "(" * 3000 + "1" + ")" * 3000 + "}}",
        "{% for i in [1] %}" * 25 + "{% endfor %}" * 25,
        "{{ cycler() }}",
        "{{ '\\ud800' }}",
    ],
)
@pytest.mark.usefixtures("no_process")
def test_broken_templates(template: str) -> None:
    with pytest.raises(InvalidFileError, match="template fails"):
        render_chat(template, MESSAGES, special_tokens={})


def config(template: Any) -> Any:
    return side_file(json.dumps({"chat_template": template}))


NAMED = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]


@pytest.mark.parametrize(
    ("files", "templates"),
    [
        ({}, {}),
        ({"tokenizer_config.json": config("A")}, {"default": "A"}),
        ({"tokenizer_config.json": config(NAMED)}, {"tool_use": "T", "default": "D"}),
        ({"tokenizer_config.json": config(NAMED), "chat_template.jinja": side_file("J\r\n")}, {"default": "J\n"}),
        ({"tokenizer_config.json": config("A"), "additional_chat_templates/rag.jinja": side_file("R")}, {"rag": "R"}),
        (
            {"chat_template.jinja": side_file("J"), "additional_chat_templates/tool_use.jinja": side_file("T")},
            {"default": "J", "tool_use": "T"},
        ),
    ],
)
def test_templates_come_from_where_transformers_finds_them(
    files: dict[str, Any], templates: dict[str, str], tmp_path: Path
) -> None:
    assert find_chat_templates(files) == templates
    for name, content in {"tokenizer.json": byte_tokenizer_files()["tokenizer.json"], **files}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content.read().tobytes())
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (theirs.chat_template or {}) in (templates, templates.get("default"))
    if "default" in templates:
        assert choose_chat_template(templates) == theirs.get_chat_template()
        assert choose_chat_template(templates, tools=True) == theirs.get_chat_template(tools=[])
    else:
        with pytest.raises(InvalidRequestError, match="chat template"):
            choose_chat_template(templates)


def test_a_processor_has_its_template_in_a_file_of_its_own() -> None:
    files = {"chat_template.json": config("P")}
    assert find_chat_templates(files) == {"default": "P"}
    assert find_chat_templates({**files, "tokenizer_config.json": config("A")}) == {"default": "A"}


@pytest.mark.parametrize("value", [3, [{"name": "default"}], [{"name": "default", "template": {}}]])
def test_templates_that_are_no_texts(value: Any) -> None:
    with pytest.raises(InvalidFileError, match="not a text"):
        find_chat_templates({"tokenizer_config.json": config(value)})


def test_a_template_that_is_not_utf8() -> None:
    broken = Array.of(np.frombuffer(b"ab\xff", np.uint8))
    with pytest.raises(InvalidFileError, match="byte 2"):
        find_chat_templates({"chat_template.jinja": broken})


def test_chat_on_a_model() -> None:
    small = small_config(vocab_size=258, num_hidden_layers=1)
    with_template = LanguageModel.from_model(clustered_model(small, byte_tokenizer_files(chat_template=TEMPLATE)))
    prompt = with_template.chat(MESSAGES[:1])
    assert prompt == '<s><user>Hi</s>\n<assistant>\n{"a": "<b>"}'
    assert with_template.generate(prompt, add_special_tokens=False, max_new_tokens=1).prompt_tokens == len(prompt) - 2 - 3
    with pytest.raises(InvalidRequestError, match="no chat template"):
        LanguageModel.from_model(clustered_model(small)).chat(MESSAGES)


def test_a_model_with_tools() -> None:
    small = small_config(vocab_size=258, num_hidden_layers=1)
    templates = [*NAMED[1:], {"name": "tool_use", "template": "{{ tools | length }}{{ mood }}{{ messages[0].content }}"}]
    model = LanguageModel.from_model(clustered_model(small, byte_tokenizer_files(chat_template=templates)))
    assert model.chat(MESSAGES) == "D"
    assert model.chat(MESSAGES, tools=TOOLS, mood="!", continue_final_message=False) == "1! Hi "
