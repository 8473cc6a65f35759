"""Chats to render templates with, of every kind that templates tell apart."""

from __future__ import annotations

from typing import Any

__all__ = ["CHATS", "SPECIAL_TOKENS"]

SPECIAL_TOKENS = {
    name: f"<|{name}|>" for name in ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token")
}

ASKED = {"role": "user", "content": "Wie groß ist <Oz>? 多大? 👩‍👩‍👧"}
SYSTEM = {"role": "system", "content": "Be kind & brief.\n"}
SAID = {"role": "assistant", "content": ' It is 4 m²; don\'t "worry".\n'}
AGAIN = {"role": "user", "content": "Sicher? /no_think"}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "measure",
            "description": "Measures a thing <exactly> & gives its größe.",
            "parameters": {
                "type": "object",
                "properties": {
                    "thing": {"type": "string", "description": "What to measure"},
                    "unit": {"type": "string", "enum": ["m", "ft"], "description": "Unit"},
                    "digits": {"type": "array", "items": {"type": "integer"}},
                },
                "required": ["thing"],
            },
            "return": {"type": "number"},
        },
    },
    {
        "type": "function",
        "function": {"name": "stop", "description": "Ends it.", "parameters": {"type": "object", "properties": {}}},
    },
]


def _called(arguments: Any, **more: Any) -> list[dict[str, Any]]:
    call = {"type": "function", "id": "call00001", "function": {"name": "measure", "arguments": arguments}}
    answer = {"role": "tool", "name": "measure", "tool_call_id": "call00001", "content": '{"size": 4.25}'}
    return [ASKED, {"role": "assistant", "content": None, "tool_calls": [call], **more}, answer]


ARGUMENTS = {"thing": "Oz", "unit": "m", "digits": [1, 2], "exact": True, "of": None}
PARTS = {
    "role": "user",
    "content": [{"type": "text", "text": "Was ist das? "}, {"type": "image"}, {"type": "text", "text": "Hm."}],
}

CHATS: dict[str, dict[str, Any]] = {
    "one turn": {"messages": [ASKED]},
    "system": {"messages": [SYSTEM, ASKED]},
    "several turns": {"messages": [SYSTEM, ASKED, SAID, AGAIN]},
    "an answer at the end": {"messages": [ASKED, SAID, AGAIN, {"role": "assistant", "content": "Ja."}]},
    "parts": {"messages": [PARTS, {"role": "assistant", "content": [{"type": "text", "text": "Oz."}]}]},
    "tools": {"messages": [SYSTEM, ASKED], "tools": TOOLS},
    "no tools": {"messages": [ASKED], "tools": []},
    "a call": {"messages": _called(ARGUMENTS), "tools": TOOLS},
    "a call as text": {"messages": [*_called('{"thing": "Oz"}', content="Wait."), SAID, AGAIN], "tools": TOOLS},
    "thoughts": {"messages": [ASKED, {**SAID, "reasoning_content": "Hm, Oz."}, AGAIN]},
    "thoughts by another name": {"messages": [ASKED, {**SAID, "thinking": "Hm."}, AGAIN, {**SAID, "reasoning": "So."}]},
    "thoughts in the text": {"messages": [ASKED, {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nFour."}, AGAIN]},
    "no thinking": {"messages": [ASKED], "enable_thinking": False, "reasoning_effort": "high"},
    "documents": {"messages": [ASKED], "documents": [{"title": "Oz", "text": "Größe: 4 m²", "doc_id": 1}]},
    "a developer": {"messages": [{"role": "developer", "content": "Be brief."}, ASKED]},
    "the assistant first": {"messages": [SAID, ASKED]},
    "two questions": {"messages": [ASKED, AGAIN]},
    "a late system message": {"messages": [ASKED, SAID, SYSTEM, AGAIN]},
    "an unknown role": {"messages": [ASKED, {"role": "wizard", "content": "Boo."}]},
    "no content": {"messages": [ASKED, {"role": "assistant"}]},
}
