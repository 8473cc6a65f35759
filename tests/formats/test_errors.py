"""Texts of errors: they have all facts of a problem, and nothing that a terminal would interpret."""

import pytest

from cluscomp_formats.errors import MAX_PROBLEMS, InvalidFileError, Problem, grouped, printable


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


def test_what_thousands_of_tensors_have_in_common_is_said_once() -> None:
    names = [f"layers.0.experts.{number}.up_proj.weight" for number in range(500)]
    error = InvalidFileError([Problem("missing", "it is missing", "m.clus", name, remedy="get it") for name in names])
    assert len(error.problems) == 500
    assert str(error) == f"m.clus · {', '.join(names[:3])} and 497 more: it is missing\n  remedy: get it"


def test_a_group_shows_what_was_found_of_those_it_names() -> None:
    problems = [Problem("wrong_shape", "wrong shape", None, f"t{number}", f"({number},)", "(9,)") for number in range(2)]
    (shown,) = grouped([*problems])
    assert shown == Problem("wrong_shape", "wrong shape", None, "t0, t1", "(0,), (1,)", "(9,)")


def test_problems_of_one_kind_and_several_remedies_stay_apart() -> None:
    problems = [Problem("missing", "no such file", name, remedy=f"get {name}") for name in "ab"]
    assert grouped(problems) == problems
    assert [problem.file for problem in grouped([Problem("missing", "no such file", name) for name in "abcde"])] == [
        "a, b, c and 2 more"
    ]
