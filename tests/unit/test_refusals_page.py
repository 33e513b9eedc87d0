"""`docs/refusals.md` is what the code says, and every sentence on it has a test that provokes it."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest


DOCS = Path(__file__).parents[2] / "docs"
sys.path.insert(0, str(DOCS))  # scripts beside the pages, not a package
try:
    from refusals import (
        HOLE,
        PAGE,
        TROUBLESHOOTING,
        Expectation,
        _regex_words,
        find_expectations,
        fit,
        is_said,
        link,
        page,
        read_rows,
    )
    from sentences import Refusal, find_refusals, split_words
finally:
    sys.path.remove(str(DOCS))


@pytest.fixture(scope="module")
def tests() -> dict[Refusal, list[str]]:
    return link(find_refusals(), find_expectations())


def test_the_page_is_what_the_code_says(tests):
    assert PAGE.read_text(encoding="utf-8") == page(tests), "run `make refusals`"


def test_every_sentence_before_the_first_step_has_a_test(tests):
    missing = [
        f"{refusal.module}: {refusal.shown}" for refusal, names in tests.items() if refusal.is_early and not names
    ]
    assert missing == []


def test_troubleshooting_explains_sentences_that_exist(tests):
    rows = read_rows(TROUBLESHOOTING.read_text(encoding="utf-8"))
    assert len(rows) > 100
    assert [row for row in rows if not any(is_said(row, refusal) for refusal in tests)] == []


def test_there_are_at_least_sixty(tests):
    assert len([refusal for refusal in tests if refusal.is_early]) >= 60


def test_every_raise_of_the_package_is_a_sentence_or_known_not_to_be():
    """A sentence that the reader of code cannot read would be missing on the page without a sound."""
    for refusal in find_refusals():
        fixed = [word for word in refusal.words if word != HOLE]
        assert len(fixed) >= 4, (
            f"{refusal.module} {refusal.function}: write the sentence at its `raise`: {refusal.shown}"
        )


# The finder itself


def sentence(text: str, error: str = "ValueError") -> Refusal:
    return Refusal("m.py", "f", error, text, split_words(re.sub(r"\{\w+\}", HOLE, text)))


SIZE = sentence("`size` ({size}) must divide the world ({world}): start {more} processes.")
ROWS = sentence("`rows` ({rows}) must be positive: start more processes.")


@pytest.mark.parametrize(
    ("pattern", "belongs"),
    [
        (r"`size` \(4\) must divide the world \(6\)", SIZE),
        (r"must divide.*start 4 or 8 processes", SIZE),
        (r"(?s)`rows`.*positive", ROWS),
        (r"rows.* must be posi", ROWS),
        ("start .* processes", None),  # fits both
        ("processes", None),  # one word proves nothing
        ("the world must divide", None),  # in another order
        ("must divide the moon", None),
    ],
)
def test_an_expected_text_belongs_to_the_sentence_that_says_it(pattern, belongs):
    linked = link([SIZE, ROWS], [Expectation("t::t", frozenset(), _regex_words(pattern))])
    assert [refusal for refusal, names in linked.items() if names] == ([belongs] if belongs else [])


def test_another_error_is_another_refusal():
    other = sentence(SIZE.shown, "TypeError")
    expectation = Expectation("t::t", frozenset({"TypeError"}), _regex_words("must divide the world"))
    linked = link([SIZE, other], [expectation])
    assert linked[other] == ["t::t"] and linked[SIZE] == []


def test_two_sentences_that_fit_alike_are_told_apart_by_the_place_that_the_test_names():
    here = sentence("`rows` ({rows}) must be positive.")
    there = Refusal("room.py", "Window.check", "ValueError", here.shown, here.words)
    words = _regex_words("must be positive")
    assert link([here, there], [Expectation("t::t", frozenset(), words)]) == {here: [], there: []}
    for name in ("room", "Window", "check"):
        linked = link([here, there], [Expectation("t::t", frozenset(), words, frozenset({name, "other"}))])
        assert linked == {here: [], there: ["t::t"]}


def test_a_filled_in_value_may_be_several_words():
    assert fit(split_words("start 4 or 8 processes"), SIZE.words) == 2
    assert fit(split_words("start 4 or 8 machines"), SIZE.words) == 1


def test_sentences_are_read_from_every_way_of_writing_them(tmp_path):
    (tmp_path / "room.py").write_text(
        "class Odd(ValueError): pass\n"
        "class _Answer(Exception): pass\n"
        "def f(x):\n    raise ValueError(f'`x` ({x!r}) must be ' 'even.')\n"
        "def why(x):\n    return f'no {x.y} here'\n"
        "def g(x):\n    raise Odd(why(x))\n"
        "def h(x):\n    text = 'a' if x else 'b'\n    raise RuntimeError(text + f' c {len(x)}')\n"
        "def k():\n    raise KeyError('not ours')\n"
        "def l():\n    raise _Answer('caught where it is raised')\n"
    )
    found = [(refusal.function, refusal.error, refusal.shown) for refusal in find_refusals(tmp_path)]
    assert found == [
        ("f", "ValueError", "`x` ({x}) must be even."),
        ("g", "Odd", "no {y} here"),
        ("h", "RuntimeError", "a c {x}"),
        ("h", "RuntimeError", "b c {x}"),
    ]
