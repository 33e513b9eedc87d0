"""`docs/refusals.md` is what the code says, and every sentence on it has a test that provokes it.

That the tests do provoke them is recorded while they run, and proved at the end of `make test`.
"""

from __future__ import annotations

import importlib
import re
import sys
import traceback
from pathlib import Path

import pytest

from ..raises import FOLDER, Finder, begin_test, begin_worker


DOCS = Path(__file__).parents[2] / "docs"
sys.path.insert(0, str(DOCS))  # scripts beside the pages, not a package
try:
    import refusals as script
    from refusals import (
        HOLE,
        LINKS,
        PAGE,
        TROUBLESHOOTING,
        dump_links,
        explains,
        find_provoked,
        find_tests,
        link,
        page,
        read_links,
        read_ran,
        read_records,
        read_rows,
    )
    from sentences import Refusal, find_refusals
finally:
    sys.path.remove(str(DOCS))


@pytest.fixture(scope="module")
def links() -> dict[Refusal, str | None]:
    return read_links(find_refusals())


def test_the_page_is_what_the_code_says(links):
    assert LINKS.read_text(encoding="utf-8") == dump_links(links), "run `make refusals`"
    assert PAGE.read_text(encoding="utf-8") == page(links), "run `make refusals`"


def test_every_sentence_before_the_first_step_has_a_test_that_exists(links):
    tests = find_tests()
    assert len(tests) > 500
    missing = [
        f"{refusal.module}:{refusal.line}: {refusal.shown}: {test}"
        for refusal, test in links.items()
        if (test is None and refusal.is_early) or (test is not None and test not in tests)
    ]
    assert missing == []


def test_troubleshooting_explains_sentences_that_exist(links):
    rows = read_rows(TROUBLESHOOTING.read_text(encoding="utf-8"))
    assert len(rows) > 100
    assert [row for row in rows if not any(explains(row, refusal) for refusal in links)] == []


def test_there_are_at_least_sixty(links):
    assert len([refusal for refusal in links if refusal.is_early]) >= 60


def test_every_raise_of_the_package_is_a_sentence_or_known_not_to_be(links):
    """A sentence that the reader of code cannot read would be missing on the page without a sound."""
    for refusal in links:
        assert len(re.findall(r"\w+", refusal.holed)) >= 4, (
            f"{refusal.module} {refusal.function}: write the sentence at its `raise`: {refusal.shown}"
        )


def test_no_function_says_a_sentence_twice(links):
    """Its two lines would share a row, and one of them could do without a test."""
    said = [(refusal.module, refusal.function, refusal.shown) for refusal in find_refusals()]
    assert len(said) == len(set(said))


# From records to links


def sentence(text: str, line: int = 1) -> Refusal:
    return Refusal("m.py", "f", "ValueError", line, text, re.sub(r"\{\w+\}", HOLE, text))


SIZE = sentence("`size` ({size}) must divide the world ({world}).")
ROWS = sentence("`rows` ({rows}) must be positive.", line=2)
OTHER_ROWS = sentence("`rows` ({rows}) is odd.", line=2)
ANY_ROWS = sentence("`rows` ({rows}) {what}.", line=3)


def record(line: int, test: str, message: str, function: str = "f") -> dict:
    return {"module": "m.py", "function": function, "line": line, "test": test, "message": message}


