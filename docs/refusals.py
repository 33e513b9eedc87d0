"""List every message of a refusal, and a test that provokes it.

`make test` records which `raise` of the package is executed in which test, by what message (`tests/raises.py`). The
links between messages and tests in `refusals.json` are made of these records and of nothing else, and the page
`refusals.md` is made of the links:

- `python docs/refusals.py` links messages that have no test, or whose test is gone or did not provoke them, from the
  records of the last run (`make test`, or any tests with `HF_LONGCTX_RAISES=build/raises`), and writes both files. It
  fails if a message has no test. Any other link stays, so that a new test does not change the page.
- `python docs/refusals.py --prove` is the end of `make test` and changes nothing: every link must have been seen in
  the run, or the test does not provoke its message any more.

Why not a coverage tool: its tracer is called for every line that Python executes anywhere, and torch and transformers
execute millions, so that it would need a second run of all tests. Here nothing is executed but a call at each `raise`;
and a record holds the message, so that two messages of one line are kept apart.
What is not recorded: programs that a test starts (`torchrun`, the command line, `proof/ranks.py`).
"""

from __future__ import annotations

import ast
import json
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

from sentences import HOLE, ROOT, Refusal, find_refusals


PAGE = ROOT / "docs" / "refusals.md"
LINKS = ROOT / "docs" / "refusals.json"
TROUBLESHOOTING = ROOT / "docs" / "troubleshooting.md"
RECORDS = ROOT / "build" / "raises"
NOT_RUN_EVERYWHERE = ("tests/gpu/",)


def says(refusal: Refusal, message: str) -> bool:
    """Whether `message` is this refusal's, filled in."""
    return re.fullmatch(re.escape(refusal.holed).replace(re.escape(HOLE), ".*"), message, re.DOTALL) is not None


def read_records(folder: Path = RECORDS) -> Iterator[dict]:
    """`module`, `function`, `line`, `test` and `message` of every `raise` that was executed."""
    for path in sorted(folder.rglob("*.jsonl")):
        yield from map(json.loads, path.read_text(encoding="utf-8").splitlines())


def read_ran(folder: Path = RECORDS) -> set[str]:
    """The tests (`path::function`) that were run while this was recorded."""
    names = [path.read_text(encoding="utf-8").splitlines() for path in folder.rglob("ran")]
    return {name.partition("[")[0] for run in names for name in run}


def find_provoked(refusals: list[Refusal], records: Iterable[dict]) -> dict[Refusal, set[str]]:
    """The tests (`path::function`) in which each message was raised.

    Lines move, so a record of older code belongs to the message of its function that it matches. Only where it
    could be two is it that of its line, or else the one with more words of its own.
    """
    inside, made = defaultdict(list), defaultdict(list)
    for refusal in refusals:
        inside[refusal.module, refusal.function].append(refusal)
        if refusal.is_made:
            made[refusal.module].append(refusal)
    provoked: dict[Refusal, set[str]] = {refusal: set() for refusal in refusals}
    for record in records:
        known = inside[record["module"], record["function"]] + made[record["module"]]
        said = [r for r in known if says(r, record["message"])]
        if said and not record["test"].startswith(NOT_RUN_EVERYWHERE):
            best = max(said, key=lambda r: (r.line == record["line"], len(r.holed.replace(HOLE, ""))))
            provoked[best].add(record["test"].partition("[")[0])
    return provoked


def find_tests(folder: Path = ROOT / "tests") -> set[str]:
    """Every test there is, as `path::function`."""
    return {
        f"{path.relative_to(folder.parent).as_posix()}::{node.name}"
        for path in folder.rglob("test_*.py")
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }


def read_links(refusals: list[Refusal], path: Path = LINKS) -> dict[Refusal, str | None]:
    """The test of each message, as it was last written."""
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return {r: known.get(r.module, {}).get(r.function, {}).get(r.shown) for r in refusals}


def dump_links(links: dict[Refusal, str | None]) -> str:
    """Module, function and message to the test."""
    tree: dict[str, dict[str, dict[str, str | None]]] = {}
    for refusal, test in links.items():
        tree.setdefault(refusal.module, {}).setdefault(refusal.function, {})[refusal.shown] = test
    return json.dumps(tree, indent=1, ensure_ascii=False) + "\n"


