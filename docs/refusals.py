"""List every sentence with which the package refuses, and its test: `python docs/refusals.py` writes `refusals.md`.

The test of a sentence is found in the tests by what they expect: the text of `pytest.raises(..., match=...)`, also
through the tables of `parametrize`, or texts that are asserted to be in a message. An expected text belongs to the
sentence in which most of its words stand, in order; where two fit alike, to the one whose module or function the test
names, or else to neither, so a vague test proves nothing here. Nothing is imported or run: whether the test passes is
for the test to say.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from sentences import ERRORS, HOLE, ROOT, Refusal, find_refusals, split_words


PAGE = ROOT / "docs" / "refusals.md"
TROUBLESHOOTING = ROOT / "docs" / "troubleshooting.md"
FEWEST_WORDS = 2


@dataclass(frozen=True)
class Expectation:
    """What a test expects: the errors it allows (none: any), the words, with holes for the rest, and the names of
    modules and functions that stand beside it."""

    test: str
    errors: frozenset[str]
    words: tuple[str, ...]
    names: frozenset[str] = frozenset()


def find_expectations(tests: Path = ROOT / "tests") -> list[Expectation]:
    """Every text that some test expects of an error or of what is printed."""
    found = []
    for path in sorted(tests.rglob("test_*.py")):
        if path.parent.name == "gpu":  # not run everywhere
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        tables = {
            target.id: node.value
            for node in tree.body
            if isinstance(node, ast.Assign)
            for target in node.targets
            if isinstance(target, ast.Name)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                name = f"{path.relative_to(tests.parent).as_posix()}::{node.name}"
                found += [Expectation(name, *expected) for expected in _expected(node, tables)]
    return found


def _expected(function: ast.FunctionDef, tables: dict[str, ast.expr]) -> Iterator[tuple]:
    given = [text for decorator in function.decorator_list for text in _strings(decorator, tables, frozenset())]
    inside = _names(function)
    for node in ast.walk(function):
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "raises":
            errors = _names(node.args[0]) if node.args else frozenset()
            errors = errors if errors <= ERRORS | {"AssertionError"} else frozenset()
            for keyword in node.keywords:
                if keyword.arg == "match":
                    for text, names in _patterns(keyword.value, given, tables):
                        yield errors, _regex_words(text), names | inside
        elif isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.In) and _is_message(node.comparators[0]):
            for text, names in _patterns(node.left, given, tables):
                yield frozenset(), split_words(text), names | inside


def _names(node: ast.AST) -> frozenset[str]:
    inner = list(ast.walk(node))
    return frozenset(
        [n.id for n in inner if isinstance(n, ast.Name)] + [n.attr for n in inner if isinstance(n, ast.Attribute)]
    )


def _is_message(node: ast.expr) -> bool:
    """Whether a text is looked for in an error or in what a command printed."""
    return re.search(r"error|err\b|out\b|message|sentence|printed|refusal", ast.unparse(node)) is not None


Text = tuple[str, frozenset[str]]


def _patterns(node: ast.expr, given: list[Text], tables: dict[str, ast.expr]) -> list[Text]:
    """The texts of an expression; a name in it stands for any text of the tables that feed the test."""
    if isinstance(node, ast.Constant):
        return [(node.value, frozenset())] if isinstance(node.value, str) else []
    if isinstance(node, ast.JoinedStr):
        text = "".join(p.value if isinstance(p, ast.Constant) else HOLE for p in node.values)
        return given if text.replace("(?s)", "") == HOLE else [(text, frozenset())]
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        sides = [_patterns(side, given, tables) or [(HOLE, frozenset())] for side in (node.left, node.right)]
        return [(a + b, names | more) for a, names in sides[0] for b, more in sides[1]]
    if isinstance(node, ast.Name) and node.id in tables:
        return list(_strings(tables[node.id], tables, frozenset()))
    if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "escape" and node.args:
        return [(re.escape(text), names) for text, names in _patterns(node.args[0], given, tables)]
    return given if isinstance(node, ast.Name) else []


def _strings(node: ast.AST, tables: dict[str, ast.expr], names: frozenset[str]) -> Iterator[Text]:
    """Every text of a table, with the names in its line."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value, names
    if isinstance(node, ast.Name) and node.id in tables:
        yield from _strings(tables[node.id], {k: v for k, v in tables.items() if k != node.id}, names)
    for child in ast.iter_child_nodes(node):
        yield from _strings(child, tables, _names(node) if isinstance(node, ast.Tuple) else names)


@cache
def _regex_words(pattern: str) -> tuple[str, ...]:
    """The words of a pattern, with holes for whatever is not a plain character."""
    text = re.sub(r"^\(\?\w+\)", "", pattern)
    text = re.sub(r"\\([dwsDWSbB])[*+?]?", HOLE, text)
    text = re.sub(r"(?<!\\)(\[[^\]]*\]|\.)([*+?]\??|\{[^}]*\})?", HOLE, text)
    text = re.sub(r"(?<!\\)[()^$|?]", " ", text)
    return split_words(re.sub(r"\\(.)", r"\1", text))