@pytest.mark.parametrize(
    ("line", "message", "expected"),
    [
        (1, "`size` (4) must divide the world (6).", SIZE),
        (1, "`size` (4\n5) must divide the world ().", SIZE),
        (1, "`size` (4) must divide the world (6). And more.", None),
        (1, "`size` (4) must divide.", None),
        (2, "`size` (4) must divide the world (6).", SIZE),  # it has moved since
        (2, "`rows` (0) must be positive.", ROWS),
        (2, "`rows` (0) is odd.", OTHER_ROWS),  # two sentences of one line
        (2, "`rows` (0) is odd. `rows` (1) is odd.", OTHER_ROWS),
        (3, "`rows` (0) is odd. `rows` (1) is odd.", ANY_ROWS),  # that of the line
        (1, "`rows` (0) is odd. `rows` (1) is odd.", OTHER_ROWS),  # that with more words
    ],
)
def test_a_record_belongs_to_the_sentence_of_its_function_that_it_says(line, message, expected):
    refusals = [SIZE, ROWS, ANY_ROWS, OTHER_ROWS]
    for function, belongs in (("f", expected), ("g", None)):
        made = record(line, "tests/unit/test_a.py::test_b[c::d]", message, function)
        seen = {refusal: tests for refusal, tests in find_provoked(refusals, [made]).items() if tests}
        assert seen == ({belongs: {"tests/unit/test_a.py::test_b"}} if belongs else {})


def test_a_test_that_needs_a_device_proves_nothing():
    provoked = find_provoked([ROWS], [record(2, "tests/gpu/test_gpu.py::test_a", "`rows` (0) must be positive.")])
    assert provoked == {ROWS: set()}


def test_a_link_stays_while_its_test_exists_and_is_else_the_test_with_the_fewest_sentences():
    provoked = {SIZE: {"broad", "narrow"}, ROWS: {"broad"}, OTHER_ROWS: {"broad", "another", "gone"}}
    tests = {"broad", "narrow", "another"}
    fresh = link(dict.fromkeys(provoked), provoked, tests, tests)
    assert fresh == {SIZE: "narrow", ROWS: "broad", OTHER_ROWS: "another"}
    assert link({**fresh, SIZE: "broad"}, provoked, tests, tests)[SIZE] == "broad"
    assert link({**fresh, SIZE: "another"}, provoked, tests, tests - {"another"})[SIZE] == "another"
    assert link({**fresh, SIZE: "another"}, provoked, tests, tests)[SIZE] == "narrow"  # it ran, in vain
    assert link({**fresh, SIZE: "gone"}, provoked, tests, set())[SIZE] == "narrow"
    nothing = dict.fromkeys(provoked, set())
    assert link(fresh, nothing, tests - {"narrow"}, set()) == {**fresh, SIZE: None}


def test_links_are_read_as_they_were_written(tmp_path):
    path, links = tmp_path / "links.json", {SIZE: "tests/a.py::b", ROWS: None}
    path.write_text(dump_links(links), encoding="utf-8")
    assert read_links([SIZE, ROWS, OTHER_ROWS], path) == {**links, OTHER_ROWS: None}


@pytest.fixture
def small(tmp_path, monkeypatch):
    """The script on two sentences and no records: a function that runs it with these links and records."""
    for name in ("PAGE", "LINKS", "RECORDS"):
        monkeypatch.setattr(script, name, tmp_path / name)
    monkeypatch.setattr(script, "find_refusals", lambda: [SIZE, ROWS])
    monkeypatch.setattr(script, "find_tests", lambda: {"t::a"})

    def run(arguments, links, records):
        monkeypatch.setattr(script, "read_links", lambda refusals: links)
        monkeypatch.setattr(script, "read_records", lambda: records)
        monkeypatch.setattr(script, "read_ran", lambda: {"t::a"})
        return script.main(arguments)

    return run


SEEN = [
    record(1, "t::a[1]", "`size` (4) must divide the world (6)."),
    record(2, "t::a", "`rows` (0) must be positive."),
]


def test_the_proof_fails_if_a_test_does_not_provoke_its_sentence_any_more(small, capsys):
    assert small(["--prove"], {SIZE: "t::a", ROWS: "t::a"}, SEEN) == 0
    assert small(["--prove"], {SIZE: "t::a", ROWS: "t::a"}, SEEN[:1]) == 1
    assert "not provoked by its test in this run" in capsys.readouterr().err
    assert small(["--prove"], {SIZE: "t::a", ROWS: "t::u"}, SEEN) == 1
    assert not script.PAGE.exists() and not script.LINKS.exists()


