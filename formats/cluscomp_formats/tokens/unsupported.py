"""The reason why no tokenizer can be built, which is not an error: the model can be read without one."""

from __future__ import annotations

__all__ = ["UnsupportedTokenizer"]


class UnsupportedTokenizer(Exception):  # noqa: N818 - not an error of the file: the model is read without it
    """No tokenizer could be built; the message is the reason."""
