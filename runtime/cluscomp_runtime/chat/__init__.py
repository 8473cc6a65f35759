"""Chat messages to prompt text, by the chat template of a model."""

from cluscomp_runtime.chat.templates import Chat, Rendered, render_chat, render_chats

__all__ = ["Chat", "Rendered", "render_chat", "render_chats"]
