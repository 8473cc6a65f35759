"""Whether a regular expression of a tokenizer takes time in proportion to the text, whatever the text.

The tokenizers library matches with Oniguruma, which backtracks: `(a|a)*b` takes time without end. What is accepted here is a
part of its syntax for which backtracking is bounded. It holds the patterns of GPT-2, Llama 3, Qwen, DeepSeek-V3, o200k and
their like. A pattern that is not accepted may still be harmless.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["is_linear"]

MAX_PATHS = 256
"""Ways to match the bounded parts of an alternative, each tried at most once from a position of the text."""

MAX_REPEAT = 64
"""A larger bound of a repetition counts as none."""

_CHARACTER_ESCAPES = frozenset("sSdDwWhHnrtfvea")
_ASSERTION_ESCAPES = frozenset("bBAzZ")
_BRACES = re.compile(r"\{(\d{0,6})(?:(,)(\d{0,6}))?\}")
_GROUP = re.compile(r"\((?:\?(?:i?:|>|=|!|<=|<!))?(?!\?)")
_CODE_POINT = re.compile(r"x\{[0-9A-Fa-f]{1,8}\}|x[0-9A-Fa-f]{1,2}|u[0-9A-Fa-f]{4}|[pP]\{\^?[\w ]+\}")


class _UnknownSyntaxError(Exception):
    """Syntax whose cost is not known here."""


@dataclass(frozen=True)
class _Item:
    """Something that is matched `least` to `most` times; `most` is None for any number of times.

    `atom` is its pattern, `paths` the ways to match it once, `asserts` that it looks and takes nothing. `body` is what a group
    that is not repeated holds.
    """

    atom: str
    least: int
    most: int | None
    paths: int = 1
    asserts: bool = False
    body: tuple[tuple[_Item, ...], ...] = ()

    @property
    def fails(self) -> bool:
        """Whether matching can end here."""
        return self.asserts or self.least > 0


_Branch = tuple[_Item, ...]


def is_linear(pattern: str) -> bool:
    """Whether finding all matches of `pattern` in any text takes time in proportion to the text."""
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
            # Larger numbers are of no use.
            paths = min(paths, MAX_PATHS + 1)
    return paths


def _scanning(branch: Sequence[_Item]) -> int | None:
    """The item that may scan a run of characters in vain, None if there is none. Raises _UnknownSyntaxError for more."""
    found = [
        index for index, item in enumerate(branch) if item.most is None and any(later.fails for later in branch[index + 1 :])
    ]
    if len(found) > 1:
        raise _UnknownSyntaxError
    return found[0] if found else None


def _is_amortised(branches: Sequence[_Branch], index: int) -> bool:
    """Whether a run that branch `index` scans in vain is taken whole by a branch after it, before any other gets a chance."""
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
    """Reads the accepted syntax. Raises _UnknownSyntaxError at anything else."""

    def __init__(self, pattern: str) -> None:
        self.pattern = pattern
        self.position = 0

    def parse(self) -> tuple[_Branch, ...]:
        branches = self._alternatives(depth=0)
        if self.position < len(self.pattern):
            raise _UnknownSyntaxError
        # A group around the whole changes nothing.
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
        """Reads what follows a backslash; whether it stands for a character."""
        character = self._peek()
        if found := _CODE_POINT.match(self.pattern, self.position):
            self.position += len(found[0])
            return True
        if not character or (character.isalnum() and character not in _CHARACTER_ESCAPES | _ASSERTION_ESCAPES):
            raise _UnknownSyntaxError
        self.position += 1
        return character not in _ASSERTION_ESCAPES

    def _character_class(self, depth: int) -> None:
        """Reads to the end of a class, which may hold others."""
        if depth > 16:
            raise _UnknownSyntaxError
        if self._peek() == "^":
            self.position += 1
        if self._peek() == "]":
            # A bracket, or an empty class: versions differ.
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
        # What may be of any length in a group is bounded nowhere.
        unbounded = any(item.most is None for branch in branches for item in branch)
        paths = MAX_PATHS + 1 if unbounded else sum(_bounded_paths(branch) for branch in branches)
        nullable = any(not any(item.fails for item in branch) for branch in branches)
        looks = kind[0] in ("(?=", "(?!", "(?<=", "(?<!")
        return _Item(self.pattern[start : self.position], int(not nullable), 1, paths, looks, branches)

    def _repeated(self, item: _Item) -> _Item:
        """The item with the quantifier that follows it, if any."""
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
            # Lazy or possessive: from a position, no more is tried than without.
            self.position += 1
        if item.asserts or self._peek(1) in ("?", "*", "+") or _BRACES.match(self.pattern, self.position):
            raise _UnknownSyntaxError
        if most is not None and most > MAX_REPEAT:
            most = None
        if item.body and most is None:
            # What a group repeats without end can often be cut in many ways.
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
