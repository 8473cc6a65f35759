"""How packages hang together, in numbers: `python tools/count_imports.py cluscomp_export formats/cluscomp_formats [--json]`.

An arrow is an import of one file by another, also inside a function. Arrows are counted between files (a package is its
`__init__.py`), and between rooms: the files and folders directly in the package. `floors` is the length of the longest chain of
arrows, in which a circle is one room; `up` are the arrows that have to go for all circles to end. `code` are the lines without
blank ones, comments and docstrings.
"""

from __future__ import annotations

import argparse
import ast
import json
import tokenize
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

Arrows = dict[str, set[str]]

_NO_CODE = (
    tokenize.COMMENT,
    tokenize.DEDENT,
    tokenize.ENCODING,
    tokenize.ENDMARKER,
    tokenize.INDENT,
    tokenize.NL,
)


@dataclass(frozen=True)
class Level:
    """Figures of the files, or of the rooms, of a package."""

    nodes: int
    floors: int
    arrows: int
    circles: list[list[str]]
    up: int


def modules_of(package: Path) -> dict[str, ast.Module]:
    """The parsed files of a package by the name of the module."""
    modules = {}
    for file in sorted(package.rglob("*.py")):
        parts = file.relative_to(package.parent).with_suffix("").parts
        modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = ast.parse(file.read_text(encoding="utf-8"))
    return modules


def imported(tree: ast.Module, known: Mapping[str, object]) -> Iterator[str]:
    """The modules among the `known` that a file imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                if name in known or node.module in known:
                    yield name if name in known else node.module


def rooms_of(arrows: Arrows, package: str) -> Arrows:
    """The arrows between the files and folders directly in the package."""

    def room(module: str) -> str:
        return ".".join(module.split(".")[:2]) if module != package else f"{package}.__init__"

    rooms: Arrows = {room(module): set() for module in arrows}
    for module, targets in arrows.items():
        rooms[room(module)] |= {room(target) for target in targets} - {room(module)}
    return rooms


def count(arrows: Arrows) -> Level:
    """Figures of a graph, by Tarjan's algorithm: circles are found in the order in which floors are built."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    floor: dict[str, int] = {}
    circles: list[list[str]] = []
    up = 0

    def visit(node: str) -> None:
        nonlocal up
        index[node] = low[node] = len(index)
        stack.append(node)
        path.append(node)
        for target in sorted(arrows[node]):
            if target not in index:
                visit(target)
                low[node] = min(low[node], low[target])
            elif target in stack:
                low[node] = min(low[node], index[target])
                up += target in path
        path.pop()
        if low[node] == index[node]:
            circle = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            below = [floor[target] for member in circle for target in arrows[member] if target in floor]
            floor.update(dict.fromkeys(circle, 1 + max(below, default=0)))
            if len(circle) > 1:
                circles.append(sorted(circle))

    path: list[str] = []
    for node in sorted(arrows):
        if node not in index:
            visit(node)
    return Level(len(arrows), max(floor.values(), default=0), sum(map(len, arrows.values())), circles, up)


def code_lines(file: Path) -> int:
    """Lines that hold code; a string that is a statement by itself is a docstring."""
    lines: set[int] = set()
    previous = tokenize.NEWLINE
    with file.open("rb") as stream:
        for token in tokenize.tokenize(stream.readline):
            if token.type in _NO_CODE:
                continue
            if token.type != tokenize.NEWLINE and not (token.type == tokenize.STRING and previous == tokenize.NEWLINE):
                lines |= set(range(token.start[0], token.end[0] + 1))
            previous = token.type
    return len(lines)


def figures(package: Path) -> dict[str, Any]:
    """All figures of a package."""
    modules = modules_of(package)
    arrows = {name: set(imported(tree, modules)) - {name} for name, tree in modules.items()}
    files = list(package.rglob("*.py"))
    lines = sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files)
    code = sum(map(code_lines, files))
    levels = {"files": asdict(count(arrows)), "rooms": asdict(count(rooms_of(arrows, package.name)))}
    return {"lines": lines, "code": code, **levels}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", nargs="+", type=Path, help="folders of packages")
    parser.add_argument("--json", action="store_true", help="print the figures for machines")
    options = parser.parse_args()
    found = {package.name: figures(package.resolve()) for package in options.packages}
    if options.json:
        print(json.dumps(found))
        return
    print(f"{'':18}{'lines':>7}{'code':>7}   {'':6}{'nodes':>6}{'floors':>8}{'arrows':>8}{'circles':>9}{'up':>4}")
    for name, row in found.items():
        start = f"{name:18}{row['lines']:>7}{row['code']:>7}"
        for level in ("files", "rooms"):
            part = row[level]
            cells = f"{part['nodes']:>6}{part['floors']:>8}{part['arrows']:>8}{len(part['circles']):>9}{part['up']:>4}"
            print(f"{start:32}   {level:6}{cells}")
            start = ""
            for circle in part["circles"]:
                print(f"{'':35}circle: {', '.join(circle)}")


if __name__ == "__main__":
    main()
