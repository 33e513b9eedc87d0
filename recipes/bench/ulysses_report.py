"""How `ulysses.py` shows its numbers: a table in the terminal, and a Markdown page with a chart and the raw JSON.

Every number on the page comes from the run; the prose around it states only what holds for any run. Price: the chart
needs matplotlib.
"""

from __future__ import annotations

from pathlib import Path
from statistics import median

from page import QUIET, device_of, markdown_table, write_page


HEADERS = (
    "row",
    "contender",
    "s",
    "tokens/s",
    "CPU s",
    "peak GB",
    "step GB",
    "time",
    "best time",
    "CPU time",
    "step memory",
    "loss error",
    "gradient error",
    "others",
)

READING = """\
- *s*: forward and backward of one row, the slowest rank, median of {repeats} rounds (the best in brackets); *tokens/s*
  follows from the median.
- *CPU s*: processor seconds of all ranks together, which other programs on the machine disturb less than the clock.
- *peak GB*: the most memory one process held. *step GB*: the same less what it held once the model existed (weights,
  libraries), that is gradients, activations and logits.
- *time*, *best time*, *CPU time*, *step memory*: ratios to the one process of the same row and kernel.
- *loss error*, *gradient error*: relative to the one process, after the mean over ranks, the worst of all rounds; for
  gradients `|g - g_ref| / |g_ref|`, the worst of all parameters.
- *others*: the share of the cores that other programs used during the step, median.
- Every measurement is a fresh process with a warm-up of an eighth of the row; contenders take turns within a round.
  The mean of gradients over ranks, which a wrapper overlaps with the backward, is not in *s*: it took {mean_seconds}.
"""

WHEN_NOT = """\
- **The row fits in one process.** Sequence parallelism divides the work of a row, it does not reduce it: at equal
  cores or devices, data parallelism gives the same tokens a second without an exchange in every layer.
- **The weights are what does not fit.** Every rank holds all weights and gradients; sequence parallelism divides
  activations and logits only. Shard weights with FSDP2, or train LoRA.
- **Query heads that the ranks do not divide.** An uneven split is exact, but the rank with more heads sets the pace of
  attention: 9 heads on 2 ranks are 5 and 4, so attention takes 5 / 4.5 = 1.11 times its share. A key/value head that
  two ranks read is sent to and kept by both.
- **Ranks on different nodes.** Every layer waits for two exchanges forward and two backward; keep the `sp` axis
  inside a node.
- **Short rows.** What every rank does whole (weight gradients, starting kernels, waiting for the slowest) does not
  shrink with its share of the row; measure your own length before you decide.
"""


def summarize(rows: list[dict], cores: int) -> None:
    """Add medians to each row, and its ratios to the one process of its own case and kernel."""
    references = {}
    for row in rows:
        if row["failed"]:
            continue
        runs = row["runs"]
        row["seconds"] = median(run["seconds"] for run in runs)
        row["best_seconds"] = min(run["seconds"] for run in runs)
        row["cpu_seconds"] = median(run["cpu_seconds"] for run in runs)
        row["tokens_per_second"] = row["tokens"] / row["seconds"]
        row["gradient_mean_seconds"] = median(run["gradient_mean_seconds"] for run in runs)
        row["peak_gb"] = median(max(run["peak_bytes"]) for run in runs) / 1e9
        steps = [max(peak - model for peak, model in zip(run["peak_bytes"], run["model_bytes"])) for run in runs]
        row["step_gb"] = median(steps) / 1e9
        others = [(run["machine_cpu_seconds"] - run["cpu_seconds"]) / (run["seconds"] * cores) for run in runs]
        row["other_load"] = max(0.0, median(others))
        for key in ("loss_error", "gradient_norm_error", "gradient_error"):
            row[key] = max((run[key] for run in runs if key in run), default=None)
        if row["name"] == "stock":
            references[row["case"], row["kernel"]] = row
        reference = references.get((row["case"], row["kernel"]))
        if reference is not None:
            for key in ("seconds", "best_seconds", "cpu_seconds", "peak_gb", "step_gb"):
                row[f"{key}_ratio"] = row[key] / reference[key]


