"""How `memory_presets.py` shows its numbers: a table in the terminal, and a Markdown page with a picture and the JSON.

Every number on the page comes from the run; the prose around it states only what holds for any run.
"""

from __future__ import annotations

from pathlib import Path

from page import QUIET, device_of, markdown_table, write_page


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


def summarize(result: dict) -> None:
    """Add ratios to each row, and to `result` what follows for each preset."""
    rows, settings = result["rows"], result["settings"]
    first = {}
    for row in rows:
        run = row["runs"][0]
        row["step_gb"] = run["step_bytes"] / 1e9
        row["seconds"], row["cpu_seconds"] = run["seconds"], run["cpu_seconds"]
        others = run["machine_cpu_seconds"] - run["cpu_seconds"]
        row["other_load"] = max(0.0, others / (run["seconds"] * settings["cores"]))
        reference = first.setdefault(row["tokens"], row)
        row["cpu_time"] = row["cpu_seconds"] / reference["cpu_seconds"]
        row["time"] = row["seconds"] / reference["seconds"]
    result["rungs"] = []
    for label in dict.fromkeys(row["label"] for row in rows):
        short, long = [row for row in rows if row["label"] == label][-2:]
        slope = (long["step_gb"] - short["step_gb"]) / (long["tokens"] - short["tokens"])
        start = long["step_gb"] - slope * long["tokens"]
        longest = max(0, int((settings["budget"] - start) / slope)) if slope > 0 else None
        result["rungs"].append({"label": label, "kilobytes_a_token": slope * 1e6, "longest": longest})


def headers(result: dict) -> list[str]:
    return [
        "preset",
        *(f"step GB, {tokens:,}" for tokens in _lengths(result)),
        "KB a token",
        f"longest row in {result['settings']['budget']:g} GB",
        "CPU time",
        "others",
    ]


def cells(result: dict, rung: dict) -> list[str]:
    """One row of the table, in the order of `headers`."""
    rows = [row for row in result["rows"] if row["label"] == rung["label"]]
    return [
        rung["label"],
        *(f"{row['step_gb']:.2f}" for row in rows),
        f"{rung['kilobytes_a_token']:,.0f}",
        "no limit seen" if rung["longest"] is None else f"{rung['longest']:,}",
        f"{rows[-1]['cpu_time']:.2f}",
        f"{max(row['other_load'] for row in rows):.0%}",
    ]


def write_report(result: dict, path: Path) -> None:
    """Write `path` (Markdown), and the raw JSON and the picture next to it."""
    draw_chart(result, path.with_suffix(".png"))
    settings = result["settings"]
    lines = [
        f"# Memory presets on {device_of(result)}",
        "",
        f"A Llama with random weights: {settings['layers']} layers, hidden size {settings['hidden']}, MLP "
        f"{settings['intermediate']}, {settings['vocab']:,} words, {settings['dtype']}, AdamW, one row a step, on the "
        "presets of `MemoryConfig(memory=...)`.",
        "",
        markdown_table(headers(result), (cells(result, rung) for rung in result["rungs"])),
        "",
        *busy_note(result),
        f"![memory of a step over the length of the row]({path.with_suffix('.png').name})",
        "",
        "## How to read it",
        "",
        READING.format(budget=settings["budget"]),
    ]
    write_page(path, result, lines)


def busy_note(result: dict) -> list[str]:
    """A warning where other programs took so much of the CPU that its seconds say little."""
    if result["settings"]["device"] != "cpu" or max(row["other_load"] for row in result["rows"]) <= QUIET:
        return []
    return [
        "Other programs used the cores meanwhile (last column): memory is not touched by that, *CPU time* is a rough "
        "figure.",
        "",
    ]


def draw_chart(result: dict, path: Path) -> None:
    """Memory of a step over the length of the row, a line for each preset, and the longest row of each."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    budget = result["settings"]["budget"]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4.4))
    for index, rung in enumerate(result["rungs"]):
        rows = [row for row in result["rows"] if row["label"] == rung["label"]]
        left.plot([r["tokens"] for r in rows], [r["step_gb"] for r in rows], "o-", color=f"C{index}")
        longest = rung["longest"] or 0
        right.barh(index, longest, color=f"C{index}")
        right.text(longest, index, f" {longest:,}", va="center", fontsize=8)
    left.axhline(budget, color="black", linewidth=0.8, linestyle="--")
    left.text(_lengths(result)[0], budget, f"{budget:g} GB", va="bottom", fontsize=8)
    left.set_xlabel("tokens of the row")
    left.set_title("GB that a step takes in the fullest process", fontsize=10)
    right.set_yticks(range(len(result["rungs"])), [rung["label"] for rung in result["rungs"]])
    right.invert_yaxis()
    right.set_xticks([])
    right.margins(x=0.2)
    right.set_title(f"longest row in {budget:g} GB, from the lines on the left", fontsize=10)
    for panel in (left, right):
        panel.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _lengths(result: dict) -> list[int]:
    return sorted({row["tokens"] for row in result["rows"]})
