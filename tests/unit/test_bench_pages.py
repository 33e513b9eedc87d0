"""The pages of the benchmarks: written again from the numbers next to them, and what all of them say alike."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest
from rich.console import Console


ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "recipes" / "bench"
RESULTS = sorted((ROOT / "docs" / "benchmarks").glob("*.json"))


@pytest.fixture(scope="module")
def load():
    """A function from a name to the module of a benchmark, which is a script beside the package."""
    before = set(sys.modules)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPTS))
        yield importlib.import_module
    for name in set(sys.modules) - before:
        if (SCRIPTS / f"{name}.py").exists():
            del sys.modules[name]


def script_of(path: Path) -> str:
    """The benchmark that wrote a page: the longest name of a script with which the page's name begins."""
    return max((s.stem for s in SCRIPTS.glob("*.py") if f"{path.stem}_".startswith(f"{s.stem}_")), key=len)


@pytest.fixture(params=RESULTS, ids=lambda path: path.stem)
def committed(request, load):
    """The module that writes a page, the numbers of the page, and its path."""
    name = script_of(request.param)
    if name == "embed":
        pytest.importorskip("sentence_transformers")
    report = f"{name}_report"
    module = load(report if (SCRIPTS / f"{report}.py").exists() else name)
    return module, json.loads(request.param.read_text(encoding="utf-8")), request.param.with_suffix(".md")


def test_committed_page_is_written_again_from_its_numbers(committed, load, tmp_path):
    module, result, path = committed
    page = module.page_of(result)
    load("page").write_page(tmp_path / path.name, result, page.lines(path), page.raw)
    assert (tmp_path / path.name).read_text(encoding="utf-8") == path.read_text(encoding="utf-8")
    numbers = path.with_suffix(".json")
    assert (tmp_path / numbers.name).read_text(encoding="utf-8") == numbers.read_text(encoding="utf-8")


def test_committed_page_has_the_form_of_all(committed):
    text = committed[2].read_text(encoding="utf-8")
    headings = re.findall("^## (.*)", text, re.MULTILINE)
    assert "How to read it" in headings and headings[-1] == "How it was measured"
    for picture in re.findall(r"!\[[^]]+\]\((.*?)\)", text):
        assert (committed[2].parent / picture).exists()


def test_medians_and_ratios_of_the_committed_runs_are_computed_again(committed):
    module, result, _ = committed
    again = copy.deepcopy(result)
    cores = int(re.search(r"(\d+) cores", result["machine"]["processor"])[1])
    if hasattr(module, "summarize"):
        module.summarize(*([again["rows"], cores] if "presets" not in result else [again]))
    elif "shapes" in result:  # the planner's, which has one measurement a row
        for row in again["rows"]:
            row["error"] = row["planned"] / row["measured"] - 1
    assert again == result


def test_script_and_page_agree_on_the_name(committed):
    _, result, path = committed
    assert result["command"].startswith(f"python recipes/bench/{script_of(path)}.py ")


# What they share


def result_of(*loads: float, device: str = "cpu") -> dict:
    rows = [{"label": f"{load}", "other_load": load, "failed": None} for load in loads]
    rows.append({"label": "none", "failed": "does not fit"})
    return {
        "rows": rows,
        "settings": {"device": device},
        "versions": {"torch": "2"},
        "machine": {"device": "none"},
        "command": "python x.py",
    }


@pytest.mark.parametrize(
    ("result", "sentence"),
    [
        (result_of(0.0, 0.05), "The machine was quiet: other programs used 0% to 5% of the cores at night."),
        (
            result_of(0.01, 0.2),
            "**The machine was busy**: other programs used 1% to 20% of the cores at night, so *s* of this run is no "
            "result, neither for nor against a contender. Memory is, and *CPU time* roughly. Run the command again on "
            "a quiet machine.",
        ),
        (result_of(), "Nothing was timed."),
        (result_of(0.9, device="cuda"), "Seconds are those of the CUDA stream."),
    ],
)
def test_a_page_says_whether_its_clock_can_be_believed(load, result, sentence):
    page = load("page")
    assert page.quietness(result, "*s*", " at night") == sentence
    assert page.is_busy(result) == sentence.startswith("**")


def test_columns_leave_empty_what_was_not_measured(load):
    page = load("page")
    columns = {"a": "{a:.1f}", "b": "{b:,} ({c})", "d": "{d[e]:.0%}", "f": lambda row: row["name"]}
    row = {"a": 1.25, "b": 1000, "c": 2, "d": {"e": 0.5}, "name": "x"}
    assert page.fill(columns, row) == ["1.2", "1,000 (2)", "50%", "x"]
    assert page.fill(columns, {"a": None, "b": 1, "d": {}, "name": "x"}) == ["", "", "", "x"]
    assert page.fail(columns, "row", "why") == ["row", "why", "", ""]


def test_medians_and_ratios(load):
    page = load("page")
    runs = [
        {"seconds": seconds, "cpu_seconds": 2 * seconds, "machine_cpu_seconds": busy, "bytes": 8}
        for seconds, busy in ((1.0, 3.0), (2.0, 4.0), (4.0, 9.0))
    ]
    row = {}
    page.add_medians(row, runs, 2, ["bytes"])
    assert row == {"seconds": 2.0, "cpu_seconds": 4.0, "bytes": 8, "other_load": 0.125}
    page.add_ratios(row, {"seconds": 4.0, "cpu_seconds": 4.0})
    assert (row["seconds_ratio"], row["cpu_seconds_ratio"]) == (0.5, 1.0)


def test_a_result_is_shown_and_written(load, tmp_path, capsys):
    page, result = load("page"), result_of(0.0)
    drawn = []
    made = page.Page(
        title="T",
        intro=["What."],
        headers=["a", "b"],
        cells=[["1", "2"]],
        notes=["Note [1].", ""],
        reading="- *a*: one\n",
        sections={"Last": "words\n"},
        picture="a picture",
        draw=lambda *arguments: drawn.append(arguments),
    )
    path = tmp_path / "new" / "t_cpu.md"
    page.finish(made, result, None, Console())
    assert not path.parent.exists() and "Note [1]." in capsys.readouterr().out
    page.finish(made, result, path, Console())
    assert drawn == [(result, path.with_suffix(".png"))]
    assert path.read_text().startswith(
        "# T\n\nWhat.\n\n| a | b |\n| --- | --- |\n| 1 | 2 |\n\nNote [1].\n\n![a picture](t_cpu.png)\n\n"
        "## How to read it\n\n- *a*: one\n\n## Last\n\nwords\n\n## How it was measured\n\n```\npython x.py\n```\n"
    )
    assert json.loads(path.with_suffix(".json").read_text()) == result


def test_the_facts_of_a_run_keep_no_path_of_this_machine(load):
    from argparse import Namespace

    args = Namespace(tokens=[8], output=Path("/home/me/x.md"), model="/home/me/model", worker=None)
    result = load("page").describe_run("x", ["--tokens", "8"], args, ["torch"], [])
    assert result["command"] == "python recipes/bench/x.py --tokens 8"
    assert result["settings"] == {"tokens": [8]} and set(result["versions"]) == {"torch"}
