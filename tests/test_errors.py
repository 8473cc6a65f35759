"""What people get to read: the facts of a problem, and nothing that a terminal would obey."""

import pytest

from cluscomp_formats.errors import MAX_PROBLEMS, InvalidFileError, Problem, printable


def test_a_problem_says_where_what_and_what_to_do() -> None:
    problem = Problem("kind", "it is broken", "m.clus", "a.weight", "1", "2", "mend it")
    assert str(problem) == "m.clus · a.weight: it is broken\n  found: 1\n  expected: 2\n  remedy: mend it"


@pytest.mark.parametrize("field", ["message", "file", "tensor", "found", "expected", "remedy"])
@pytest.mark.parametrize("text", ["\x1b[2J", "\udcff", "\x00", "\u202e", "\x9b"])
def test_names_of_hostile_files_are_escaped(field: str, text: str) -> None:
    problem = Problem(**{"kind": "kind", "message": "message", field: f"a{text}b"})  # type: ignore[arg-type]
    shown = str(InvalidFileError(problem))
    assert text not in shown
    assert shown.encode()
    assert problem.as_dict()[field] == f"a{text}b"


def test_a_name_cannot_look_like_another_line() -> None:
    problem = Problem("kind", "of two\nlines", tensor="a\n  remedy: run this")
    assert str(problem) == "a\\n  remedy: run this: of two\nlines"


def test_text_of_any_language_stays_as_it_is() -> None:
    assert printable("日本語 é ok") == "日本語 é ok"


def test_an_error_of_a_hostile_file_stays_short() -> None:
    error = InvalidFileError([Problem("kind", f"number {number}", "m.clus") for number in range(MAX_PROBLEMS + 7)])
    assert len(error.problems) == MAX_PROBLEMS + 1
    assert str(error).endswith(f"m.clus: number {MAX_PROBLEMS - 1}\nm.clus: and 7 more problems")
