"""Encode text to token ids and decode ids to text, with the tokenizer in a model's side files.

`cluscomp_formats.tokens` reads the vocabulary and the special tokens, in the same way for every container format.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

from cluscomp_formats.errors import ClusCompError, InvalidFileError, InvalidRequestError, Problem
from cluscomp_formats.ir import Array
from cluscomp_formats.strict_json import is_unicode
from cluscomp_formats.tokens import end_tokens as stored_end_tokens
from cluscomp_formats.tokens import read_tokenizer, special_tokens
from cluscomp_runtime.tokenizer.backend import Backend, decoder_description, open_backend, plain_copy, special_ids
from cluscomp_runtime.tokenizer.streaming import StreamDecoder
from cluscomp_runtime.tokenizer.token_ids import token_ids

__all__ = ["Tokenizer", "end_tokens"]


@contextlib.contextmanager
def _library_faults(what: str) -> Iterator[None]:
    """Convert any exception of the tokenizers library to InvalidFileError: a tokenizer.json can make it fail in any way."""
    try:
        yield
    except ClusCompError:
        raise
    except Exception as error:
        # The library raises a bare Exception for any malformed file.
        raise InvalidFileError(Problem("bad_tokenizer", f"the tokenizers library {what}: {error}", "tokenizer.json")) from error
    except BaseException as error:
        # A panic of the Rust code does not derive from Exception, and its class has no public name.
        if type(error).__name__ != "PanicException":
            raise
        raise InvalidFileError(Problem("bad_tokenizer", f"the tokenizers library {what}: {error}", "tokenizer.json")) from error


class Tokenizer:
    """A model's tokenizer: a thin layer over `backend`, a `tokenizers.Tokenizer` or an `IsolatedTokenizer`.

    `settings` name the special tokens as `tokenizer_config.json` does. `special_tokens` maps their names (`bos_token`, ...) to
    texts. `bos_token` and `eos_token` are texts or None; `bos_id` and `eos_id` are their ids.
    """

    def __init__(self, backend: Backend, settings: Mapping[str, Any]) -> None:
        self.backend = backend
        self.special_tokens = special_tokens(settings)
        self.bos_token = self.special_tokens.get("bos_token")
        self.eos_token = self.special_tokens.get("eos_token")
        with _library_faults("cannot look up a special token"):
            self.bos_id = backend.token_to_id(self.bos_token) if self.bos_token else None
            self.eos_id = backend.token_to_id(self.eos_token) if self.eos_token else None

    @classmethod
    def from_files(cls, files: Mapping[str, Array]) -> Tokenizer | None:
        """Return the tokenizer in a model's side files, None if there is no `tokenizer.json`.

        Raises InvalidFileError if the file is malformed.
        """
        stored = read_tokenizer(files)
        if stored is None:
            return None
        with _library_faults("cannot read it"):
            backend = open_backend(stored.content)
        return cls(backend, {"extra_special_tokens": stored.special_tokens})

    @property
    def vocab_size(self) -> int:
        """Number of tokens, including added ones."""
        return int(self.backend.get_vocab_size(with_added_tokens=True))

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids of the tokens that `decode` skips. Raises InvalidFileError if the tokenizer fails."""
        with _library_faults("cannot name its special tokens"):
            return special_ids(self.backend)

    @cached_property
    def decoder(self) -> Any:
        """The decoder as described in tokenizer.json. Raises InvalidFileError if the tokenizer fails."""
        with _library_faults("cannot describe its decoder"):
            return decoder_description(self.backend)

    def token_text(self, token: int) -> str | None:
        """Return a token's text in the vocabulary, None if there is no such token. Raises InvalidFileError if this fails."""
        with _library_faults("cannot look up a token"):
            return self.backend.id_to_token(token)

    def encode(self, text: str, *, add_special_tokens: bool = True, parse_special: bool = True) -> list[int]:
        """Return the token ids of a text.

        Without `parse_special`, the text of a special token (`</s>`) is tokenized like any other text; added tokens that are
        not special are recognized in either case.

        With `add_special_tokens`, the tokenizer's post-processor adds its tokens. A text that already begins with the
        beginning-of-text token gets no second one.

        Raises InvalidRequestError if the text has lone surrogates; InvalidFileError if the tokenizer fails.
        """
        if not is_unicode(text):
            raise InvalidRequestError(Problem("bad_prompt", "the text is not valid Unicode", found=ascii(text)[:200]))
        with _library_faults("cannot encode a text with it"):
            backend = self.backend if parse_special else self._plain
            ids = list(backend.encode(text, add_special_tokens=add_special_tokens).ids)
        written = add_special_tokens and self.bos_token is not None and text.startswith(self.bos_token)
        return ids[1:] if written and ids[:2] == [self.bos_id, self.bos_id] else ids

    @cached_property
    def _plain(self) -> Backend:
        with _library_faults("cannot read it"):
            return plain_copy(self.backend)

    def encode_with_spans(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Return the token ids of a text, without added special tokens, and the span (begin, end) of each in characters.

        Raises InvalidRequestError if the text has lone surrogates; InvalidFileError if the tokenizer fails.
        """
        if not is_unicode(text):
            raise InvalidRequestError(Problem("bad_prompt", "the text is not valid Unicode", found=ascii(text)[:200]))
        with _library_faults("cannot encode a text with it"):
            encoding = self.backend.encode(text, add_special_tokens=False)
            return list(encoding.ids), list(encoding.offsets)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of token ids; invalid UTF-8 becomes U+FFFD.

        Raises InvalidRequestError if a value is not a token id; InvalidFileError if the tokenizer fails.
        """
        tokens = token_ids(ids)
        if any(not 0 <= token < 2**32 for token in tokens):
            raise InvalidRequestError(Problem("token_out_of_range", "a token id is negative or above 2^32 - 1"))
        if not tokens:
            # Some decoders panic on an empty list.
            return ""
        with _library_faults("cannot decode tokens with it"):
            return str(self.backend.decode(tokens, skip_special_tokens=skip_special_tokens))

    def stream(self, prompt: Sequence[int]) -> StreamDecoder:
        """Return a decoder for the tokens that follow `prompt`, one at a time."""
        return StreamDecoder(self, prompt)


def end_tokens(config: Mapping[str, Any], files: Mapping[str, Array], tokenizer: Tokenizer | None) -> frozenset[int]:
    """Return the ids that end a text: those of generation_config.json, else of config.json, else the tokenizer's end token.

    Raises InvalidFileError if a file has a value that is neither an id nor a list of ids.
    """
    return frozenset(stored_end_tokens(config, files, tokenizer.eos_id if tokenizer else None))
