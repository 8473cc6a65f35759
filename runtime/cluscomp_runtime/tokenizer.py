"""Text to token ids and back, from a model's own side files.

`tokenizer.json` defines the tokenizer; `tokenizer_config.json`, `special_tokens_map.json` and `generation_config.json` say
which tokens begin and end a text.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from cluscomp_formats.errors import ClusCompError, InvalidFileError, InvalidRequestError, Problem
from cluscomp_formats.ir import Array
from cluscomp_formats.packed.json_values import is_unicode
from cluscomp_runtime.streaming import StreamDecoder
from cluscomp_runtime.tokenizer_backend import Backend, open_backend

__all__ = ["Tokenizer", "end_tokens", "read_json_file"]


def read_json_file(files: Mapping[str, Array], name: str) -> dict[str, Any]:
    """A side file that must be a JSON object; empty if there is none. Raises InvalidFileError."""
    if name not in files:
        return {}
    try:
        value = json.loads(files[name].read().tobytes())
    except (ValueError, RecursionError) as error:
        raise InvalidFileError(Problem("bad_json", f"not valid JSON: {error}", name)) from error
    if not isinstance(value, dict):
        raise InvalidFileError(Problem("bad_json", "not a JSON object", name, found=type(value).__name__, expected="object"))
    return value


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

    `bos_token` and `eos_token` are texts or None, `bos_id` and `eos_id` their ids.
    """

    def __init__(self, backend: Backend, settings: Mapping[str, Any]) -> None:
        self.backend = backend
        self.special_tokens = {
            name: text
            for name in ("bos_token", "eos_token", "unk_token", "pad_token")
            if (text := _token_text(settings.get(name)))
        }
        self.bos_token = self.special_tokens.get("bos_token")
        self.eos_token = self.special_tokens.get("eos_token")
        with _library_faults("cannot look up a special token"):
            self.bos_id = backend.token_to_id(self.bos_token) if self.bos_token else None
            self.eos_id = backend.token_to_id(self.eos_token) if self.eos_token else None
        add_bos = settings.get("add_bos_token")
        self._add_bos = add_bos if isinstance(add_bos, bool) and self.bos_id is not None else None

    @classmethod
    def from_files(cls, files: Mapping[str, Array]) -> Tokenizer | None:
        """The tokenizer among a model's side files, None if there is no `tokenizer.json`. Raises InvalidFileError."""
        if "tokenizer.json" not in files:
            return None
        content = files["tokenizer.json"].read().tobytes()
        with _library_faults("cannot read it"):
            backend = open_backend(content)
        settings = {**read_json_file(files, "special_tokens_map.json"), **read_json_file(files, "tokenizer_config.json")}
        return cls(backend, settings)

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included."""
        return int(self.backend.get_vocab_size(with_added_tokens=True))

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text.

        With `add_special_tokens` the text gets what the tokenizer's post-processor adds; `add_bos_token` in
        tokenizer_config.json, where present, overrules it on the beginning-of-text token. A text that already begins with
        that token gets no second one. Raises InvalidRequestError for a text with lone surrogates, InvalidFileError if the
        tokenizer fails.
        """
        if not is_unicode(text):
            raise InvalidRequestError(Problem("bad_prompt", "the text is not valid Unicode", found=ascii(text)[:200]))
        with _library_faults("cannot encode a text with it"):
            ids = list(self.backend.encode(text, add_special_tokens=add_special_tokens).ids)
        if not add_special_tokens or self.bos_id is None:
            return ids
        written = self.bos_token is not None and text.startswith(self.bos_token)
        begun = ids[:1] == [self.bos_id]
        if written and ids[:2] == [self.bos_id, self.bos_id]:
            return ids[1:]
        if self._add_bos is True and not begun:
            return [self.bos_id, *ids]
        if self._add_bos is False and begun and not written:
            return ids[1:]
        return ids

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
        if any(not 0 <= token < 2**32 for token in ids):
            raise InvalidRequestError(Problem("token_out_of_range", "a token id is negative or too large to be one"))
        with _library_faults("cannot decode tokens with it"):
            return str(self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens))

    def stream(self, prompt: Sequence[int]) -> StreamDecoder:
        """A decoder for tokens that come one at a time after those of `prompt`."""
        return StreamDecoder(self, prompt)


def end_tokens(config: Mapping[str, Any], files: Mapping[str, Array], tokenizer: Tokenizer | None) -> frozenset[int]:
    """Ids that end a text: those of generation_config.json, else of config.json, else the tokenizer's end token.

    Raises InvalidFileError if a file says something other than an id or a list of ids.
    """
    generation = read_json_file(files, "generation_config.json")
    for name, source in (("generation_config.json", generation), ("config.json", config)):
        value = source.get("eos_token_id")
        if value is None:
            continue
        ids = value if isinstance(value, list) else [value]
        if any(isinstance(token, bool) or not isinstance(token, int) for token in ids):
            expected = "an id or a list of ids"
            raise InvalidFileError(Problem("bad_eos", "eos_token_id is malformed", name, None, repr(value)[:200], expected))
        return frozenset(ids)
    eos = tokenizer.eos_id if tokenizer else None
    return frozenset() if eos is None else frozenset({eos})


def _token_text(token: object) -> str | None:
    """Special tokens are written as text or as an object with `content`."""
    content = token.get("content") if isinstance(token, Mapping) else token
    return content if isinstance(content, str) else None
