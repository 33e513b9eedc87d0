"""The columns and sentences of `packing.py`."""

from __future__ import annotations

from pathlib import Path
from statistics import median

from page import Page, add_medians, bullets, device_of, fail, fill, is_busy, measured, quietness, two_panels


COLUMNS = {
    "case": "{case}",
    "variant": "{label}",
    "tokens/s": "{tokens_per_second:,.0f}",
    "spread": "{spread:.0%}",
    "vs padded": "{vs_padded:.2f}",
    "vs TRL": "{vs_trl:.2f}",
    "CPU vs padded": "{cpu_vs_padded:.2f}",
    "CPU vs TRL": "{cpu_vs_trl:.2f}",
    "padding": "{padding:.0%}",
    "batches": lambda row: _sizes(row["sizes"]),
    "peak GB": "{peak_gb:.2f}",
    "step GB": "{step_gb:.2f}",
    "loss error": "{check[loss_error]:.0e}",
    "gradient error": "{check[gradient_error]:.0e}",
    "others": "{other_load:.0%}",
}

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
        add_medians(row, runs, cores)
        seconds = [run["seconds"] for run in runs]
        row["tokens_per_second"] = row["real_tokens"] / row["seconds"]
        row["spread"] = (max(seconds) - min(seconds)) / row["seconds"]
        row["peak_gb"] = median(run["peak_bytes"] for run in runs) / 1e9
        row["step_gb"] = median(run["peak_bytes"] - run["model_bytes"] for run in runs) / 1e9
        if row["attention"] == "sdpa":
            references[row["case"], row["collation"]] = row
    for row in rows:
        for collation in ("padded", "trl"):
            reference = references.get((row["case"], collation))
            if reference is not None and not row["failed"]:
                row[f"vs_{collation}"] = reference["seconds"] / row["seconds"]  # of the same documents
                row[f"cpu_vs_{collation}"] = reference["cpu_seconds"] / row["cpu_seconds"]


def cells(row: dict) -> list[str]:
    """One row of the table."""
    if row["failed"]:
        return fail(COLUMNS, row["case"], row["label"], "wrong" if "wrong" in row["failed"] else "fails")
    return fill(COLUMNS, row)


def _sizes(sizes: list[tuple[int, int]]) -> str:
    shown = [f"{rows} x {tokens:,}" for rows, tokens in sizes[:2]]
    return ", ".join([*shown, "..."] if len(sizes) > 2 else shown)


def page_of(result: dict) -> Page:
    """The page of a run."""
    settings = result["settings"]
    failures = [f"{row['case']}: {row['label']}: {row['failed']}" for row in result["rows"] if row["failed"]]
    repeats = max((len(row["runs"]) for row in measured(result)), default=0)
    return Page(
        title=f"Packing on {device_of(result)}: real tokens per second",
        intro=[
            DOCUMENTS.format(longest=min(2048, settings["row_tokens"]), **settings),
            "\n".join(describe_models(result)),
        ],
        headers=list(COLUMNS),
        cells=[cells(row) for row in result["rows"]],
        notes=[
            quietness(
                result,
                "*tokens/s*, *vs padded* and *vs TRL*",
                " during the measurements (medians)",
                "Memory and errors are, and ratios of CPU time roughly: threads of one process that wait for each "
                "other also burn processor time.",
            ),
            bullets(f"Not timed: {failure}" for failure in failures),
        ],
        picture="speed and memory",
        draw=draw_chart,
        reading=READING.format(repeats=repeats, checked=result["checked"]),
        sections={"When not to use it": WHEN_NOT},
        raw="every run, and the length of every document",
    )


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
    rows = measured(result)
    cases = list(dict.fromkeys(row["case"] for row in rows))
    labels = list(dict.fromkeys(row["label"] for row in rows))
    busy = is_busy(result)
    speed = "real tokens per CPU second (the machine was busy)" if busy else "real tokens/s"
    titles = (f"{speed}, padded = 1 (equal documents: TRL = 1)", "GB beyond the model")
    with two_panels(path, titles, size=(13, 4.2), legend=len(labels)) as panels:
        for panel in panels:
            for place, case in enumerate(cases):
                mine = [row for row in rows if row["case"] == case]
                width = 0.8 / len(mine)
                for index, row in enumerate(mine):
                    value = row["step_gb"] if panel is panels[1] else _relative_speed(row, busy)
                    x = place + (index - (len(mine) - 1) / 2) * width
                    panel.bar(x, value, width, color=f"C{labels.index(row['label'])}", label=row["label"])
                    panel.text(x, value, f"{value:.2f}", ha="center", va="bottom", fontsize=7)
            panel.set_xticks(range(len(cases)), [case.replace(", ", "\n") for case in cases], fontsize=8)
        panels[0].axhline(1, color="black", linewidth=0.6)


def _relative_speed(row: dict, busy: bool) -> float:
    """Speed over that of the padded variant, or of TRL's where there is none."""
    prefix = "cpu_vs" if busy else "vs"
    return row.get(f"{prefix}_padded", row.get(f"{prefix}_trl", 1.0))
