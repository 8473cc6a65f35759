"""Why a tokenizer is not there: no error of the model, which is read without it."""

from __future__ import annotations

__all__ = ["UnsupportedTokenizer"]


class UnsupportedTokenizer(Exception):  # noqa: N818 - not an error of the file: the model is read without it
    """Why no tokenizer could be built."""
