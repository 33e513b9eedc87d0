"""How `packing.py` shows its numbers: a table in the terminal, and a Markdown page with a chart and the raw JSON.

Every number on the page comes from the run; the prose around it states only what holds for any run. Price: the chart
needs matplotlib.
"""

from __future__ import annotations

from pathlib import Path
from statistics import median

from page import QUIET, device_of, markdown_table, write_page


HEADERS = (
    "case",
    "variant",
    "tokens/s",
    "spread",
    "vs padded",
    "vs TRL",
    "CPU vs padded",
    "CPU vs TRL",
    "padding",
    "batches",
    "peak GB",
    "step GB",
    "loss error",
    "gradient error",
    "others",
)

READING = """\
- *tokens/s*: real tokens, padding not counted, of forward and backward over all documents of the case, median of
  {repeats} rounds. *spread*: the largest less the smallest of the rounds, relative to the median: a ratio that differs
  from 1 by less says nothing.
- *vs padded*, *vs TRL*: ratio of tokens/s to padded batches and to TRL's packing, both with `sdpa`. *CPU vs padded*,
  *CPU vs TRL*: the same of tokens per processor second, which other programs on the machine disturb less.
- *padding*: the share of computed tokens that are padding. *batches*: rows x tokens of each batch.
- *peak GB*: the most memory the process held. *step GB*: the same less what it held once the model existed (weights,
  libraries), that is gradients, activations, logits and masks.
- *loss error*, *gradient error*: relative to the first variant of the case, on {checked} small documents before
  anything is timed; for gradients the largest difference in a parameter, relative to its largest entry, the worst of
  all parameters. The mean loss of the measured documents must agree as well, in every round.
- *others*: the share of the cores that other programs used during the measurement, median.
- Every variant is a process of its own, warmed up by the check; variants take turns within a round. Collating is not
  in the measured time.
"""

WHEN_NOT = """\
- **Documents of one length, or sorted by length.** There is no padding to save, and a padded batch is as fast.
- **A model that mixes tokens elsewhere than in attention** (recurrent or linear-attention layers, convolutions):
  no attention kernel keeps documents apart there.
- **A step must hold a fixed number of documents.** A packed row holds a fixed number of tokens, so the documents of a
  step vary, and so does what a mean over documents weighs.
- **CUDA with a flash kernel installed.** TRL's packing with `flash_attention_2` builds no mask either; this page says
  nothing against it.
"""

DOCUMENTS = (
    "Every variant of a case trains on the same documents: random tokens, in lengths drawn from a lognormal mix. "
    "*FLAN-like*: median 150 tokens, deviation 1 in the logarithm, cut at {longest:,}. *OrcaMath-like*: mean 400, "
    "deviation 200. Of 4,000 draws the one with the median padding was taken. Packed rows hold up to {row_tokens:,} "
    "tokens, the row of equal documents {mask_row_tokens:,}; a padded batch has as many documents as a packed row on "
    "average. Llamas with random weights and tied embeddings, {dtype}:"
)


def summarize(rows: list[dict], cores: int) -> None:
    """Add medians to each row, and its ratios to the padded and to TRL's variant of its own case."""
    references = {}
    for row in rows:
        if row["failed"]:
            continue
        runs = row["runs"]
        seconds = [run["seconds"] for run in runs]
        row["seconds"] = median(seconds)
        row["tokens_per_second"] = row["real_tokens"] / row["seconds"]
        row["spread"] = (max(seconds) - min(seconds)) / row["seconds"]
        row["cpu_seconds"] = median(run["cpu_seconds"] for run in runs)
        row["peak_gb"] = median(run["peak_bytes"] for run in runs) / 1e9
        row["step_gb"] = median(run["peak_bytes"] - run["model_bytes"] for run in runs) / 1e9
        others = [(run["machine_cpu_seconds"] - run["cpu_seconds"]) / (run["seconds"] * cores) for run in runs]
        row["other_load"] = max(0.0, median(others))
        if row["attention"] == "sdpa":
            references[row["case"], row["collation"]] = row
    for row in rows:
        for collation in ("padded", "trl"):
            reference = references.get((row["case"], collation))
            if reference is not None and not row["failed"]:
                row[f"vs_{collation}"] = reference["seconds"] / row["seconds"]  # of the same documents
                row[f"cpu_vs_{collation}"] = reference["cpu_seconds"] / row["cpu_seconds"]


def cells(row: dict) -> list[str]:
    """One row of the table, in the order of `HEADERS`."""
    if row["failed"]:
        return [
            row["case"],
            row["label"],
            "wrong" if "wrong" in row["failed"] else "fails",
            *[""] * (len(HEADERS) - 3),
        ]
    ratios = [row.get(key) for key in ("vs_padded", "vs_trl", "cpu_vs_padded", "cpu_vs_trl")]
    errors = [row["check"].get(key) for key in ("loss_error", "gradient_error")]
    return [
        row["case"],
        row["label"],
        f"{row['tokens_per_second']:,.0f}",
        f"{row['spread']:.0%}",
        *("" if ratio is None else f"{ratio:.2f}" for ratio in ratios),
        f"{row['padding']:.0%}",
        _sizes(row["sizes"]),
        f"{row['peak_gb']:.2f}",
        f"{row['step_gb']:.2f}",
        *("" if error is None else f"{error:.0e}" for error in errors),
        f"{row['other_load']:.0%}",
    ]


