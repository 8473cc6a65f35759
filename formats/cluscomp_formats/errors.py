"""What can go wrong with a file, a model or a request, as data.

Every error carries one or more `Problem`s, so that a reader reports all it found at once, and an exit code, so that scripts
can tell the cases apart. The command line prints the problems; libraries raise and never print.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

__all__ = [
    "ClusCompError",
    "InvalidFileError",
    "InvalidRequestError",
    "OutputExistsError",
    "Problem",
    "SelfTestError",
    "StorageError",
    "UnsupportedError",
    "WorkersLostError",
    "displayable",
    "grouped",
    "printable",
]


MAX_PROBLEMS = 1000
"""An error lists no more; nobody reads them."""
MAX_NAMES = 3
"""Names that stand for a group of problems."""


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: where it is, what was found, what was expected, what to do.

    `kind` is a stable identifier (`bad_magic`, `checksum_mismatch`, ...) for machines and tests.
    """

    kind: str
    message: str
    file: str | None = None
    tensor: str | None = None
    found: str | None = None
    expected: str | None = None
    remedy: str | None = None

    def __str__(self) -> str:
        """For people. What no stream can encode or a terminal would obey is escaped: names come from files of any origin."""
        where = " · ".join(printable(part) for part in (self.file, self.tensor) if part)
        message = "\n".join(map(printable, self.message.split("\n")))
        lines = [f"{where}: {message}" if where else message]
        for label, text in (("found", self.found), ("expected", self.expected), ("remedy", self.remedy)):
            if text is not None:
                lines.append(f"  {label}: {printable(text)}")
        return "\n".join(lines)

    def as_dict(self) -> dict[str, str]:
        """The fields that are set, for `--json`."""
        return {key: value for key, value in vars(self).items() if value is not None}


def printable(text: str) -> str:
    """A text with everything escaped that no stream can encode or a terminal would obey, line ends included."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def grouped(problems: Iterable[Problem]) -> list[Problem]:
    """Problems for people: those that say the same of several tensors, or of several files, become one.

    It names the first `MAX_NAMES` of them and counts the others. A checkpoint with experts has thousands of tensors alike.
    """
    groups: dict[tuple[str | None, ...], list[Problem]] = {}
    for problem in problems:
        where = None if problem.tensor is None else problem.file
        groups.setdefault((problem.kind, problem.message, problem.remedy, where), []).append(problem)
    return [group[0] if len(group) == 1 else _merged(group) for group in groups.values()]


def _merged(group: Sequence[Problem]) -> Problem:
    files, tensors = (_listed(vars(problem)[label] for problem in group) for label in ("file", "tensor"))
    found, expected = (_listed(vars(problem)[label] for problem in group) for label in ("found", "expected"))
    return Problem(group[0].kind, group[0].message, files, tensors, found, expected, group[0].remedy)


def _listed(values: Iterable[str | None]) -> str | None:
    distinct = list(dict.fromkeys(value for value in values if value is not None))
    left = len(distinct) - MAX_NAMES
    return ", ".join(distinct[:MAX_NAMES]) + (f" and {left} more" if left > 0 else "") if distinct else None


# What reverses the order of the characters after it.
_REORDERING = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def displayable(text: str) -> str:
    """A text of any origin with the control characters escaped that a terminal would obey; line ends and tabs stay.

    So are those that reorder the text around them, and lone surrogates, which no stream can encode. All else is text.
    """
    if text.isprintable():
        return text
    return "".join(c.encode("unicode_escape").decode() if _steers(c) else c for c in text)


def _steers(character: str) -> bool:
    return character in _REORDERING or (character not in "\n\t" and unicodedata.category(character) in ("Cc", "Cs"))


class ClusCompError(Exception):
    """Base of all errors this project raises on purpose. `problems` is never empty; the text of the error groups them.

    Of more than `MAX_PROBLEMS` the first are kept and the others counted: a hostile file may have one in every few bytes.
    """

    exit_code = 1

    def __init__(self, problems: Problem | Sequence[Problem]) -> None:
        listed = (problems,) if isinstance(problems, Problem) else tuple(problems)
        if len(listed) > MAX_PROBLEMS:
            message = f"and {len(listed) - MAX_PROBLEMS} more problems"
            listed = (*listed[:MAX_PROBLEMS], Problem("more_problems", message, listed[0].file))
        self.problems: tuple[Problem, ...] = listed
        super().__init__("\n".join(map(str, grouped(self.problems))))

    def __reduce__(self) -> tuple[type[ClusCompError], tuple[tuple[Problem, ...]]]:
        """Errors come back whole from worker processes."""
        return type(self), (self.problems,)


class InvalidRequestError(ClusCompError):
    """Options that contradict each other or cannot be met. Exit code 2, as for any usage error."""

    exit_code = 2


class InvalidFileError(ClusCompError):
    """A file that is missing, truncated, corrupt, of a future version or not what its name says. Exit code 3."""

    exit_code = 3


class UnsupportedError(ClusCompError):
    """A valid input this version cannot handle, such as an architecture the decoder does not know. Exit code 4."""

    exit_code = 4


class OutputExistsError(ClusCompError):
    """The output is already there and `--force` was not given. Exit code 5."""

    exit_code = 5


class StorageError(ClusCompError):
    """The operating system refused to read or write: no space left, no permission. Exit code 6."""

    exit_code = 6


class SelfTestError(ClusCompError):
    """The model loaded, but does not compute what its self-test record says. Exit code 7."""

    exit_code = 7


class WorkersLostError(ClusCompError):
    """Worker processes died, again and again. Exit code 8."""

    exit_code = 8