def link(
    links: dict[Refusal, str | None], provoked: dict[Refusal, set[str]], tests: set[str], ran: set[str]
) -> dict[Refusal, str | None]:
    """`links` without tests that are gone or ran in vain, and with one that was seen where there is none.

    Of several, the one that provokes the fewest other messages: it is most likely about this one.
    """
    others = Counter(test for seen in provoked.values() for test in seen)
    made = {}
    for refusal, test in links.items():
        seen = sorted(provoked[refusal] & tests, key=lambda name: (others[name], name))
        stays = test in tests and (test in seen or test not in ran)
        made[refusal] = test if stays else seen[0] if seen else None
    return made


HEAD = """# What is refused

{number} messages that stop a run before the first training step, each with a test that provokes it. What
concerns a batch comes with the first batch that breaks the rule. Words in braces are filled in: values seen, names,
numbers. [troubleshooting.md](troubleshooting.md) lists causes and remedies.

`make test` proves every row: it records which test executes which `raise`. `make refusals` makes this page from the
code and the records. A test fails if it is out of date, or if a message has no test.
"""
LATER_HEAD = """
## After the first step has begun

Mistakes that only show when a backward runs a second time or in another order than its forward, or when something is
undone; numbers that are not finite; a checkpoint that cannot be written.
"""


def page(links: dict[Refusal, str | None]) -> str:
    """The page as Markdown, a table a module."""
    early = [refusal for refusal in links if refusal.is_early]
    lines = [HEAD.format(number=len(early))]
    for part, head in ((early, ""), ([refusal for refusal in links if not refusal.is_early], LATER_HEAD)):
        lines += [head] if part and head else []
        for module in dict.fromkeys(refusal.module for refusal in part):
            lines += [f"{'###' if head else '##'} `{module}`\n", "| message | error | test |", "|---|---|---|"]
            for refusal in part:
                if refusal.module == module:
                    lines.append(f"| {_cell(refusal.shown)} | `{refusal.error}` | {_link_to(links[refusal])} |")
            lines.append("")
    return "\n".join(lines).replace("\n\n\n", "\n\n").rstrip() + "\n"


def _cell(message: str) -> str:
    """Escaped for a table; inside of code only the bar has to be."""
    parts = re.split(r"(`[^`]*`)", re.sub(r"\s+", " ", message).strip())
    marks = [r"([|*<>\[\]])", r"(\|)"]
    return "".join(re.sub(marks[i % 2], r"\\\1", part) for i, part in enumerate(parts))


def _link_to(test: str | None) -> str:
    if test is None:
        return "none"
    path, name = test.split("::")
    return f"[`{name}`](../{path})"


def read_rows(page: str) -> list[str]:
    """The shortened messages in the first column of troubleshooting.md, without those of libraries and of the log."""
    cells = re.findall(r"^\| (.+?) \| ", page, re.MULTILINE)
    spans = [re.findall(r"(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)", cell) for cell in cells if not cell.endswith(")")]
    return [text for found in spans for _, text in found]


def explains(row: str, refusal: Refusal) -> bool:
    """Whether `row` is part of this message: letter by letter, but for marks of code.

    `...`, `X` and `Y` in it are any text; its names in backticks, its values in quotes and in brackets may be what the
    message fills in.
    """
    pattern = ""
    for piece in re.split(r"(`[^`]+`|'[^']*'|\([^()]*\))", row.strip()):
        text = ".*".join(map(re.escape, re.split(r"\.\.\.|\b[XY]\b", piece.replace("`", ""))))
        is_value, is_name = piece[:1] in ("'", "("), piece[:1] == "`"
        pattern += rf"(?:{text}|['(]*{HOLE}[')]*)" if is_value else f"(?:{text}|{HOLE})" if is_name else text
    return re.search(pattern, refusal.holed.replace("`", ""), re.DOTALL) is not None


def main(arguments: list[str]) -> int:
    refusals = find_refusals()
    provoked, links = find_provoked(refusals, read_records()), read_links(refusals)
    if arguments == ["--prove"]:
        missing = [refusal for refusal, test in links.items() if test is not None and test not in provoked[refusal]]
        why = "not provoked by its test in this run; `make refusals` looks for another"
    else:
        links = link(links, provoked, find_tests(), read_ran())
        LINKS.write_text(dump_links(links), encoding="utf-8")
        PAGE.write_text(page(links), encoding="utf-8")
        missing, why = [refusal for refusal, test in links.items() if refusal.is_early and test is None], "no test"
    for refusal in missing:
        where = f"{refusal.module}:{refusal.line}"
        sys.stderr.write(f"{why}: {where}: {refusal.error}: {refusal.shown} ({links[refusal]})\n")
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