def _sizes(sizes: list[tuple[int, int]]) -> str:
    shown = [f"{rows} x {tokens:,}" for rows, tokens in sizes[:2]]
    return ", ".join([*shown, "..."] if len(sizes) > 2 else shown)


def failures(result: dict) -> list[str]:
    """One message for each variant that was not timed."""
    return [f"{row['case']}: {row['label']}: {row['failed']}" for row in result["rows"] if row["failed"]]


def is_busy(result: dict) -> bool:
    """Whether other programs took so much of the CPU that its clock says nothing."""
    return result["settings"]["device"] == "cpu" and any(
        row["other_load"] > QUIET for row in result["rows"] if not row["failed"]
    )


def quietness(result: dict) -> str:
    """Whether the clock of this run can be believed."""
    if result["settings"]["device"] != "cpu":
        return "Seconds are those of the CUDA stream."
    loads = [row["other_load"] for row in result["rows"] if not row["failed"]]
    if not loads:
        return "Nothing was timed."
    used = f"other programs used {min(loads):.0%} to {max(loads):.0%} of the cores during the measurements (medians)"
    if not is_busy(result):
        return f"The machine was quiet: {used}."
    return (
        f"**The machine was busy**: {used}, so *tokens/s*, *vs padded* and *vs TRL* of this run are no result, "
        "neither for nor against a variant. Memory and errors are, and ratios of CPU time roughly: threads of one "
        "process that wait for each other also burn processor time. Run the command again on a quiet machine."
    )


def write_report(result: dict, path: Path) -> None:
    """Write `path` (Markdown), and the raw JSON and the chart next to it."""
    draw_chart(result, path.with_suffix(".png"))
    settings = result["settings"]
    measured = [row for row in result["rows"] if not row["failed"]]
    lines = [
        f"# Packing on {device_of(result)}: real tokens per second",
        "",
        DOCUMENTS.format(longest=min(2048, settings["row_tokens"]), **settings),
        "",
        *describe_models(result),
        "",
        markdown_table(HEADERS, map(cells, result["rows"])),
        "",
        quietness(result),
        "",
        *(f"- Not timed: {line}" for line in failures(result)),
        "",
        f"![speed and memory]({path.with_suffix('.png').name})",
        "",
        "## How to read it",
        "",
        READING.format(repeats=max((len(row["runs"]) for row in measured), default=0), checked=result["checked"]),
        "## When not to use it",
        "",
        WHEN_NOT,
    ]
    write_page(path, result, lines, raw="every run, and the length of every document")


def describe_models(result: dict) -> list[str]:
    """One line for each model of the run."""
    lines = []
    for case in result["cases"]:
        shape, full = case["shape"], case["full_layers"]
        layers = shape["num_hidden_layers"]
        parameters = "" if case["parameters"] is None else f"{case['parameters'] / 1e6:.1f} million parameters, "
        depth, note = f"{layers} layers", ""
        if layers < full:
            depth = f"**{layers} of its {full} layers**, to fit the time"
            note = " The words weigh more than in the whole model, and attention less."
        lines.append(
            f"- *{case['model']}*: {parameters}{depth}, hidden size {shape['hidden_size']}, MLP "
            f"{shape['intermediate_size']}, {shape['num_attention_heads']} query and {shape['num_key_value_heads']} "
            f"key/value heads of {shape['head_dim']}, {shape['vocab_size']:,} words.{note}"
        )
    return list(dict.fromkeys(lines))


def draw_chart(result: dict, path: Path) -> None:
    """Two panels of bars: real tokens/s relative to the first variant of the case, and memory of the step."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in result["rows"] if not row["failed"]]
    cases = list(dict.fromkeys(row["case"] for row in rows))
    labels = list(dict.fromkeys(row["label"] for row in rows))
    figure, axes = pyplot.subplots(1, 2, figsize=(13, 4.2))
    busy = is_busy(result)
    speed = "real tokens per CPU second (the machine was busy)" if busy else "real tokens/s"
    titles = (f"{speed}, padded = 1 (equal documents: TRL = 1)", "GB beyond the model")
    for panel, title in zip(axes, titles):
        for place, case in enumerate(cases):
            mine = [row for row in rows if row["case"] == case]
            width = 0.8 / len(mine)
            for index, row in enumerate(mine):
                value = row["step_gb"] if panel is axes[1] else _relative_speed(row, busy)
                x = place + (index - (len(mine) - 1) / 2) * width
                panel.bar(x, value, width, color=f"C{labels.index(row['label'])}")
                panel.text(x, value, f"{value:.2f}", ha="center", va="bottom", fontsize=7)
        panel.set_xticks(range(len(cases)), [case.replace(", ", "\n") for case in cases], fontsize=8)
        panel.set_title(title, fontsize=10)
        panel.spines[["top", "right"]].set_visible(False)
    axes[0].axhline(1, color="black", linewidth=0.6)
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=f"C{index}") for index in range(len(labels))]
    figure.legend(handles, labels, loc="upper center", ncol=len(labels) or 1, fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 0.94))
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _relative_speed(row: dict, busy: bool) -> float:
    """Speed over that of the padded variant, or of TRL's where there is none."""
    prefix = "cpu_vs" if busy else "vs"
    return row.get(f"{prefix}_padded", row.get(f"{prefix}_trl", 1.0))
