"""What all benchmarks share: facts of the run, medians and ratios, the table in the terminal, the page, the picture.

A benchmark keeps its columns and its sentences and hands them over as a [`Page`]. `page_of(result)` makes that page
from the numbers alone, so that it can be written again from the JSON next to it. Its prose states what holds for any
run.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import platform
import sys
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table
from versions import versions_of


QUIET = 0.05  # the share of the cores that others may use before a ratio of 5 % says nothing
_UNSAVED = ("output", "worker", "peer_python", "model", "stsb")  # of the options: paths of this machine
# Columns of a table, in their order: how a row is shown under each header.
Columns = Mapping[str, str | Callable[[dict], str]]


# Numbers


def describe_run(
    name: str, arguments: list[str] | None, args: Namespace, packages: Iterable[str], rows: list[dict]
) -> dict:
    """Command, versions, machine, settings and rows: what every result begins with.

    Args:
        name (`str`): of the script.
        arguments (`list[str]`, *optional*): as `main` got them.
        args (`Namespace`): the same, parsed.
        packages (`Iterable[str]`): whose versions matter; one that is not installed is left out.
    """
    words = " ".join(sys.argv[1:] if arguments is None else arguments)
    return {
        "command": f"python recipes/bench/{name}.py {words}".strip(),
        "versions": versions_of(packages),
        "machine": describe_machine(rows),
        "settings": {key: value for key, value in vars(args).items() if key not in _UNSAVED},
        "rows": rows,
    }


def describe_machine(rows: list[dict]) -> dict[str, str]:
    """Cores, memory and device of this machine, without its name."""
    model, memory = platform.machine(), None
    if os.path.exists("/proc/cpuinfo"):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(": ", 1)[1] for line in lines if line.startswith("model name")), model)
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    devices = {run["device_name"] for row in rows for run in row["runs"]} - {"CPU"}
    return {
        "processor": f"{model}, {os.cpu_count()} cores",
        "memory": "unknown" if memory is None else f"{memory:.0f} GB",
        "device": ", ".join(sorted(devices)) or "none, on the CPU",
        "system": f"{platform.system()}, Python {platform.python_version()}",
    }


def device_of(result: dict) -> str:
    """For the title of a page."""
    return "a CPU" if result["settings"]["device"] == "cpu" else "CUDA"


def process_of(result: dict) -> str:
    """What a measurement is, in words."""
    settings = result["settings"]
    alone = settings["device"] == "cpu" and not settings.get("one_process")
    return "a fresh process" if alone else "taken in the one process of the run,"


def add_medians(row: dict, runs: list[dict], cores: int, keys: Iterable[str] = ()) -> None:
    """Add to `row` the medians over `runs`: seconds of the clock and of the processor, the load of other programs.

    Args:
        cores (`int`): of the machine, which others could have used.
        keys (`Iterable[str]`, *optional*): medians of these as well.
    """
    for key in ("seconds", "cpu_seconds", *keys):
        row[key] = median(run[key] for run in runs)
    others = [(run["machine_cpu_seconds"] - run["cpu_seconds"]) / (run["seconds"] * cores) for run in runs]
    row["other_load"] = max(0.0, median(others))


def add_ratios(row: dict, reference: dict, keys: Iterable[str] = ("seconds", "cpu_seconds")) -> None:
    """Add `KEY_ratio` to `row`: its numbers over those of the peer that it is compared with."""
    for key in keys:
        if reference[key]:  # a tiny step may take no byte that is counted
            row[f"{key}_ratio"] = row[key] / reference[key]


def measured(result: dict) -> list[dict]:
    """The rows that have numbers."""
    return [row for row in result["rows"] if not row.get("failed")]


def is_busy(result: dict) -> bool:
    """Whether other programs took so much of the CPU that its clock says nothing."""
    loads = [row["other_load"] for row in measured(result)]
    return result["settings"]["device"] == "cpu" and max(loads, default=0.0) > QUIET


def quietness(
    result: dict,
    clock: str = "",
    when: str = "",
    rest: str = "Memory is, and *CPU time* roughly.",
    rows: list[dict] | None = None,
) -> str:
    """Whether the clock of this run can be believed.

    Args:
        clock (`str`, *optional*): the columns that are of no use if it cannot.
        when (`str`, *optional*): what follows "used 1% to 2% of the cores".
        rest (`str`, *optional*): which columns are of use all the same.
        rows (`list[dict]`, *optional*): those that count, instead of all that were measured.
    """
    if result["settings"]["device"] != "cpu":
        return "Seconds are those of the CUDA stream."
    loads = [row["other_load"] for row in (measured(result) if rows is None else rows)]
    if not loads:
        return "Nothing was timed."
    used = f"other programs used {min(loads):.0%} to {max(loads):.0%} of the cores{when}"
    if max(loads) <= QUIET:
        return f"The machine was quiet: {used}."
    if not clock:
        return f"**The machine was busy**: {used}. {rest}"
    verb = "are" if " and " in clock else "is"
    return (
        f"**The machine was busy**: {used}, so {clock} of this run {verb} no result, neither for nor against a "
        f"contender. {rest} Run the command again on a quiet machine."
    )


# Tables


def fill(columns: Columns, row: dict) -> list[str]:
    """One row of a table; a cell stays empty where its number is `None` or was not measured."""
    return [form(row) if callable(form) else _fill_cell(form, row) for form in columns.values()]


def _fill_cell(form: str, row: dict) -> str:
    try:
        return form.format_map(row)
    except (KeyError, TypeError):  # TypeError: a format such as `.2f` of `None`
        return ""


def fail(columns: Columns, *cells: str) -> list[str]:
    """The row of what was not measured: these cells, and empty ones."""
    return [*cells, *[""] * (len(columns) - len(cells))]


def markdown_table(headers: Iterable[str], rows: Iterable[list[str]]) -> str:
    headers = list(headers)
    return "\n".join(f"| {' | '.join(row)} |" for row in (headers, ["---"] * len(headers), *rows))


def print_table(
    result: dict, headers: Iterable[str], rows: Iterable[list[str]], console: Console, notes: Iterable[str] = ()
) -> None:
    """Versions, machine, command, numbers and `notes`, for the terminal."""
    console.print(" · ".join(f"{name} {version}" for name, version in result["versions"].items()))
    console.print(" · ".join(f"{name}: {value}" for name, value in result["machine"].items()))
    console.print(result["command"])
    table = Table()
    for header in headers:
        table.add_column(header, overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    for note in notes:
        console.print(note, markup=False)


def bullets(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


# Pages


@dataclass(frozen=True)
class Page:
    """What a benchmark says: its table and its sentences, in the order of a page. Empty blocks are left out.

    Args:
        title (`str`): of the page.
        intro (`Sequence[str]`): blocks above the table: what was measured.
        headers (`Sequence[str]`): of the table.
        cells (`Sequence[list[str]]`): its rows.
        notes (`Sequence[str]`): blocks below the table, shown in the terminal too: whether the machine was quiet, what
            was not measured, what was checked.
        reading (`str`): how to read the table.
        sections (`Mapping[str, str]`): further sections, by heading.
        picture (`str`, *optional*): the text that stands for the picture.
        draw (`Callable[[dict, Path], None]`, *optional*): draws it, from the result to a file.
        raw (`str`): what the JSON holds.
    """

    title: str
    intro: Sequence[str]
    headers: Sequence[str]
    cells: Sequence[list[str]]
    reading: str
    notes: Sequence[str] = ()
    sections: Mapping[str, str] = field(default_factory=dict)
    picture: str = ""
    draw: Callable[[dict, Path], None] | None = None
    raw: str = "every run"

    def lines(self, path: Path) -> list[str]:
        """The page without how it was measured, for [`write_page`]."""
        picture = f"![{self.picture}]({path.with_suffix('.png').name})" if self.picture else ""
        blocks = [f"# {self.title}", *self.intro, markdown_table(self.headers, self.cells), *self.notes, picture]
        for heading, text in {"How to read it": self.reading, **self.sections}.items():
            blocks += [f"## {heading}", text.rstrip("\n")]
        return [line for block in blocks if block for line in (block, "")]

    def write(self, result: dict, path: Path) -> None:
        """Write `path` (Markdown), and the raw JSON and, where matplotlib is installed, the picture beside it."""
        drawn = self.draw is not None and importlib.util.find_spec("matplotlib") is not None
        shown = self if drawn else replace(self, picture="")
        write_page(path, result, shown.lines(path), self.raw)
        if drawn:
            self.draw(result, path.with_suffix(".png"))


def finish(page: Page, result: dict, output: Path | None, console: Console) -> None:
    """Show a result in the terminal, and write its page to `output` if there is one."""
    print_table(result, page.headers, page.cells, console, filter(None, page.notes))
    if output:
        page.write(result, output)


def write_page(path: Path, result: dict, lines: list[str], raw: str = "every run") -> None:
    """Write `lines` to `path` with how they were measured below them, and `result` as JSON next to it.

    Args:
        raw (`str`): what the JSON holds.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.with_suffix(".json")
    file.write_text(json.dumps(result, indent=1) + "\n")
    facts = {**result["machine"], **result["versions"]}
    lines = [
        *lines,
        "## How it was measured",
        "",
        "```",
        result["command"],
        "```",
        "",
        *(f"- {name}: {value}" for name, value in facts.items()),
        f"- {raw}: [{file.name}]({file.name})",
    ]
    path.write_text("\n".join(lines).replace("\n\n\n", "\n\n") + "\n")


@contextlib.contextmanager
def two_panels(path: Path, titles: Sequence[str], size: tuple[float, float] = (11, 4), legend: int = 0) -> Iterator:
    """Two panels side by side, drawn inside and saved to `path` afterwards. Needs matplotlib.

    Args:
        titles (`Sequence[str]`): one a panel.
        size (`tuple[float, float]`, *optional*, defaults to `(11, 4)`): in inches.
        legend (`int`, *optional*, defaults to 0): columns of a legend above, of what has a label on the left.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=size)
    yield panels
    for panel, title in zip(panels, titles):
        panel.set_title(title, fontsize=10)
        panel.spines[["top", "right"]].set_visible(False)
    if legend:
        shown = dict(zip(*reversed(panels[0].get_legend_handles_labels())))
        figure.legend(shown.values(), shown, loc="upper center", ncol=legend, fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 0.94) if legend else None)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
