"""Decide whether a regular expression of a tokenizer takes time proportional to the text, for every text.

The tokenizers library matches with Oniguruma, which backtracks: `(a|a)*b` takes exponential time. `is_linear` accepts a subset
of the syntax for which backtracking is bounded. The subset includes the patterns of GPT-2, Llama 3, Qwen, DeepSeek-V3, o200k
and similar tokenizers. A pattern that is not accepted may still be harmless.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["is_linear"]

MAX_PATHS = 256
"""Ways to match the bounded parts of an alternative; each is tried at most once per position of the text."""

MAX_REPEAT = 64
"""A repetition with a larger bound counts as unbounded."""

_CHARACTER_ESCAPES = frozenset("sSdDwWhHnrtfvea")
_ASSERTION_ESCAPES = frozenset("bBAzZ")
_BRACES = re.compile(r"\{(\d{0,6})(?:(,)(\d{0,6}))?\}")
_GROUP = re.compile(r"\((?:\?(?:i?:|>|=|!|<=|<!))?(?!\?)")
_CODE_POINT = re.compile(r"x\{[0-9A-Fa-f]{1,8}\}|x[0-9A-Fa-f]{1,2}|u[0-9A-Fa-f]{4}|[pP]\{\^?[\w ]+\}")


class _UnknownSyntaxError(Exception):
    """The pattern has syntax outside the accepted subset."""


@dataclass(frozen=True)
class _Item:
    """A pattern that is matched `least` to `most` times; `most` is None for an unbounded repetition.

    `atom` is the pattern's text, `paths` the number of ways to match it once. `asserts` is True for an assertion, which
    consumes no characters. `body` has the alternatives of a group that is not repeated.
    """

    atom: str
    least: int
    most: int | None
    paths: int = 1
    asserts: bool = False
    body: tuple[tuple[_Item, ...], ...] = ()

    @property
    def fails(self) -> bool:
        """Whether matching can fail here."""
        return self.asserts or self.least > 0


_Branch = tuple[_Item, ...]


def is_linear(pattern: str) -> bool:
    """Return whether finding all matches of `pattern` takes time proportional to the text, for every text."""
    try:
        branches = _Parser(pattern).parse()
    except _UnknownSyntaxError:
        return False
    return all(_bounded_paths(branch) <= MAX_PATHS for branch in branches) and all(
        _is_amortised(branches, index) for index in range(len(branches))
    )


def _bounded_paths(branch: Sequence[_Item]) -> int:
    paths = 1
    for item in branch:
        if item.most is not None:
            paths *= sum(item.paths**count for count in range(item.least, item.most + 1))
            # Numbers above the limit need not be exact.
            paths = min(paths, MAX_PATHS + 1)
    return paths


def _scanning(branch: Sequence[_Item]) -> int | None:
    """Return the index of the item that may scan a run of characters before the match fails, None if there is none.

    Raises _UnknownSyntaxError if there are several.
    """
    found = [
        index for index, item in enumerate(branch) if item.most is None and any(later.fails for later in branch[index + 1 :])
    ]
    if len(found) > 1:
        raise _UnknownSyntaxError
    return found[0] if found else None


def _is_amortised(branches: Sequence[_Branch], index: int) -> bool:
    """Return whether a later branch matches any run that branch `index` scans before failing, as a whole and before others."""
    try:
        place = _scanning(branches[index])
        if place is None:
            return True
        prefix, run = branches[index][:place], branches[index][place].atom
        for branch in branches[index + 1 :]:
            start = next((position for position, item in enumerate(branch) if item.most is None), None)
            if start is None or branch[start].atom != run or branch[:start] not in ((), prefix):
                return False
            if _scanning(branch) is None:
                return branch[start].least <= 1
    except _UnknownSyntaxError:
        pass
    return False


class _Parser:
    """Parses the accepted syntax. Raises _UnknownSyntaxError for any other."""

    def __init__(self, pattern: str) -> None:
        self.pattern = pattern
        self.position = 0

    def parse(self) -> tuple[_Branch, ...]:
        branches = self._alternatives(depth=0)
        if self.position < len(self.pattern):
            raise _UnknownSyntaxError
        # A group around the whole pattern has no effect.
        while len(branches) == 1 and len(branches[0]) == 1 and branches[0][0].body and not branches[0][0].asserts:
            branches = branches[0][0].body
        return branches

    def _peek(self, length: int = 1) -> str:
        return self.pattern[self.position : self.position + length]

    def _alternatives(self, depth: int) -> tuple[_Branch, ...]:
        if depth > 8:
            raise _UnknownSyntaxError
        branches: list[list[_Item]] = [[]]
        while self._peek() not in ("", ")"):
            if self._peek() == "|":
                self.position += 1
                branches.append([])
            else:
                branches[-1].append(self._repeated(self._item(depth)))
        return tuple(tuple(branch) for branch in branches)

    def _item(self, depth: int) -> _Item:
        start = self.position
        character = self._peek()
        if character in ("*", "+", "?") or _BRACES.match(self.pattern, self.position):
            raise _UnknownSyntaxError
        if character == "(":
            return self._group(depth)
        self.position += 1
        if character == "[":
            self._character_class(depth)
        elif character == "\\" and not self._escape():
            return _Item(self.pattern[start : self.position], 1, 1, asserts=True)
        return _Item(self.pattern[start : self.position], 1, 1, asserts=character in ("^", "$"))

    def _escape(self) -> bool:
        """Parse the rest of an escape; return True if it matches a character, False if it is an assertion."""
        character = self._peek()
        if found := _CODE_POINT.match(self.pattern, self.position):
            self.position += len(found[0])
            return True
        if not character or (character.isalnum() and character not in _CHARACTER_ESCAPES | _ASSERTION_ESCAPES):
            raise _UnknownSyntaxError
        self.position += 1
        return character not in _ASSERTION_ESCAPES

    def _character_class(self, depth: int) -> None:
        """Parse the rest of a character class, which may contain others."""
        if depth > 16:
            raise _UnknownSyntaxError
        if self._peek() == "^":
            self.position += 1
        if self._peek() == "]":
            # A literal bracket or an empty class, depending on the version of Oniguruma.
            raise _UnknownSyntaxError
        while self._peek() != "]":
            character = self._peek()
            if not character:
                raise _UnknownSyntaxError
            self.position += 1
            if character == "[":
                self._character_class(depth + 1)
            elif character == "\\":
                self._escape()
        self.position += 1

    def _group(self, depth: int) -> _Item:
        start = self.position
        kind = _GROUP.match(self.pattern, start)
        if kind is None:
            raise _UnknownSyntaxError
        self.position += len(kind[0])
        branches = self._alternatives(depth + 1)
        if self._peek() != ")":
            raise _UnknownSyntaxError
        self.position += 1
        # An unbounded repetition inside a group counts as more paths than are accepted.
        unbounded = any(item.most is None for branch in branches for item in branch)
        paths = MAX_PATHS + 1 if unbounded else sum(_bounded_paths(branch) for branch in branches)
        nullable = any(not any(item.fails for item in branch) for branch in branches)
        looks = kind[0] in ("(?=", "(?!", "(?<=", "(?<!")
        return _Item(self.pattern[start : self.position], int(not nullable), 1, paths, looks, branches)

    def _repeated(self, item: _Item) -> _Item:
        """Return the item with the quantifier that follows it, if any."""
        character = self._peek()
        if braces := _BRACES.match(self.pattern, self.position):
            least, most = self._counts(braces)
            self.position += len(braces[0])
            suffixes = ""
        elif character and character in "?*+":
            least, most = {"?": (0, 1), "*": (0, None), "+": (1, None)}[character]
            self.position += 1
            suffixes = "?+"
        else:
            return item
        if self._peek() and self._peek() in suffixes:
            # A lazy or possessive quantifier tries no more matches per position than a greedy one.
            self.position += 1
        if item.asserts or self._peek(1) in ("?", "*", "+") or _BRACES.match(self.pattern, self.position):
            raise _UnknownSyntaxError
        if most is not None and most > MAX_REPEAT:
            most = None
        if item.body and most is None:
            # A text can often be divided into repetitions of a group in many ways.
            raise _UnknownSyntaxError
        return _Item(item.atom, least if item.least else 0, most, item.paths)

    def _counts(self, braces: re.Match[str]) -> tuple[int, int | None]:
        first, comma, second = braces.groups()
        if not first and not second:
            raise _UnknownSyntaxError
        least = int(first or 0)
        if comma is None:
            return least, least
        most = int(second) if second else None
        if most is not None and most < least:
            raise _UnknownSyntaxError
        return least, most
