"""Real chat templates of many models: the runtime renders and rejects the same chats as transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
from chats import CHATS, SPECIAL_TOKENS
from transformers.utils import chat_template_utils

from cluscomp_runtime.chat import Chat, Rendered, render_chats

FOLDER = Path(__file__).parents[1] / "data" / "chat_templates"
TEMPLATES = sorted(path.name for path in FOLDER.glob("*.jinja"))
ENDINGS = ("none", "prompt", "continued")

Outcome = tuple[str, tuple[tuple[int, int], ...] | None] | None
"""Text and generation spans; None for a chat that the template rejects."""


def ours(template: str, endings: list[tuple[str, str]]) -> list[Outcome]:
    chats = []
    for name, ending in endings:
        variables = dict(CHATS[name])
        messages, tools, documents = (variables.pop(key, None) for key in ("messages", "tools", "documents"))
        chats.append(Chat(messages or (), ending == "prompt", tools, documents, ending == "continued", variables))
    rendered = render_chats(template, chats, special_tokens=SPECIAL_TOKENS)
    return [(outcome.text, outcome.generated) if isinstance(outcome, Rendered) else None for outcome in rendered]


def theirs(template: str, name: str, ending: str) -> Outcome:
    variables = dict(CHATS[name])
    # apply_chat_template does this before it calls the renderer.
    messages = [{key: value for key, value in message.items() if value is not None} for message in variables.pop("messages")]
    marked = "endgeneration" in template and ending != "continued"
    try:
        texts, spans = chat_template_utils.render_jinja_template(
            [messages],
            chat_template=template,
            add_generation_prompt=ending == "prompt",
            continue_final_message=ending == "continued",
            return_assistant_tokens_mask=marked,
            **{**SPECIAL_TOKENS, **variables},
        )
    except Exception:  # noqa: BLE001 - whatever it is that a template or transformers raises
        return None
    return texts[0], tuple(spans[0]) if marked else None


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.usefixtures("same_clock", "no_process")
def test_a_template_renders_as_in_transformers(name: str) -> None:
    template = (FOLDER / name).read_text(encoding="utf-8")
    endings = [(chat_name, ending) for chat_name in CHATS for ending in ENDINGS]
    found = dict(zip(endings, ours(template, endings), strict=True))
    expected = {(chat_name, ending): theirs(template, chat_name, ending) for chat_name, ending in endings}
    assert found == expected
    rendered = {chat_name for (chat_name, _), outcome in found.items() if outcome}
    assert {"one turn", "an answer at the end"} <= rendered
    if "endgeneration" in template:
        outcome = found["several turns", "none"]
        assert outcome is not None
        assert outcome[1]


def test_there_are_many_templates_of_every_kind() -> None:
    texts = [(FOLDER / name).read_text(encoding="utf-8") for name in TEMPLATES]
    listed = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert len(texts) >= 40
    assert all(f"| `{name}` |" in listed for name in TEMPLATES)
    for feature in (
        "endgeneration",
        "tools",
        "documents",
        "tojson(",
        "strftime_now",
        "namespace(",
        "raise_exception",
        "tool_calls",
    ):
        assert sum(feature in text for text in texts) >= 2, feature


@pytest.mark.usefixtures("same_clock")
def test_the_process_renders_the_same() -> None:
    template = (FOLDER / "Qwen-Qwen3-0.6B.jinja").read_text(encoding="utf-8")
    endings = [(name, "prompt") for name in CHATS]
    assert ours(template, endings) == [theirs(template, *ending) for ending in endings]
