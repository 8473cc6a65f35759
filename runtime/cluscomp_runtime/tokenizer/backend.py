"""The tokenizers library's tokenizer of a `tokenizer.json`, in this process or in a separate one that can be stopped."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

from cluscomp_formats.errors import Problem, UnsupportedError
from cluscomp_runtime.tokenizer.bounds import reason_to_isolate

__all__ = ["Backend", "Encoded", "IsolatedTokenizer", "open_backend", "plain_copy"]

SECONDS = 10
SECONDS_PER_MEGABYTE = 20
"""Time limit of a request: a constant, plus an amount per 10^6 bytes of file and request. Generous even for a busy machine."""

MEMORY_BYTES = 1 << 30
MEMORY_PER_BYTE = 1024
"""Memory limit of a request: a constant, plus an amount per byte. The library needs about 200 bytes per byte of text."""

ANSWER_BYTES = 1 << 20
ANSWER_PER_BYTE = 256
"""Limit of the length of an answer: a constant, plus an amount per byte."""

_PROCESS = Path(__file__).with_name("process.py")


class Encoded(Protocol):
    """Token ids of a text, and the span (begin, end) of each in characters."""

    @property
    def ids(self) -> Sequence[int]: ...
    @property
    def offsets(self) -> Sequence[tuple[int, int]]: ...


class AddedToken(Protocol):
    """A token that is found in a text before it is normalized and split."""

    @property
    def special(self) -> bool: ...


class Backend(Protocol):
    """The methods of `tokenizers.Tokenizer` that are used."""

    def encode(self, sequence: str, *, add_special_tokens: bool = True) -> Encoded: ...
    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str: ...
    def token_to_id(self, token: str) -> int | None: ...
    def id_to_token(self, id: int) -> str | None: ...  # noqa: A002 - the library's name
    def get_vocab_size(self, with_added_tokens: bool = True) -> int: ...
    def get_added_tokens_decoder(self) -> Mapping[int, AddedToken]: ...
    @property
    def decoder(self) -> Any: ...


def open_backend(content: bytes) -> Backend:
    """Return the tokenizer of a `tokenizer.json`, with truncation and padding disabled: they are settings of its training.

    Raises UnsupportedError if it exceeds its time or memory; otherwise passes on the library's exceptions.
    """
    reason = reason_to_isolate(content)
    if reason is not None:
        return IsolatedTokenizer(content.decode(), reason)
    import tokenizers

    backend = tokenizers.Tokenizer.from_str(content.decode())
    backend.no_truncation()
    backend.no_padding()
    return backend


def plain_copy(backend: Backend) -> Backend:
    """Return a copy that tokenizes special tokens in a text as plain text. (Changing `backend` would affect all its users.)"""
    if isinstance(backend, IsolatedTokenizer):
        return backend.plain_copy()
    plain: Any = copy.deepcopy(backend)
    plain.encode_special_tokens = True
    return cast(Backend, plain)


def special_ids(backend: Backend) -> frozenset[int]:
    """Return the ids of the tokens that decoding skips."""
    return frozenset(token for token, added in backend.get_added_tokens_decoder().items() if added.special)


def decoder_description(backend: Backend) -> Any:
    """Return the decoder as described in tokenizer.json, None if there is none."""
    # Pickling is the library's only way to describe its parts.
    return backend.decoder and json.loads(backend.decoder.__getstate__())


@dataclass(frozen=True)
class _Encoding:
    ids: list[int]
    offsets: list[tuple[int, int]]


@dataclass(frozen=True)
class _AddedToken:
    special: bool


@dataclass(frozen=True)
class _Part:
    description: Any

    def __getstate__(self) -> bytes:
        return json.dumps(self.description).encode()


class IsolatedTokenizer:
    """A tokenizer in a separate process, which is stopped if a request exceeds its limits of time or memory.

    Methods raise UnsupportedError in that case, and RuntimeError if the library fails. `reason` says why it is isolated.
    """

    def __init__(self, content: str, reason: str, plain: bool = False) -> None:
        self._content = content
        self._reason = reason
        self._plain = plain
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0
        with self._lock:
            self._running()

    def __reduce__(self) -> tuple[type[IsolatedTokenizer], tuple[str, str, bool]]:
        return type(self), (self._content, self._reason, self._plain)

    def plain_copy(self) -> IsolatedTokenizer:
        return IsolatedTokenizer(self._content, self._reason, plain=True)

    def encode(self, sequence: str, *, add_special_tokens: bool = True) -> Encoded:
        found = self._ask("encode", sequence=sequence, add_special_tokens=add_special_tokens)
        return _Encoding(found["ids"], [(begin, end) for begin, end in found["offsets"]])

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return str(self._ask("decode", ids=list(ids), skip_special_tokens=skip_special_tokens))

    def token_to_id(self, token: str) -> int | None:
        found: int | None = self._ask("token_to_id", token=token)
        return found

    def id_to_token(self, id: int) -> str | None:  # noqa: A002
        found: str | None = self._ask("id_to_token", id=id)
        return found

    def get_vocab_size(self, with_added_tokens: bool = True) -> int:
        return int(self._ask("get_vocab_size", with_added_tokens=with_added_tokens))

    def get_added_tokens_decoder(self) -> Mapping[int, AddedToken]:
        found = self._ask("get_added_tokens_decoder")
        return {int(token): _AddedToken(special) for token, special in found.items()}

    @property
    def decoder(self) -> _Part | None:
        description = self._ask("decoder")
        return description and _Part(json.loads(description))

    def _ask(self, method: str, **arguments: Any) -> Any:
        if self._owner != os.getpid():
            # After a fork, a thread of the parent process may have held the old lock.
            self._lock = threading.Lock()
        with self._lock:
            return self._request(self._running(), method, arguments)

    def _running(self) -> subprocess.Popen[bytes]:
        """Return the process; start a new one if there is none or it belongs to the process that this one was forked from."""
        if self._process is None or self._owner != os.getpid():
            self._process, self._owner = _start(), os.getpid()
            weakref.finalize(self, _end, self._process, self._owner)
            self._request(self._process, "load", {"content": self._content, "plain": self._plain})
        return self._process

    def _request(self, process: subprocess.Popen[bytes], method: str, arguments: dict[str, Any]) -> Any:
        size = len(self._content) + sum(len(value) for value in arguments.values() if isinstance(value, (str, list)))
        seconds = SECONDS + SECONDS_PER_MEGABYTE * size / 1e6
        limits = {"seconds": seconds, "memory_bytes": MEMORY_BYTES + MEMORY_PER_BYTE * size}
        line = json.dumps({"method": method, "arguments": arguments, **limits}) + "\n"
        clock = threading.Timer(seconds, process.kill)
        clock.daemon = True
        clock.start()
        try:
            reply = _exchange(process, line, ANSWER_BYTES + ANSWER_PER_BYTE * size)
        finally:
            clock.cancel()
        if reply is None:
            self._process = None
            _end(process, self._owner)
            raise self._limit_exceeded(seconds, limits["memory_bytes"])
        if "error" in reply:
            raise RuntimeError(reply["error"])
        return reply["result"]

    def _limit_exceeded(self, seconds: float, memory_bytes: float) -> UnsupportedError:
        message = f"the tokenizer takes too much time or memory ({self._reason})"
        expected = f"at most {seconds:.0f} seconds and {memory_bytes / 1e6:.0f} MB, and no crash of the tokenizers library"
        return UnsupportedError(Problem("endless_tokenizer", message, "tokenizer.json", expected=expected))


def _exchange(process: subprocess.Popen[bytes], line: str, most: int) -> dict[str, Any] | None:
    """Return the answer to a request; None if the process ended, or the answer exceeds `most` bytes."""
    assert process.stdin is not None  # noqa: S101
    assert process.stdout is not None  # noqa: S101
    try:
        process.stdin.write(line.encode("ascii"))
        process.stdin.flush()
        answer = process.stdout.readline(most)
    except OSError:
        return None
    reply: dict[str, Any] | None = json.loads(answer) if answer.endswith(b"\n") else None
    return reply


def _start() -> subprocess.Popen[bytes]:
    import tokenizers

    # Isolated mode (-I) imports nothing from the current folder; the library is found where this process found it.
    library = str(Path(tokenizers.__file__).parents[1])
    code = f"import runpy, sys; sys.path.append({library!r}); runpy.run_path({str(_PROCESS)!r}, run_name='__main__')"
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
    try:
        return subprocess.Popen(
            [sys.executable, "-I", "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
        )
    except OSError as error:
        problem = Problem("no_process", f"the tokenizer's process does not start: {error}")
        raise UnsupportedError(problem) from error


def _end(process: subprocess.Popen[bytes], owner: int) -> None:
    """Kill a process, unless it belongs to the process that this one was forked from."""
    if owner != os.getpid():
        return
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout):
        # Closing flushes unwritten data, which fails for a process that has ended.
        with contextlib.suppress(OSError):
            if stream is not None:
                stream.close()
