"""Errors of files, models and requests, as data.

Every error has one or more `Problem`s, so that a reader can report all of them at once, and an exit code, so that scripts can
distinguish the cases. Libraries raise errors and never print; the command line prints the problems.
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
"""Largest number of problems that an error lists."""
MAX_NAMES = 3
"""Names listed for a group of problems."""


@dataclass(frozen=True)
class Problem:
    """One problem: its location, what was found, what was expected, and the remedy.

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
        """Return the problem as text. Characters that a terminal would interpret are escaped: names may be hostile."""
        where = " · ".join(printable(part) for part in (self.file, self.tensor) if part)
        message = "\n".join(map(printable, self.message.split("\n")))
        lines = [f"{where}: {message}" if where else message]
        for label, text in (("found", self.found), ("expected", self.expected), ("remedy", self.remedy)):
            if text is not None:
                lines.append(f"  {label}: {printable(text)}")
        return "\n".join(lines)

    def as_dict(self) -> dict[str, str]:
        """The fields that are set, as a JSON object."""
        return {key: value for key, value in vars(self).items() if value is not None}


def printable(text: str) -> str:
    """Return a text with everything escaped that a stream cannot encode or a terminal would interpret, including line ends."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def grouped(problems: Iterable[Problem]) -> list[Problem]:
    """Merge problems that are the same for several tensors or several files, for people.

    A merged problem names the first `MAX_NAMES` of them and counts the others. A checkpoint with experts has thousands of
    similar tensors.
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


# Characters that reverse the order of the following ones.
_REORDERING = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def displayable(text: str) -> str:
    """Return a possibly hostile text with control characters escaped, except line ends and tabs.

    Characters that reorder the surrounding text and lone surrogates, which no stream can encode, are escaped as well.
    """
    if text.isprintable():
        return text
    return "".join(c.encode("unicode_escape").decode() if _is_unsafe(c) else c for c in text)


def _is_unsafe(character: str) -> bool:
    return character in _REORDERING or (character not in "\n\t" and unicodedata.category(character) in ("Cc", "Cs"))


class ClusCompError(Exception):
    """Base class of the errors of this project. `problems` is never empty; the text of the error groups them.

    If there are more than `MAX_PROBLEMS`, the first are kept and the others counted: a hostile file can have millions.
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
        """Pickle all problems, so that errors of worker processes arrive complete."""
        return type(self), (self.problems,)


class InvalidRequestError(ClusCompError):
    """Options contradict each other or cannot be satisfied. Exit code 2, as for any usage error."""

    exit_code = 2


class InvalidFileError(ClusCompError):
    """A file is missing, truncated, corrupt, of a future version, or not of the type its name suggests. Exit code 3."""

    exit_code = 3


class UnsupportedError(ClusCompError):
    """This version does not support a valid input, such as an unknown architecture. Exit code 4."""

    exit_code = 4


class OutputExistsError(ClusCompError):
    """The output already exists and `force` was not given. Exit code 5."""

    exit_code = 5


class StorageError(ClusCompError):
    """The operating system refused to read or write: no space left, no permission. Exit code 6."""

    exit_code = 6


class SelfTestError(ClusCompError):
    """The loaded model does not compute the logits of its self-test record. Exit code 7."""

    exit_code = 7


class WorkersLostError(ClusCompError):
    """Worker processes died repeatedly. Exit code 8."""

    exit_code = 8
