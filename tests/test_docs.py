"""Links, names and line lengths of the documentation."""

from __future__ import annotations

import ast
import importlib
import re
from functools import cache
from pathlib import Path
from urllib.parse import unquote

import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))]
LINK = re.compile(r"(?<!!)\[(?:[^\[\]]|\[[^\]]*\])*\]\(([^()\s]+)\)", re.DOTALL)


def prose(path: Path) -> list[tuple[int, str]]:
    """The lines of a page with their numbers, code blocks left out."""
    lines: list[tuple[int, str]] = []
    fence = indented = False
    before = ""
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        indented = line.startswith("    ") and (indented or not before.strip())
        before = line
        if line.lstrip().startswith("```"):
            fence = not fence
        elif not fence and not indented:
            lines.append((number, line))
    return lines


def links(path: Path) -> set[str]:
    text = re.sub(r"`[^`\n]*`", "", "\n".join(line for _, line in prose(path)))
    return {link for link in LINK.findall(text) if not re.match(r"[a-z]+:", link)}


@cache
def anchors(path: Path) -> set[str]:
    """What GitHub and the site call the headings of a page."""
    headings = [line.lstrip("#").strip() for _, line in prose(path) if re.match(r"#{1,6} ", line)]
    slugs = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
    assert len(slugs) == len(set(slugs)), f"{path}: two headings have the same anchor"
    return set(slugs)


def target(page: Path, link: str) -> tuple[Path, str]:
    name, _, anchor = link.partition("#")
    return (page.parent / unquote(name)).resolve() if name else page, anchor


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for link in sorted(links(page)):
        path, anchor = target(page, link)
        if not path.exists() or (anchor and anchor not in anchors(path)):
            broken.append(link)
    assert broken == []


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.name)
def test_pages_link_only_to_what_the_site_has(page: Path) -> None:
    """A link out of docs/ works on GitHub but not on the site."""
    assert [link for link in sorted(links(page)) if not target(page, link)[0].is_relative_to(DOCS)] == []


def test_the_index_and_the_site_list_every_page_in_the_same_order() -> None:
    listed = LINK.findall((DOCS / "index.md").read_text(encoding="utf-8"))
    pages = ["index.md", *(link for link in listed if not link.startswith("https:"))]
    assert sorted(pages) == sorted(page.name for page in DOCS.glob("*.md"))
    assert re.findall(r"^ +- (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE) == pages


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_named_in_prose_exist(page: Path) -> None:
    roots = [ROOT, *(ROOT / package for package in ("formats", "kernels", "runtime"))]
    text = page.read_text(encoding="utf-8")
    paths = set(re.findall(r"(?<![\w./-])(?:benchmarks|tools|tests|docs|cluscomp_\w+)/[\w./-]*\w", text))
    assert [path for path in sorted(paths) if not any((root / path).exists() for root in roots)] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_examples_import_what_exists(page: Path) -> None:
    code = re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    for node in (node for example in code for node in ast.walk(ast.parse(example)) if isinstance(node, ast.ImportFrom)):
        if node.module and node.module.startswith("cluscomp_"):
            module = importlib.import_module(node.module)
            assert [name.name for name in node.names if not hasattr(module, name.name)] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_lines_are_short(page: Path) -> None:
    """Of prose; tables, code and lines that hold nothing but a link may be longer."""
    too_long = [number for number, line in prose(page) if len(line) > 120 and not re.match(r"\s*(\||\[\S*\]\S*$)", line)]
    assert too_long == []
