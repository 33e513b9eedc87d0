"""How `tiled_loss.py` shows its numbers: a table in the terminal, and a Markdown page with a chart and the raw JSON.

Every number on the page comes from the run; the prose around it states only what holds for any run. Price: the chart
needs matplotlib.
"""

from __future__ import annotations

from pathlib import Path
from statistics import median

from page import QUIET, device_of, markdown_table, write_page


HEADERS = ("tokens", "contender", "s", "tokens/s", "CPU s", "time", "CPU time", "step GB", "above GB", "others")

READING = """\
- *s*: forward and backward of the loss of one row, median of the rounds (the best in brackets): {rounds}.
- *CPU s*: processor seconds, which other programs on the machine disturb less than the clock.
- *time*, *CPU time*: ratios to whole logits of the same row; where those do not fit, to ours.
- *step GB*: the most memory the step held beyond hidden states and weights. *above GB*: the same less the gradients of
  hidden states and weights that any contender must return; it should not grow with the row.
- *others*: the share of the cores that other programs used during the step, median.
- Every measurement is a fresh process with a warm-up of 256 tokens; contenders take turns within a round.
"""

WHEN_NOT = """\
- **Whole logits fit easily.** The tiled loss saves memory, not work: the same three matmuls, in smaller pieces.
- **You need the logits**, for a metric or a loss of your own that compares words: then they must exist.
- **Two backwards through one loss.** The gradient is made once, in the forward.
- **A small vocabulary.** With some thousand words the hidden states are as large as the logits.
"""


def summarize(rows: list[dict], cores: int) -> None:
    """Add medians to each entry, and its ratios to whole logits, or else to ours, of the same row."""
    references: dict[int, dict] = {}
    for row in rows:
        if row["failed"]:
            continue
        runs = row["runs"]
        row["seconds"], row["best_seconds"] = median(r["seconds"] for r in runs), min(r["seconds"] for r in runs)
        row["cpu_seconds"] = median(run["cpu_seconds"] for run in runs)
        row["tokens_per_second"] = row["tokens"] / row["seconds"]
        for key in ("step", "above"):
            row[f"{key}_gb"] = median(run[f"{key}_bytes"] for run in runs) / 1e9
        others = [(run["machine_cpu_seconds"] - run["cpu_seconds"]) / (run["seconds"] * cores) for run in runs]
        row["other_load"] = max(0.0, median(others))
        reference = references.setdefault(row["tokens"], row)
        for key in ("seconds", "cpu_seconds"):
            row[f"{key}_ratio"] = row[key] / reference[key]


def cells(row: dict) -> list[str]:
    """One entry of the table, in the order of `HEADERS`."""
    if row["failed"]:
        return [f"{row['tokens']:,}", row["label"], row["failed"], *[""] * (len(HEADERS) - 3)]
    return [
        f"{row['tokens']:,}",
        row["label"],
        f"{row['seconds']:.2f} ({row['best_seconds']:.2f})",
        f"{row['tokens_per_second']:,.0f}",
        f"{row['cpu_seconds']:.2f}",
        f"{row['seconds_ratio']:.2f}",
        f"{row['cpu_seconds_ratio']:.2f}",
        f"{row['step_gb']:.2f}",
        f"{row['above_gb']:.2f}",
        f"{row['other_load']:.0%}",
    ]


def quietness(result: dict) -> str:
    """Whether the clock of this run can be believed."""
    if result["settings"]["device"] != "cpu":
        return "Seconds are those of the CUDA stream."
    measured = [row for row in result["rows"] if not row["failed"]]
    # Rows that were run once are there for their memory.
    timed = [row for row in measured if len(row["runs"]) > 1] or measured
    loads, longest = [row["other_load"] for row in timed], max(row["tokens"] for row in timed)
    used = (
        f"other programs used {min(loads):.0%} to {max(loads):.0%} of the cores during the steps of up to {longest:,} "
        "tokens (medians)"
    )
    if max(loads) <= QUIET:
        rest = "" if len(timed) == len(measured) else " Longer rows were run once, for their memory, quiet or not."
        return f"The machine was quiet: {used}.{rest}"
    return (
        f"**The machine was busy**: {used}, so *s*, *tokens/s* and *time* of this run are no result, neither for nor "
        "against a contender. Memory is, and *CPU time* roughly. Run the command again on a quiet machine."
    )


def checks(result: dict) -> list[str]:
    """What was compared before anything was timed."""
    seen = {row["label"]: row for row in result["rows"] if "gradient_error" in row}
    return [
        f"- {label}: on {result['check_tokens']} tokens the loss is off by {row['loss_error']:.1e} from that of whole "
        f"logits, the worst gradient by {row['gradient_error']:.1e} (`|g - g_ref| / |g_ref|`)."
        for label, row in seen.items()
    ]


def write_report(result: dict, path: Path) -> None:
    """Write `path` (Markdown), and the raw JSON and the chart next to it."""
    draw_chart(result, path.with_suffix(".png"))
    settings = result["settings"]
    rounds = sorted({(row["tokens"], len(row["runs"])) for row in result["rows"] if not row["failed"]})
    lines = [
        f"# The tiled loss on {device_of(result)}: time and memory",
        "",
        f"One row of random hidden states of size {settings['width']:,}, {settings['vocab']:,} words, "
        f"{settings['dtype']}, {settings['ignored']:.0%} of the labels ignored; hidden states and weights are "
        "trained.",
        "",
        markdown_table(HEADERS, map(cells, result["rows"])),
        "",
        quietness(result),
        "",
        *(line for note in result.get("notes", ()) for line in (note, "")),
        *checks(result),
        "",
        f"![seconds and memory]({path.with_suffix('.png').name})",
        "",
        "## How to read it",
        "",
        READING.format(rounds=", ".join(f"{count} at {tokens:,} tokens" for tokens, count in rounds)),
        "## When not to use it",
        "",
        WHEN_NOT,
    ]
    write_page(path, result, lines)


def draw_chart(result: dict, path: Path) -> None:
    """Two panels over the length of the row: microseconds a token (on a CPU those of the processor, which other
    programs disturb less), and GB beyond what must be held."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in result["rows"] if not row["failed"]]
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4))
    clock, title = ("seconds", "microseconds a token")
    if result["settings"]["device"] == "cpu":
        clock, title = ("cpu_seconds", "microseconds of all cores a token")
    panels = (
        (lambda row: 1e6 * row[clock] / row["tokens"], title),
        (lambda row: row["above_gb"], "GB beyond hidden states, weights and their gradients"),
    )
    for panel, (value_of, title) in zip(axes, panels):
        for label in dict.fromkeys(row["label"] for row in rows):
            mine = [row for row in rows if row["label"] == label]
            panel.plot([row["tokens"] for row in mine], [value_of(row) for row in mine], marker="o", label=label)
        panel.set_xscale("log", base=2)
        lengths = sorted({row["tokens"] for row in rows})
        panel.set_xticks(lengths, [f"{n // 1024}K" if n % 1024 == 0 else f"{n:,}" for n in lengths])
        panel.minorticks_off()
        panel.set_ylim(bottom=0)
        panel.set_xlabel("tokens of the row")
        panel.set_title(title, fontsize=10)
        panel.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="upper center", ncol=4, fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 0.94))
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
