"""The columns and sentences of `memory_presets.py`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from page import Columns, Page, add_medians, bullets, device_of, fill, measured, quietness, two_panels


READING = """\
- *step GB*: the most memory that a process held during a whole training step, less what it held before: gradients,
  activations, logits, temporaries. With several ranks, that of the fullest.
- *KB a token*: by how much it grows with each token of the row, from the two longest rows.
- *longest row*: where that line meets {budget:g} GB. It is calculated, not run; far beyond the rows that were run it
  is an order of magnitude.
- *CPU time*: processor seconds of all ranks together, relative to the first preset at the same length: what a preset
  costs in work.
- *others*: the share of the cores that other programs used during the step.
- Loss and gradient norm of every preset equal those of the first, or the run stops.
"""


PLAN = """\
- *plan GB*: what the planner says that the step takes, from the configuration alone. *plan error*: planned over
  measured, less one, both with weights and optimizer state, which are not in *step GB*.
"""


def summarize(result: dict) -> None:
    """Add ratios to each row, and to `result` what follows for each preset."""
    rows, settings = measured(result), result["settings"]
    first = {}
    for row in rows:
        add_medians(row, row["runs"], settings["cores"])
        row["step_gb"] = row["runs"][0]["step_bytes"] / 1e9
        reference = first.setdefault(row["tokens"], row)
        row["cpu_time"] = row["cpu_seconds"] / reference["cpu_seconds"]
        row["time"] = row["seconds"] / reference["seconds"]
        run = row["runs"][0]
        if "planned_bytes" in run:
            row["planned_gb"], states = run["planned_bytes"] / 1e9, run["planned_states"]
            row["plan_error"] = (run["planned_bytes"] + states) / (run["step_bytes"] + states) - 1
    result["presets"] = []
    for label in dict.fromkeys(row["label"] for row in rows):
        mine = [row for row in rows if row["label"] == label]
        if len(mine) < 2:  # no line through one point
            only = {"kilobytes_a_token": None, "longest": None}
            result["presets"].append({"label": label, **only, "most_tokens": mine[-1]["tokens"]})
            continue
        short, long = mine[-2:]
        slope = (long["step_gb"] - short["step_gb"]) / (long["tokens"] - short["tokens"])
        start = long["step_gb"] - slope * long["tokens"]
        longest = max(0, int((settings["budget"] - start) / slope)) if slope > 0 else None
        result["presets"].append({"label": label, "kilobytes_a_token": slope * 1e6, "longest": longest})


def columns_of(result: dict) -> Columns:
    """Of one preset, whose rows are under `"rows"`: one column a length between the others."""
    steps = {f"step GB, {tokens:,}": _cell(tokens, "step_gb", "{:.2f}") for tokens in _lengths(result)}
    if any("plan_error" in row for row in result["rows"]):
        for tokens in _lengths(result):
            steps[f"plan GB, {tokens:,}"] = _cell(tokens, "planned_gb", "{:.2f}")
            steps[f"plan error, {tokens:,}"] = _cell(tokens, "plan_error", "{:+.1%}")
    if result["settings"]["device"] == "cuda":
        steps |= {f"s, {tokens:,}": _cell(tokens, "seconds", "{:.2f}") for tokens in _lengths(result)}
    return {
        "preset": "{label}",
        **steps,
        "KB a token": "{kilobytes_a_token:,.0f}",
        f"longest row in {result['settings']['budget']:g} GB": lambda preset: (
            f"{preset['longest']:,}"
            if preset["longest"] is not None
            else "no limit seen"
            if "most_tokens" not in preset
            else f"ran at {preset['most_tokens']:,}"
        ),
        "CPU time": lambda preset: f"{preset['rows'][-1]['cpu_time']:.2f}",
        "others": lambda preset: f"{max(row['other_load'] for row in preset['rows']):.0%}",
    }


def page_of(result: dict) -> Page:
    """The page of a run."""
    settings, columns = result["settings"], columns_of(result)
    return Page(
        title=f"The memory presets on {device_of(result)}",
        intro=[
            f"A Llama with random weights: {settings['layers']} layers, hidden size {settings['hidden']}, MLP "
            f"{settings['intermediate']}, {settings['vocab']:,} words, {settings['dtype']}, AdamW, one row a step, on "
            "the presets of `MemoryConfig(memory=...)`."
        ],
        headers=list(columns),
        cells=[fill(columns, {**preset, "rows": _rows_of(result, preset)}) for preset in result["presets"]],
        notes=[
            quietness(result, rest="Memory is not touched by that, *CPU time* is a rough figure."),
            bullets(
                f"Not measured: {row['label']} at {row['tokens']:,} tokens: {row['failed']}."
                for row in result["rows"]
                if row.get("failed")
            ),
        ],
        picture="memory of a step over the length of the row",
        draw=draw_chart,
        reading=READING.format(budget=settings["budget"]) + (PLAN if settings.get("plan") else ""),
    )


def draw_chart(result: dict, path: Path) -> None:
    """Memory of a step over the length of the row, a line for each preset, and the longest row of each."""
    budget = result["settings"]["budget"]
    from_lines = f"longest row in {budget:g} GB, from the lines on the left"
    titles = ("GB that a step takes in the fullest process", from_lines)
    with two_panels(path, titles, size=(12, 4.4)) as (left, right):
        for index, preset in enumerate(result["presets"]):
            rows = _rows_of(result, preset)
            left.plot([r["tokens"] for r in rows], [r["step_gb"] for r in rows], "o-", color=f"C{index}")
            longest = preset["longest"] or 0
            right.barh(index, longest, color=f"C{index}")
            right.text(longest, index, f" {longest:,}", va="center", fontsize=8)
        left.axhline(budget, color="black", linewidth=0.8, linestyle="--")
        left.text(_lengths(result)[0], budget, f"{budget:g} GB", va="bottom", fontsize=8)
        left.set_xlabel("tokens of the row")
        right.set_yticks(range(len(result["presets"])), [preset["label"] for preset in result["presets"]])
        right.invert_yaxis()
        right.set_xticks([])
        right.margins(x=0.2)


def _cell(tokens: int, key: str, form: str) -> Callable[[dict], str]:
    """Shows a number of the preset's row of that length; empty where it was not measured."""

    def show(preset: dict) -> str:
        row = next((row for row in preset["rows"] if row["tokens"] == tokens), {})
        return form.format(row[key]) if key in row else ""

    return show


def _rows_of(result: dict, preset: dict) -> list[dict]:
    return [row for row in measured(result) if row["label"] == preset["label"]]


def _lengths(result: dict) -> list[int]:
    return sorted({row["tokens"] for row in result["rows"]})
