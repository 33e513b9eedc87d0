"""The columns and sentences of `tiled_loss.py`."""

from __future__ import annotations

from pathlib import Path
from statistics import median

from page import (
    Page,
    add_medians,
    add_ratios,
    bullets,
    device_of,
    fail,
    fill,
    is_busy,
    measured,
    process_of,
    quietness,
    two_panels,
)


COLUMNS = {
    "tokens": "{tokens:,}",
    "contender": "{label}",
    "s": "{seconds:.2f} ({best_seconds:.2f})",
    "tokens/s": "{tokens_per_second:,.0f}",
    "CPU s": "{cpu_seconds:.2f}",
    "time": "{seconds_ratio:.2f}",
    "CPU time": "{cpu_seconds_ratio:.2f}",
    "step GB": "{step_gb:.2f}",
    "above GB": "{above_gb:.2f}",
    "others": "{other_load:.0%}",
}

READING = """\
- *s*: forward and backward of the loss of one row, median of the rounds (the best in brackets): {rounds}.
- *CPU s*: processor seconds, which other programs on the machine disturb less than the clock.
- *time*, *CPU time*: ratios to whole logits of the same row; where those do not fit, to ours.
- *step GB*: the most memory the step held beyond hidden states and weights. *above GB*: the same less the gradients of
  hidden states and weights that any contender must return; it should not grow with the row.
- *others*: the share of the cores that other programs used during the step, median.
- Every measurement is {process} with a warm-up of 256 tokens; contenders take turns within a round.
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
        add_medians(row, runs, cores)
        row["best_seconds"] = min(run["seconds"] for run in runs)
        row["tokens_per_second"] = row["tokens"] / row["seconds"]
        for key in ("step", "above"):
            row[f"{key}_gb"] = median(run[f"{key}_bytes"] for run in runs) / 1e9
        add_ratios(row, references.setdefault(row["tokens"], row))


def cells(row: dict) -> list[str]:
    """One row of the table."""
    return fail(COLUMNS, f"{row['tokens']:,}", row["label"], row["failed"]) if row["failed"] else fill(COLUMNS, row)


def _quietness(result: dict) -> str:
    rows = measured(result)
    # Rows that were run once are there for their memory.
    timed = [row for row in rows if len(row["runs"]) > 1] or rows
    longest = max(row["tokens"] for row in timed)
    when = f" during the steps of up to {longest:,} tokens (medians)"
    told = quietness(result, "*s*, *tokens/s* and *time*", when, rows=timed)
    if is_busy({**result, "rows": timed}) or len(timed) == len(rows):
        return told
    return f"{told} Longer rows were run once, for their memory, quiet or not."


def _checks(result: dict) -> str:
    """What was compared before anything was timed."""
    seen = {row["label"]: row for row in result["rows"] if "gradient_error" in row}
    return bullets(
        f"{label}: on {result['check_tokens']} tokens the loss is off by {row['loss_error']:.1e} from that of whole "
        f"logits, the worst gradient by {row['gradient_error']:.1e} (`|g - g_ref| / |g_ref|`)."
        for label, row in seen.items()
    )


def page_of(result: dict) -> Page:
    """The page of a run."""
    settings = result["settings"]
    rounds = sorted({(row["tokens"], len(row["runs"])) for row in measured(result)})
    return Page(
        title=f"The tiled loss on {device_of(result)}: time and memory",
        intro=[
            f"One row of random hidden states of size {settings['width']:,}, {settings['vocab']:,} words, "
            f"{settings['dtype']}, {settings['ignored']:.0%} of the labels ignored; hidden states and weights are "
            "trained."
        ],
        headers=list(COLUMNS),
        cells=[cells(row) for row in result["rows"]],
        notes=[_quietness(result), *result.get("notes", ()), _checks(result)],
        picture="seconds and memory",
        draw=draw_chart,
        reading=READING.format(
            rounds=", ".join(f"{count} at {tokens:,} tokens" for tokens, count in rounds), process=process_of(result)
        ),
        sections={"When not to use it": WHEN_NOT},
    )


def draw_chart(result: dict, path: Path) -> None:
    """Two panels over the length of the row: microseconds a token (on a CPU those of the processor, which other
    programs disturb less), and GB beyond what must be held."""
    rows = measured(result)
    clock, title = ("seconds", "microseconds a token")
    if result["settings"]["device"] == "cpu":
        clock, title = ("cpu_seconds", "microseconds of all cores a token")
    values = (lambda row: 1e6 * row[clock] / row["tokens"], lambda row: row["above_gb"])
    titles = (title, "GB beyond hidden states, weights and their gradients")
    with two_panels(path, titles, legend=4) as panels:
        for panel, value_of in zip(panels, values):
            for label in dict.fromkeys(row["label"] for row in rows):
                mine = [row for row in rows if row["label"] == label]
                panel.plot([row["tokens"] for row in mine], [value_of(row) for row in mine], marker="o", label=label)
            panel.set_xscale("log", base=2)
            lengths = sorted({row["tokens"] for row in rows})
            panel.set_xticks(lengths, [f"{n // 1024}K" if n % 1024 == 0 else f"{n:,}" for n in lengths])
            panel.minorticks_off()
            panel.set_ylim(bottom=0)
            panel.set_xlabel("tokens of the row")
