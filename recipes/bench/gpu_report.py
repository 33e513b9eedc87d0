"""The columns and sentences of `gpu.py`."""

from __future__ import annotations

from collections.abc import Mapping

from gpu_parts import Part
from page import Page, bullets, fill, markdown_table


COLUMNS = {
    "part": "{part}",
    "figure": "{what}",
    "measured": lambda figure: figure["shown"] or "not measured",
    "goal": "{goal}",
    "reached": "{reached}",
}
PART_COLUMNS = {
    "part": lambda row: f"[{row['part']}]({row['page']})" if row["page"] else row["part"],
    "what": "{what}",
    "outcome": "{status}",
    "s": "{seconds:.0f}",
    "time limit, s": "{limit:.0f}",
}
READING = """\
- *measured*: from the page of the part; *not measured* says that the part did not get there. *goal*: what the figure
  should reach; a figure without one is published as it is.
- **MFU**: model FLOPs a second over the device's peak in dense bf16, from the maker's data sheet. Two for each
  multiplication with a weight, or between a query and a key that it may see, forward, and twice that backward: causal
  attention is counted half, and nothing that is run again (activation checkpointing, the flash kernel's backward). The
  page of the part names the kernel.
- *KB a token* and *longest row* are from a line through two lengths. What is **extrapolated** was not run.
- *time limit*: the minutes that were left when the part began, shared out over the parts that were left.
"""


def figures_of(part: Part, results: Mapping[str, dict], tiny: bool) -> list[dict]:
    """The figures of a part as rows of the table; one that cannot be found was not measured.

    Of a tiny run none is kept: its shapes are not those that the figures speak of.
    """
    found = []
    for figure in part.figures:
        try:
            value = figure.find(results)
        except (LookupError, TypeError):
            value = None
        found_one, value = value is not None, None if tiny else value
        reached = None if value is None else figure.is_met(value)
        found.append(
            {
                "part": part.name,
                "what": figure.what,
                "value": value,
                "shown": figure.form.format(value) if value is not None else "dry run" if found_one else "",
                "goal": figure.goal,
                "reached": {None: "", True: "yes", False: "**no**"}[reached],
            }
        )
    return found


def page_of(result: dict) -> Page:
    """The page of a run."""
    settings, rows = result["settings"], result["rows"]
    tiny = settings["tiny"]
    figures = [figure for row in rows for figure in row["figures"]]
    counts = {
        status: sum(row["status"] == status for row in rows) for status in dict.fromkeys(r["status"] for r in rows)
    }
    goals = [figure for figure in figures if figure["goal"]]
    reached = sum(figure["reached"] == "yes" for figure in goals)
    return Page(
        title="One run on a GPU" if settings["device"] == "cuda" else "A dry run of what a GPU is to show",
        intro=[
            f"{settings['minutes']:g} minutes, one device. Of {len(rows)} parts: "
            + ", ".join(f"{count} {status}" for status, count in counts.items())
            + ("." if tiny else f". {reached} of {len(goals)} goals reached."),
            "**A dry run**: the shapes are tiny, and no figure says anything." if tiny else "",
            markdown_table(PART_COLUMNS, (fill(PART_COLUMNS, row) for row in rows)),
        ],
        headers=list(COLUMNS),
        cells=[fill(COLUMNS, figure) for figure in figures],
        reading=READING,
        sections={"What failed or did not run": describe_failures(rows)},
        raw="the same as numbers, and the last lines of every part",
    )


def describe_failures(rows: list[dict]) -> str:
    """One line a part that has no result, or not all of it."""
    lines = [f"*{row['part']}*, {row['status']}: {row['reason']}." for row in rows if row["status"] != "finished"]
    tails = [
        f"The last lines of *{row['part']}*:\n\n```\n" + "\n".join(row["tail"]) + "\n```"
        for row in rows
        if row["status"] in ("failed", "stopped") and row["tail"]
    ]
    return "\n\n".join([bullets(lines), *tails]) if lines else "Nothing: every part finished."