def test_writing_fails_if_a_sentence_has_no_test(small, capsys):
    assert small([], {SIZE: None, ROWS: None}, SEEN) == 0
    assert "| `` `rows` ({rows}) must be positive." not in script.PAGE.read_text()
    assert "`rows` ({rows}) must be positive. | `ValueError` |" in script.PAGE.read_text()
    assert small([], {SIZE: None, ROWS: None}, SEEN[1:]) == 1
    assert "no test: m.py:1: ValueError: `size`" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("row", "is_explained"),
    [
        ("`size` (...) must divide the world (...)", True),
        ("size (4) must divide", True),
        ("`size` ... the world", True),
        ("X must divide", True),
        ("must divide the moon", False),
        ("the world must divide", False),
        ("`rows` (...) must divide the world", False),
    ],
)
def test_a_row_of_troubleshooting_stands_in_its_sentence(row, is_explained):
    assert explains(row, SIZE) is is_explained


def test_names_and_values_of_a_row_may_be_filled_in():
    named = sentence("`{name}` ({value}) cannot be used with it")
    assert explains("`deepspeed` (True) cannot be used", named) and not explains("deepspeed cannot be used", named)


# Reading the code


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
    found = [(refusal.function, refusal.error, refusal.line, refusal.shown) for refusal in find_refusals(tmp_path)]
    assert found == [
        ("f", "ValueError", 4, "`x` ({x}) must be even."),
        ("g", "Odd", 8, "no {y} here"),
        ("h", "RuntimeError", 11, "a c {x}"),
        ("h", "RuntimeError", 11, "b c {x}"),
    ]


# Recording

ROOM = """
from __future__ import annotations
class Door:
    def open(self, x: Undefined):
        raise ValueError(f"`x` ({x}) is 0.")
def f(x: Undefined):
    if x == 0:
        Door().open(x)
    if x == 1:
        raise KeyError
    if x == 2:
        raise OSError(2, "no file") from ValueError("`x` causes it.")
    try:
        raise TypeError("`x` is odd.")
    except TypeError:
        raise
"""


@pytest.fixture
def room(tmp_path, monkeypatch):
    """A package of which raises are recorded."""
    (tmp_path / "someroom").mkdir()
    (tmp_path / "someroom" / "__init__.py").write_text("from .door import f")
    (tmp_path / "someroom" / "door.py").write_text(ROOM)
    monkeypatch.setenv(FOLDER, str(tmp_path / "records"))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "meta_path", [Finder("someroom"), *sys.meta_path])
    begin_worker("gw7")
    yield importlib.import_module("someroom")
    for name in ("someroom", "someroom.door"):
        del sys.modules[name]


def test_every_raise_is_recorded_with_its_test_line_and_message(room, tmp_path):
    for number, error in enumerate([ValueError, KeyError, OSError, TypeError]):
        begin_test(f"test_{number}")
        with pytest.raises(error) as caught:
            room.f(number)
    assert traceback.extract_tb(caught.tb)[-1].line == 'raise TypeError("`x` is odd.")'
    door = {"module": "door.py", "function": "f"}
    assert list(read_records(tmp_path / "records")) == [
        {**door, "function": "Door.open", "line": 5, "test": "test_0", "message": "`x` (0) is 0."},
        {**door, "line": 12, "test": "test_2", "message": "[Errno 2] no file"},
        {**door, "line": 14, "test": "test_3", "message": "`x` is odd."},
    ]
    assert {path.parent.name for path in (tmp_path / "records").rglob("*.jsonl")} == {"gw7"}
    assert read_ran(tmp_path / "records") == {f"test_{number}" for number in range(4)}
    assert not list(tmp_path.rglob("*.pyc")), "other runs would record as well"


def test_without_a_folder_nothing_is_recorded(tmp_path, monkeypatch):
    from .. import raises

    monkeypatch.delenv(FOLDER, raising=False)
    monkeypatch.chdir(tmp_path)
    before = list(sys.meta_path)
    assert raises.install() is None and sys.meta_path == before
    begin_worker("gw0")
    begin_test("test_a")
    assert not list(tmp_path.iterdir())
