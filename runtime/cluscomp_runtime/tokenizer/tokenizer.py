"""Text to token ids and back, from a model's own side files.

Which tokens there are, and which begin and end a text, is for `cluscomp_formats.tokens` to say, of every container alike.
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
    """Make an InvalidFileError of whatever the tokenizers library raises: tokenizer.json is as good as a program for it."""
    try:
        yield
    except ClusCompError:
        raise
    except Exception as error:
        # The library raises a bare Exception for any malformed file.
        raise InvalidFileError(Problem("bad_tokenizer", f"the tokenizers library {what}: {error}", "tokenizer.json")) from error
    except BaseException as error:
        # A panic of the Rust code is none; its class has no public name.
        if type(error).__name__ != "PanicException":
            raise
        raise InvalidFileError(Problem("bad_tokenizer", f"the tokenizers library {what}: {error}", "tokenizer.json")) from error


class Tokenizer:
    """A model's tokenizer: a thin layer over `backend`, a `tokenizers.Tokenizer` or one in a process of its own.

    `settings` name special tokens as `tokenizer_config.json` does; `special_tokens` are their texts by name (`bos_token`, ...).
    `bos_token` and `eos_token` are texts or None, `bos_id` and `eos_id` their ids.
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
        """The tokenizer among a model's side files, None if there is no `tokenizer.json`. Raises InvalidFileError."""
        stored = read_tokenizer(files)
        if stored is None:
            return None
        with _library_faults("cannot read it"):
            backend = open_backend(stored.content)
        return cls(backend, {"extra_special_tokens": stored.special_tokens})

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included."""
        return int(self.backend.get_vocab_size(with_added_tokens=True))

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Tokens that `decode` leaves out. Raises InvalidFileError if the tokenizer fails."""
        with _library_faults("cannot name its special tokens"):
            return special_ids(self.backend)

    @cached_property
    def decoder(self) -> Any:
        """What `decode` does, as in tokenizer.json. Raises InvalidFileError if the tokenizer fails."""
        with _library_faults("cannot describe its decoder"):
            return decoder_description(self.backend)

    def token_text(self, token: int) -> str | None:
        """How the vocabulary spells a token, None if it has no such token. Raises InvalidFileError if the tokenizer fails."""
        with _library_faults("cannot look up a token"):
            return self.backend.id_to_token(token)

    def encode(self, text: str, *, add_special_tokens: bool = True, parse_special: bool = True) -> list[int]:
        """Token ids of a text.

        Without `parse_special`, the text of a special token (`</s>`) is that of the characters it is written with, like any
        other, and not that token; added tokens that are not special are found in either case.

        With `add_special_tokens` the text gets what the tokenizer's post-processor adds. A text that already begins with the
        beginning-of-text token gets no second one. Raises InvalidRequestError for a text with lone surrogates,
        InvalidFileError if the tokenizer fails.
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
        """Token ids of a text, no special tokens added, and of each the characters it stands for, begin and end.

        Raises InvalidRequestError for a text with lone surrogates, InvalidFileError if the tokenizer fails.
        """
        if not is_unicode(text):
            raise InvalidRequestError(Problem("bad_prompt", "the text is not valid Unicode", found=ascii(text)[:200]))
        with _library_faults("cannot encode a text with it"):
            encoding = self.backend.encode(text, add_special_tokens=False)
            return list(encoding.ids), list(encoding.offsets)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of token ids; bytes that are no valid UTF-8 become U+FFFD. Raises InvalidRequestError, InvalidFileError."""
        tokens = token_ids(ids)
        if any(not 0 <= token < 2**32 for token in tokens):
            raise InvalidRequestError(Problem("token_out_of_range", "a token id is negative or too large to be one"))
        if not tokens:
            # Of which some decoders make a panic.
            return ""
        with _library_faults("cannot decode tokens with it"):
            return str(self.backend.decode(tokens, skip_special_tokens=skip_special_tokens))

    def stream(self, prompt: Sequence[int]) -> StreamDecoder:
        """A decoder for tokens that come one at a time after those of `prompt`."""
        return StreamDecoder(self, prompt)


def end_tokens(config: Mapping[str, Any], files: Mapping[str, Array], tokenizer: Tokenizer | None) -> frozenset[int]:
    """Ids that end a text: those of generation_config.json, else of config.json, else the tokenizer's end token.

    Raises InvalidFileError if a file says something other than an id or a list of ids.
    """
    return frozenset(stored_end_tokens(config, files, tokenizer.eos_id if tokenizer else None))