def fit(expected: tuple[str, ...], sentence: tuple[str, ...]) -> int:
    """How many words of `expected` stand in `sentence`, in order; 0 if `sentence` cannot say it.

    A hole of the sentence may be any words; a hole of what is expected skips any. A word beside such a hole may be the
    end or the beginning of a word.
    """
    impossible, most = -1, 0
    before = [0] + [impossible] * len(expected)  # entry `i`: the first `i` expected are said by the sentence so far
    for word in sentence:
        after = [0] + [impossible] * len(expected)  # what is expected may begin anywhere
        for i, wanted in enumerate(expected, start=1):
            starts = i == 1 or expected[i - 2] == HOLE
            stops = i == len(expected) or expected[i] == HOLE
            options = [impossible]
            if wanted == HOLE:
                options += [after[i - 1], before[i], before[i - 1]]
            if word == HOLE:
                options += [after[i - 1], before[i]]
            elif before[i - 1] != impossible and (
                word == wanted or (starts and word.endswith(wanted)) or (stops and word.startswith(wanted))
            ):
                options.append(before[i - 1] + 1)
            after[i] = max(options)
        before = after
        most = max(most, after[-1])
    return most


def _places(refusal: Refusal) -> set[str]:
    """Names by which a test can mean this raise: its module, class and function."""
    return {name.lower() for name in (Path(refusal.module).stem, *refusal.function.split("."))}


def link(refusals: list[Refusal], expectations: list[Expectation]) -> dict[Refusal, list[str]]:
    """The tests of every refusal, by name."""
    tests: dict[Refusal, set[str]] = {refusal: set() for refusal in refusals}
    lexicon = [(refusal, frozenset(refusal.words)) for refusal in refusals]
    for expectation in expectations:
        wanted = [word for word in expectation.words if word != HOLE]
        if len(wanted) < FEWEST_WORDS:
            continue
        able = [pair for pair in lexicon if not expectation.errors or pair[0].error in expectation.errors]
        shared = [(sum(word in words for word in wanted), refusal) for refusal, words in able]
        # A word is found as it is, or as a part of one beside a hole or at an end.
        parts = 2 * (1 + expectation.words.count(HOLE))
        most, best = 0, []
        for count, refusal in sorted(shared, key=lambda pair: pair[0], reverse=True):
            if not count or count + parts < most:
                break
            score = fit(expectation.words, refusal.words)
            best = [refusal] if score > most else [*best, refusal] if score == most else best
            most = max(most, score)
        if len(best) > 1:
            best = [refusal for refusal in best if _places(refusal) & {name.lower() for name in expectation.names}]
        enough = most > FEWEST_WORDS or most == len(wanted)
        if len(best) == 1 and enough and 2 * most >= len(wanted):
            tests[best[0]].add(expectation.test)
    return {refusal: sorted(names) for refusal, names in tests.items()}


HEAD = """# What is refused

{number} sentences with which the package stops before the first training step, each with its test. What
concerns a batch comes with the first batch that breaks the rule. Words in braces are filled in: values seen, names,
numbers. [troubleshooting.md](troubleshooting.md) tells causes and remedies.

`make refusals` makes this page from the code. A test fails if it is out of date, or if a sentence has no test.
"""
LATER_HEAD = """
## After the first step has begun

Mistakes that only show when a backward runs a second time or in another order than its forward, or when something is
undone; numbers that are not finite; a checkpoint that cannot be written.
"""


def page(tests: dict[Refusal, list[str]]) -> str:
    """The page as Markdown, a table a module."""
    early = [refusal for refusal in tests if refusal.is_early]
    lines = [HEAD.format(number=len(early))]
    for part, head in ((early, ""), ([refusal for refusal in tests if not refusal.is_early], LATER_HEAD)):
        lines += [head] if part and head else []
        for module in dict.fromkeys(refusal.module for refusal in part):
            lines += [f"{'###' if head else '##'} `{module}`\n", "| sentence | error | test |", "|---|---|---|"]
            for refusal in part:
                if refusal.module == module:
                    lines.append(f"| {_cell(refusal.shown)} | `{refusal.error}` | {_link_to(tests[refusal])} |")
            lines.append("")
    return "\n".join(lines).replace("\n\n\n", "\n\n").rstrip() + "\n"


def _cell(sentence: str) -> str:
    """Escaped for a table; inside of code only the bar has to be."""
    parts = re.split(r"(`[^`]*`)", re.sub(r"\s+", " ", sentence).strip())
    marks = [r"([|*<>\[\]])", r"(\|)"]
    return "".join(re.sub(marks[i % 2], r"\\\1", part) for i, part in enumerate(parts))


def _link_to(tests: list[str]) -> str:
    """The first test; more of them would change the page with every test that is written."""
    if not tests:
        return "none"
    path, name = tests[0].split("::")
    return f"[`{name}`](../{path})"


def read_rows(page: str) -> list[str]:
    """The shortened sentences in the first column of troubleshooting.md, without a host's, the log's and verdicts."""
    cells = re.findall(r"^\| (.+?) \| ", page, re.MULTILINE)
    spans = [re.findall(r"(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)", cell) for cell in cells if not cell.endswith(")")]
    return [text for found in spans for _, text in found]


def is_said(row: str, refusal: Refusal) -> bool:
    """Whether a shortened sentence, with `...` and `X` for values, is this one."""
    words = split_words(re.sub(r"\.\.\.|\b[XY]\b", HOLE, row))
    return fit(words, refusal.words) >= max(1, 0.75 * len([word for word in words if word != HOLE]))


def main() -> int:
    tests = link(find_refusals(), find_expectations())
    rows = read_rows(TROUBLESHOOTING.read_text(encoding="utf-8"))
    for refusal in tests:
        if not any(is_said(row, refusal) for row in rows):
            sys.stderr.write(f"not in troubleshooting.md: {refusal.module}: {refusal.shown}\n")
    PAGE.write_text(page(tests), encoding="utf-8")
    missing = [refusal for refusal, names in tests.items() if refusal.is_early and not names]
    for refusal in missing:
        sys.stderr.write(f"no test: {refusal.module} {refusal.function} {refusal.error}: {refusal.shown}\n")
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
