"""The tests of `tests/gpu` as a benchmark's part: pytest in this process, and a page of what passed.

What: kernels (varlen, flex, sdpa, eager), packed and plain rows, bf16, windows, softcap, sinks, documents that must
not leak, two processes on one device. How: `pytest tests/gpu`; with `--device cpu` the same bodies on a CPU as far as
it has the kernels, as a check of the tests themselves. What was run is written after every test, so that a run that is
stopped keeps it. Price: a minute or two on a GPU.

    python recipes/bench/gpu_tests.py --device cuda --output docs/benchmarks/gpu_tests_cuda.md
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import pytest
import torch
from page import Page, bullets, describe_run, device_of, fill, finish
from rich.console import Console


ROOT = Path(__file__).resolve().parents[2]
DEVICE = "HF_LONGCTX_TEST_DEVICE"
COLUMNS = {
    "test": "`{test}`",
    "passed": "{passed}",
    "failed": "{failed}",
    "skipped": "{skipped}",
    "s": "{seconds:.1f}",
}
READING = """\
- One line a test function; *passed*, *failed*, *skipped* count its cases.
- A case is skipped where the machine lacks what it needs (a second GPU, `flash-attn`), each for the reason below.
"""
console = Console(width=max(Console().width, 120))


class Outcomes:
    """A pytest plugin that counts what each test function's cases did."""

    def __init__(self, after_each) -> None:
        self.rows: dict[str, dict] = {}
        self.reasons: list[str] = []
        self.errors: list[str] = []
        self.collected, self.after_each = 0, after_each

    def pytest_collection_finish(self, session) -> None:
        self.collected = len(session.items)

    def pytest_collectreport(self, report) -> None:
        if report.failed:
            self.errors.append(f"`{report.nodeid}` cannot be collected: {_last_line(report)}")

    def pytest_runtest_logreport(self, report) -> None:
        name = report.nodeid.split("::")[-1].split("[")[0]
        row = self.rows.setdefault(name, {"test": name, "passed": 0, "failed": 0, "skipped": 0, "seconds": 0.0})
        row["seconds"] += report.duration
        if report.failed:
            row["failed"] += 1
            self.errors.append(f"`{report.nodeid.split('::')[-1]}`: {_last_line(report)}")
        elif report.skipped:
            row["skipped"] += 1
            reason = report.longrepr[-1] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            self.reasons.append(reason.removeprefix("Skipped: "))
        elif report.when == "call":
            row["passed"] += 1
        if report.when == "teardown":
            self.after_each(self)


def _last_line(report) -> str:
    lines = [line for line in str(report.longrepr).splitlines() if line.startswith("E ")]
    return lines[0].removeprefix("E").strip()[:300] if lines else str(report.longrepr).strip()[-300:]


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--select", help="of the tests' names, as pytest's `-k`")
    parser.add_argument("--output", type=Path, help="a Markdown result; a .json is written next to it")
    return parser.parse_args(arguments)


def page_of(result: dict) -> Page:
    """The page of a run."""
    counts = {key: sum(row[key] for row in result["rows"]) for key in ("passed", "failed", "skipped")}
    done = sum(counts.values())
    rest = f" {result['collected'] - done} of {result['collected']} cases had not been run when it was stopped."
    return Page(
        title=f"The tests of tests/gpu on {device_of(result)}",
        intro=[
            f"{counts['passed']} cases passed, {counts['failed']} failed, {counts['skipped']} were skipped."
            + (rest if done < result["collected"] else "")
        ],
        headers=list(COLUMNS),
        cells=[fill(COLUMNS, row) for row in result["rows"]],
        notes=[
            bullets(f"Failed: {error}" for error in result["errors"]),
            bullets(f"Skipped: {reason}" for reason in result["reasons"]),
        ],
        reading=READING,
        raw="the same as numbers",
    )


def result_of(outcomes: Outcomes, arguments: list[str] | None, args: argparse.Namespace) -> dict:
    result = describe_run("gpu_tests", arguments, args, ("hf-longctx", "torch", "transformers"), [])
    if args.device == "cuda":
        result["machine"]["device"] = torch.cuda.get_device_name()
    result["rows"] = list(outcomes.rows.values())
    facts = {"collected": outcomes.collected, "errors": outcomes.errors}
    return result | facts | {"reasons": list(dict.fromkeys(outcomes.reasons))}


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    os.environ[DEVICE] = args.device
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))

    def write(outcomes: Outcomes) -> None:
        if args.output:
            result = result_of(outcomes, arguments, args)
            page_of(result).write(result, args.output)

    outcomes = Outcomes(write)
    select = ["-k", args.select] if args.select else []
    # The one worker of the tests' own settings; no cache, which would be written into the checkout.
    code = pytest.main(["tests/gpu", "-p", "no:cacheprovider", "-p", "no:xdist", "-v", *select], plugins=[outcomes])
    result = result_of(outcomes, arguments, args)
    finish(page_of(result), result, args.output, console)
    if code:
        raise RuntimeError(
            f"pytest ended with {code!s}: {len(outcomes.errors)} errors, the first: {outcomes.errors[:1]}"
        )


if __name__ == "__main__":
    main()