def cells(row: dict) -> list[str]:
    """One row of the table, in the order of `HEADERS`."""
    if row["failed"]:
        return [row["case"], row["label"], "does not run", *[""] * (len(HEADERS) - 3)]
    ratios = [row.get(f"{key}_ratio") for key in ("seconds", "best_seconds", "cpu_seconds", "step_gb")]
    errors = [None if row["name"] == "stock" else row[key] for key in ("loss_error", "gradient_error")]
    return [
        row["case"],
        row["label"],
        f"{row['seconds']:.2f} ({row['best_seconds']:.2f})",
        f"{row['tokens_per_second']:,.0f}",
        f"{row['cpu_seconds']:.2f}",
        f"{row['peak_gb']:.2f}",
        f"{row['step_gb']:.2f}",
        *("" if ratio is None else f"{ratio:.2f}" for ratio in ratios),
        *("" if error is None else f"{error:.0e}" for error in errors),
        f"{row['other_load']:.0%}",
    ]


def failures(result: dict) -> list[str]:
    """One message for each contender that could not run a shape."""
    return sorted({f"{r['label']} on {r['case']}: {r['failed']}" for r in result["rows"] if r["failed"]})


def is_busy(result: dict) -> bool:
    """Whether other programs took so much of the CPU that its clock says nothing."""
    return result["settings"]["device"] == "cpu" and any(
        r["other_load"] > QUIET for r in result["rows"] if not r["failed"]
    )


def quietness(result: dict) -> str:
    """Whether the clock of this run can be believed."""
    if result["settings"]["device"] != "cpu":
        return "Seconds are those of the CUDA stream."
    loads = [row["other_load"] for row in result["rows"] if not row["failed"]]
    used = f"other programs used {min(loads):.0%} to {max(loads):.0%} of the cores during the measured steps (medians)"
    if not is_busy(result):
        return f"The machine was quiet: {used}."
    return (
        f"**The machine was busy**: {used}, so *s*, *tokens/s*, *time* and *best time* of this run are no result, "
        "neither for nor against a contender. Memory and errors are, and *CPU time* roughly: threads of one process "
        "that wait for each other also burn processor time. Run the command again on a quiet machine."
    )


def write_report(result: dict, path: Path) -> None:
    """Write `path` (Markdown), and the raw JSON and the chart next to it."""
    draw_chart(result, path.with_suffix(".png"))
    settings = result["settings"]
    measured = [row for row in result["rows"] if not row["failed"]]
    rounds = max(len(row["runs"]) for row in measured)
    mean_seconds = max(row["gradient_mean_seconds"] for row in measured)
    lines = [
        f"# Ulysses on {device_of(result)}: time and memory of one step",
        "",
        f"A Llama with random weights: {settings['layers']} layers, hidden size {settings['hidden']}, MLP "
        f"{settings['intermediate']}, heads of {settings['head_size']}, {settings['vocab']:,} words, tied embeddings, "
        f"{settings['dtype']}, one row a step. *9/3 heads* means 9 query and 3 key/value heads.",
        "",
        markdown_table(HEADERS, map(cells, result["rows"])),
        "",
        quietness(result),
        "",
        *(f"- Does not run: {line}" for line in failures(result)),
        "",
        f"![seconds and memory]({path.with_suffix('.png').name})",
        "",
        "## How to read it",
        "",
        READING.format(repeats=rounds, mean_seconds=f"at most {mean_seconds:.2f} s"),
        "## When not to use it",
        "",
        WHEN_NOT,
    ]
    write_page(path, result, lines)


def draw_chart(result: dict, path: Path) -> None:
    """Two panels of bars: seconds (of the CPU, if the clock means nothing), and memory of the step."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in result["rows"] if not row["failed"]]
    cases = list(dict.fromkeys(row["case"] for row in rows))
    labels = list(dict.fromkeys(row["label"] for row in rows))
    width = 0.8 / len(labels)
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4))
    clock = ("seconds", "seconds a step (median)")
    if is_busy(result):
        clock = ("cpu_seconds", "CPU seconds of all ranks (the machine was busy)")
    panels = (clock, ("step_gb", "GB per process, beyond the model"))
    for panel, (key, title) in zip(axes, panels):
        for index, label in enumerate(labels):
            mine = [row for row in rows if row["label"] == label]
            places = [cases.index(row["case"]) + (index - (len(labels) - 1) / 2) * width for row in mine]
            panel.bar(places, [row[key] for row in mine], width, label=label)
        panel.set_xticks(range(len(cases)), [case.replace(", ", "\n") for case in cases], fontsize=8)
        panel.set_title(title, fontsize=10)
        panel.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="upper center", ncol=3, fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 0.94))
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
