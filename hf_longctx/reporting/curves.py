"""The picture of a run: loss, what was evaluated, and throughput, by optimizer step."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any


logger = logging.getLogger(__name__)

_FEW = 50  # steps up to which each has a marker
_HEADROOM = 0.2  # of the range of values, above them, for the legend


def draw_curves(metrics: dict[str, Any], path: Path, unit: str, name: str, points: list[tuple[int, float]]) -> bool:
    """Draw loss, `points` of an evaluation and throughput; `False`, with a warning, where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        logger.warning("`%s` was not drawn, matplotlib is missing: run `pip install hf-longctx[demo]`", path.name)
        return False
    history = metrics["history"]
    figure = Figure(figsize=(11, 4), dpi=150, layout="constrained")
    losses, speeds = figure.subplots(1, 2)
    few = "o" if len(history) <= _FEW else None
    steps, values = ([entry[key] for entry in history] for key in ("step", "loss"))
    lines = losses.plot(steps, values, marker=few, color="tab:blue", label="training", clip_on=False)
    losses.set(title="Loss", xlabel="optimizer step", ylabel=unit)
    panels = [losses]
    if points:
        panel = losses if name == "evaluation" else losses.twinx()  # a score has a scale of its own
        lines += panel.plot(*zip(*points), marker="s", color="tab:orange", label=name, clip_on=False)
        if panel is not losses:
            panel.set_ylabel(name)
            losses.set_title("Loss and score")
            panels.append(panel)
        for panel in panels:
            bottom, top = panel.get_ylim()
            panel.set_ylim(bottom, top + _HEADROOM * (top - bottom))
        panels[-1].legend(handles=lines, loc="upper right", ncols=2, framealpha=0.9)
    measured = [(entry["step"], entry["tokens_per_second"]) for entry in history if entry["tokens_per_second"]]
    if measured:
        speeds.plot(*zip(*measured), marker=few, color="tab:green", clip_on=False)
        speeds.set_ylim(0, 1.05 * max(speed for _, speed in measured))
    speeds.set(title="Throughput", xlabel="optimizer step", ylabel="tokens per second, all processes")
    for panel in (*panels, speeds):
        panel.spines["top"].set_visible(False)
        panel.spines["right"].set_visible(len(panels) > 1 and panel is not speeds)
        panel.xaxis.get_major_locator().set_params(integer=True)
    for panel in (losses, speeds):
        panel.grid(alpha=0.3)
    figure.suptitle(_headline(metrics), fontsize=11)
    figure.savefig(path)
    return True


def _headline(metrics: dict[str, Any]) -> str:
    words = [metrics["name"] + (f", from {metrics['base_model']}" if metrics["base_model"] else "")]
    if metrics["row_tokens"]:
        words.append(f"{metrics['row_tokens']:,} tokens per row")
    words.append(
        f"{metrics['data_parallel_size']} data-parallel x {metrics['sequence_parallel_size']} sequence-parallel"
    )
    return ", ".join(words)
