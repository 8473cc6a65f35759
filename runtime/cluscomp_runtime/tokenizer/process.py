"""The process that runs a tokenizer whose time or memory may be unbounded.

It reads requests from standard input and writes answers to standard output, one line of JSON each. The first request loads the
tokenizer. `backend.py` runs this file by its path; it imports nothing of the package, so that it starts quickly.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from typing import Any


def answer(tokenizer: Any, method: str, arguments: dict[str, Any]) -> Any:
    """Call a method of the tokenizer and return the result as plain data."""
    if method == "encode":
        encoding = tokenizer.encode(**arguments)
        return {"ids": list(encoding.ids), "offsets": list(encoding.offsets)}
    if method == "get_added_tokens_decoder":
        return {token: added.special for token, added in tokenizer.get_added_tokens_decoder().items()}
    if method == "decoder":
        return tokenizer.decoder and tokenizer.decoder.__getstate__().decode()
    return getattr(tokenizer, method)(**arguments)


def serve() -> None:
    """Answer requests until the end of the input."""
    import tokenizers

    tokenizer: Any = None
    for line in sys.stdin:
        request = json.loads(line)
        _limit(request["seconds"], request["memory_bytes"])
        try:
            if request["method"] == "load":
                tokenizer = tokenizers.Tokenizer.from_str(request["arguments"]["content"])
                tokenizer.no_truncation()
                tokenizer.no_padding()
                tokenizer.encode_special_tokens = request["arguments"]["plain"]
                result = None
            else:
                result = answer(tokenizer, request["method"], request["arguments"])
            reply = {"result": result}
        except MemoryError:
            raise
        except BaseException as error:  # noqa: BLE001 - a panic of the library is not an Exception and has no public class
            reply = {"error": f"{error}"[:500]}
        sys.stdout.write(json.dumps(reply) + "\n")
        sys.stdout.flush()


def _limit(seconds: float, memory_bytes: int) -> None:
    """Limit time and memory of a request if the system supports it; otherwise the parent's timer is the only limit.

    The parent's timer ends with the parent, so without its own limit this process could run forever.
    """
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, resource.getrlimit(resource.RLIMIT_AS)[1]))
        hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
        resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time() + seconds) + 1, hard))


if __name__ == "__main__":
    serve()
