"""The columns and sentences of `ulysses.py`."""

from __future__ import annotations

from pathlib import Path
from statistics import median

from page import (
    Columns,
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
    "row": "{case}",
    "contender": "{label}",
    "s": "{seconds:.2f} ({best_seconds:.2f})",
    "tokens/s": "{tokens_per_second:,.0f}",
    "CPU s": "{cpu_seconds:.2f}",
    "peak GB": "{peak_gb:.2f}",
    "step GB": "{step_gb:.2f}",
    "time": "{seconds_ratio:.2f}",
    "best time": "{best_seconds_ratio:.2f}",
    "CPU time": "{cpu_seconds_ratio:.2f}",
    "step memory": "{step_gb_ratio:.2f}",
    "loss error": lambda row: _error(row, "loss_error"),
    "gradient error": lambda row: _error(row, "gradient_error"),
    "others": "{other_load:.0%}",
}
# In addition where one rank has the row to itself.
MFU_COLUMNS = {"TFLOPS": "{tflops:.1f}", "MFU": "{mfu:.1%}"}
MFU = """\
- *TFLOPS*: model FLOPs a second. Two for each multiplication with a weight, or between a query and a key that it may
  see (**causal attention is counted half**), forward, and twice that backward. **What is run again (activation
  checkpointing, the flash kernel's backward) is not counted.** *MFU*: its share of the device's peak in dense bf16,
  from the maker's data sheet; empty where that is not known. Kernels of attention, as the profiler names them:
  {kernels}.
"""

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
- Every measurement is {process} with a warm-up of an eighth of the row; contenders take turns within a round.
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
        add_medians(row, runs, cores, ["gradient_mean_seconds"])
        row["best_seconds"] = min(run["seconds"] for run in runs)
        row["tokens_per_second"] = row["tokens"] / row["seconds"]
        row["peak_gb"] = median(max(run["peak_bytes"]) for run in runs) / 1e9
        steps = [max(peak - model for peak, model in zip(run["peak_bytes"], run["model_bytes"])) for run in runs]
        row["step_gb"] = median(steps) / 1e9
        if "model_flops" in runs[0]:
            row["tflops"] = runs[0]["model_flops"] / row["seconds"] / 1e12
            peak = runs[0]["peak_tflops"]
            row["mfu"] = None if peak is None else row["tflops"] / peak
        for key in ("loss_error", "gradient_norm_error", "gradient_error"):
            row[key] = max((run[key] for run in runs if key in run), default=None)
        if row["name"] == "stock":
            references[row["case"], row["kernel"]] = row
        reference = references.get((row["case"], row["kernel"]))
        if reference is not None:
            add_ratios(row, reference, ("seconds", "best_seconds", "cpu_seconds", "peak_gb", "step_gb"))


def columns_of(result: dict) -> Columns:
    return {**COLUMNS, **(MFU_COLUMNS if any("tflops" in row for row in result["rows"]) else {})}


def cells(columns: Columns, row: dict) -> list[str]:
    """One row of the table."""
    return fail(columns, row["case"], row["label"], "does not run") if row["failed"] else fill(columns, row)


def _describe_mfu(rows: list[dict]) -> str:
    """What MFU counts, and the kernels that were seen; nothing where it was not measured."""
    found = dict.fromkeys(name for row in rows for run in row["runs"] for name in run.get("kernels", ()))
    kernels = ", ".join(f"`{name}`" for name in found) or "none seen"
    return MFU.format(kernels=kernels) if any("tflops" in row for row in rows) else ""


def _describe_settings(settings: dict) -> str:
    """What every contender ran with, if it was asked for."""
    asked = {"checkpointing": "activation checkpointing", "tiled_loss": "the loss in tiles"}
    words = [name for key, name in asked.items() if settings.get(key)]
    return f" Every contender has {' and '.join(words)}." if words else ""


def _error(row: dict, key: str) -> str:
    return "" if row["name"] == "stock" or row[key] is None else f"{row[key]:.0e}"


def page_of(result: dict) -> Page:
    """The page of a run."""
    settings, rows, columns = result["settings"], measured(result), columns_of(result)
    mean_seconds = max((row["gradient_mean_seconds"] for row in rows), default=0.0)
    failures = sorted({f"{r['label']} on {r['case']}: {r['failed']}" for r in result["rows"] if r["failed"]})
    return Page(
        title=f"Ulysses on {device_of(result)}: time and memory of one step",
        intro=[
            f"A Llama with random weights: {settings['layers']} layers, hidden size {settings['hidden']}, MLP "
            f"{settings['intermediate']}, heads of {settings['head_size']}, {settings['vocab']:,} words, tied "
            f"embeddings, {settings['dtype']}, one row a step. *9/3 heads* means 9 query and 3 key/value heads."
            + _describe_settings(settings)
        ],
        headers=list(columns),
        cells=[cells(columns, row) for row in result["rows"]],
        notes=[
            quietness(
                result,
                "*s*, *tokens/s*, *time* and *best time*",
                " during the measured steps (medians)",
                "Memory and errors are, and *CPU time* roughly: threads of one process that wait for each other also "
                "burn processor time.",
            ),
            bullets(f"Does not run: {failure}" for failure in failures),
        ],
        picture="seconds and memory",
        draw=draw_chart,
        reading=READING.format(
            repeats=max((len(row["runs"]) for row in rows), default=0),
            mean_seconds=f"at most {mean_seconds:.2f} s",
            process=process_of(result),
        )
        + _describe_mfu(rows),
        sections={"When not to use it": WHEN_NOT},
    )


def draw_chart(result: dict, path: Path) -> None:
    """Two panels of bars: seconds (of the CPU, if the clock means nothing), and memory of the step."""
    rows = measured(result)
    cases = list(dict.fromkeys(row["case"] for row in rows))
    labels = list(dict.fromkeys(row["label"] for row in rows))
    width = 0.8 / len(labels)
    clock = ("seconds", "seconds a step (median)")
    if is_busy(result):
        clock = ("cpu_seconds", "CPU seconds of all ranks (the machine was busy)")
    keys, titles = zip(clock, ("step_gb", "GB per process, beyond the model"))
    with two_panels(path, titles, legend=3) as panels:
        for panel, key in zip(panels, keys):
            for index, label in enumerate(labels):
                mine = [row for row in rows if row["label"] == label]
                places = [cases.index(row["case"]) + (index - (len(labels) - 1) / 2) * width for row in mine]
                panel.bar(places, [row[key] for row in mine], width, label=label)
            panel.set_xticks(range(len(cases)), [case.replace(", ", "\n") for case in cases], fontsize=8)
