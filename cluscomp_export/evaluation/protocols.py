"""The protocols of perplexity: how a text becomes windows of tokens, and which tokens of a window are scored.

`llama.cpp` is the protocol of its `perplexity` tool. The text is used unchanged, except that one line end at its end is
removed; special tokens in it are plain characters. Windows have 512 tokens, and the second half of each is scored. If the
tokenizer adds a token at the beginning of a text, that token replaces the first token of every window.

`gptq` is the protocol of the quantisation literature since GPTQ (AWQ, AQLM, QuIP#, ClusComp). The lines of the text are joined
as the rows of the data set are; special tokens in it are recognised, as by the tokenizers of transformers. Windows have 2048
tokens (or what the paper says), and all tokens except the first are scored.

Windows do not overlap unless the stride is shorter than the context; the rest at the end is dropped. `docs/evaluation.md` has
figures of both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from cluscomp_formats.errors import InvalidRequestError, Problem

__all__ = ["PROTOCOLS", "Join", "Protocol", "choose_protocol", "join_rows"]

Join = Literal["rows", "none"]

PROTOCOLS: dict[str, tuple[int, Join]] = {"llama.cpp": (512, "none"), "gptq": (2048, "rows")}
"""The default context of each, and its default way to join a text."""


@dataclass(frozen=True)
class Protocol:
    """A protocol with all its parameters.

    `context` is the tokens of a window, `stride` the tokens from the beginning of one window to the beginning of the next. With
    `join="rows"`, the text first goes through `join_rows`.
    """

    name: str
    context: int
    stride: int
    join: Join

    def first_scored(self, index: int) -> int:
        """Position of the first scored token in window number `index`; all tokens after it are scored, too.

        If windows overlap, each except the first scores only its last `stride` tokens, which no earlier window has.
        """
        if index > 0 and self.stride < self.context:
            return self.context - self.stride
        return self.context // 2 + 1 if self.name == "llama.cpp" else 1

    @property
    def parse_special(self) -> bool:
        """Whether the text of a special token is that token (True) or plain characters."""
        return self.name != "llama.cpp"

    def prepare(self, text: str) -> str:
        """The text as it is tokenized."""
        joined = join_rows(text) if self.join == "rows" else text
        # llama.cpp reads a file as a prompt, without the line end at its end.
        return joined.removesuffix("\n") if self.name == "llama.cpp" else joined

    def windows(self, token_ids: Sequence[int], *, count: int | None, bos_id: int | None) -> list[list[int]]:
        """The first `count` full windows, all if None. `bos_id` is the token that the tokenizer adds at the beginning, if any.

        Raises InvalidRequestError if there is none.
        """
        available = (len(token_ids) - self.context) // self.stride + 1
        if available < 1:
            found, expected = f"{len(token_ids)} tokens", f"at least {self.context}, the length of a window"
            remedy = "use a longer text or a smaller `context`"
            problem = Problem("text_too_short", "the text is too short", found=found, expected=expected, remedy=remedy)
            raise InvalidRequestError(problem)
        used = available if count is None else min(count, available)
        starts = range(0, used * self.stride, self.stride)
        cut = [list(token_ids[start : start + self.context]) for start in starts]
        return cut if bos_id is None or self.name != "llama.cpp" else [[bos_id, *window[1:]] for window in cut]


def choose_protocol(
    name: str = "llama.cpp",
    *,
    context: int | None = None,
    stride: int | None = None,
    join: Join | None = None,
    limit: int | None = None,
) -> Protocol:
    """The protocol of that name. Its default context is at most `limit`, the most tokens that the model takes.

    Raises InvalidRequestError for an unknown name and for parameters that are out of range.
    """
    if name not in PROTOCOLS:
        raise InvalidRequestError(Problem("bad_option", "`protocol` is unknown", found=name, expected=" or ".join(PROTOCOLS)))
    default_context, default_join = PROTOCOLS[name]
    if context is None:
        context = default_context if limit is None else min(default_context, limit)
    problems = []
    least = 4 if name == "llama.cpp" else 2
    if context < least:
        problems.append(Problem("bad_option", "`context` is too small", found=str(context), expected=f"at least {least}"))
    if limit is not None and context > limit:
        message, expected = "`context` is longer than the model was made for", f"at most {limit} (max_position_embeddings)"
        problems.append(Problem("bad_option", message, found=str(context), expected=expected))
    stride = context if stride is None else stride
    if not problems and not 1 <= stride <= context:
        expected = f"1 to {context}, the tokens of a window"
        problems.append(Problem("bad_option", "`stride` is out of range", found=str(stride), expected=expected))
    if problems:
        raise InvalidRequestError(problems)
    return Protocol(name, context, stride, join or default_join)


def join_rows(text: str) -> str:
    r"""A text file as the scripts of GPTQ and its successors see it: `"\n\n".join(dataset["text"])`.

    The data set on the Hugging Face hub has a row per line of the file, line end included, and an empty row for each line of
    white space. Python read it as a text file: a line ends with `\n`, `\r\n` or `\r`, and all become `\n`.
    """
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    rows = [f"{line}\n" for line in lines[:-1]] + ([lines[-1]] if lines[-1] else [])
    return "\n\n".join(row if row.strip() else "" for row in rows)
