"""The pages' examples do what they say: a `print(...)  # answer` prints its answer."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
ANSWER = re.compile(r"^print\(.*\)(?:  # (?P<beside>.+)|\n# (?P<below>.+))$", re.MULTILINE)
EXAMPLES = [
    pytest.param(code, id=f"{page.name}-{number}")
    for page in sorted((ROOT / "docs").glob("*.md"))
    for number, code in enumerate(BLOCK.findall(page.read_text()))
    if ANSWER.search(code)
]


def test_examples_are_found():
    assert len(EXAMPLES) >= 7


@pytest.mark.parametrize("code", EXAMPLES)
def test_example_prints_its_answer(code, monkeypatch):
    monkeypatch.chdir(ROOT)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "<example>", "exec"), {"__name__": "__main__"})
    lines = printed.getvalue().splitlines()
    answers = [match["beside"] or match["below"] for match in ANSWER.finditer(code)]
    assert len(lines) >= len(answers)
    for answer in answers:
        beginning = answer.split(":")[0] if answer not in lines else answer  # an answer may be explained after a colon
        assert any(line.startswith(beginning) for line in lines), (answer, lines)
