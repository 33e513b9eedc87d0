"""How `hf-longctx plan` shows a plan: a table and a picture."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from transformers import PretrainedConfig

from ..planner.memory_plan import DEVICE_KINDS, USABLE_SHARE, MemoryBreakdown, Planner
from ..planner.presets import PRESETS, Preset
from ..planner.settings import GIB, Settings
from ..reporting.flops import ModelFlops, count_flops
from .plan_saving import describe_saving


_REFERENCES = {
    "none": "no reference model",
    "model": "a reference model without gradients and optimizer",
    "adapter": "a reference that is the model without its adapters",
}
_PICTURES = (".png", ".svg")
_NAMES = {"mlp": "MLP", "hidden": "hidden states"}
# Short enough for all columns in 120 characters; longer names stand below the table.
_SHORT_NAMES = {
    "gradients": "grads",
    "optimizer": "optim",
    "hidden": "hidden",
    "attention": "attn",
    "mlp": "MLP",
    "workspace": "work",
}
_COLORS = ("#264653", "#2a9d8f", "#8ab17d", "#e9c46a", "#f4a261", "#577590", "#e76f51", "#9d4edd", "#adb5bd")


@dataclass(frozen=True)
class Cell:
    """One preset on one number of ranks a row.

    Args:
        preset ([`Preset`]): the preset.
        settings ([`Settings`]): with the tokens that are shown: the target, or the longest row.
        longest (`int`): tokens of the longest row that fits; 0 if none does.
        breakdown ([`MemoryBreakdown`], *optional*): bytes at the tokens that are shown.
    """

    preset: Preset
    settings: Settings
    longest: int
    breakdown: MemoryBreakdown | None

    @property
    def size(self) -> int:
        """Ranks that share a row."""
        return self.settings.sequence_parallel_size


@dataclass(frozen=True)
class Speed:
    """Seconds of a step, by counting operations.

    Args:
        flops (`ModelFlops`, *optional*): `None` for a model whose operations cannot be counted.
        unknown (`str`): why not.
        tflops (`float`): 10^12 operations a second that one GPU is taken to reach.
    """

    flops: ModelFlops | None
    unknown: str
    tflops: float

    @classmethod
    def of(cls, config: PretrainedConfig, peak_tflops: float, utilisation: float) -> Speed:
        """At this share of this peak."""
        try:
            return cls(count_flops(config), "", peak_tflops * utilisation)
        except NotImplementedError as error:
            return cls(None, str(error), peak_tflops * utilisation)

    def cells(self, settings: Settings) -> tuple[str, str]:
        """10^15 model FLOPs of one row, and seconds until the ranks that share it are through."""
        flops, seconds = self.of_row(settings)
        if flops is None or seconds is None:
            return "-", "-"
        return format_number(flops / 1e15), format_number(seconds)

    def of_row(self, settings: Settings) -> tuple[float | None, float | None]:
        """The same as numbers: model FLOPs, and seconds."""
        if self.flops is None:
            return None, None
        recompute = (
            "layers" if settings.checkpointing or settings.reversible else "mlp" if settings.mlp_tile_size else "none"
        )
        trained = 0.0 if settings.optimizer == "lora" else 1.0
        lengths = [settings.tokens] * (settings.rows if settings.whole_rows else 1)
        step = self.flops.step(lengths, recompute=recompute, trained_share=trained)
        once_more = 0 if settings.reference == "none" else step.forward
        seconds = (step.hardware + once_more) / (settings.sequence_parallel_size * self.tflops * 1e12)
        return step.model + once_more, seconds


def print_facts(
    console: Console, options: argparse.Namespace, planner: Planner, settings: Settings, speed: Speed
) -> None:
    """What the plan is for, and what it takes for granted."""
    numel = sum(p.numel() for p in planner.model.parameters())
    node = "" if options.cpu_memory is None else f", {options.cpu_memory:g} GiB of CPU memory a node"
    facts = Table.grid(padding=(0, 2))
    facts.add_row("model", f"{escape(options.model)}, {numel / 1e9:.2f}B parameters")
    planned = f"{USABLE_SHARE:.0%} of it planned with"
    facts.add_row("machine", f"{options.gpus} x {options.gpu_memory:g} GiB, {planned}{node}")
    kind = str(settings.weights_dtype).removeprefix("torch.")
    facts.add_row("training", f"{settings.optimizer}, weights in {kind}, bf16 compute, wrapper {settings.wrapper}")
    if settings.whole_rows:
        facts.add_row("pairs", f"{options.task}: two rows of these tokens a step, {_REFERENCES[settings.reference]}")
    kernel = "a flash kernel; without one, sliding windows and softcap take more"
    if settings.num_hashes is not None:
        kernel = f"LSH, {settings.num_hashes} rounds, queries and keys counted as if they were not tied"
    facts.add_row("attention", kernel)
    if speed.flops is None:
        facts.add_row("time", f"not known: {escape(speed.unknown)}")
    else:
        facts.add_row("time", f"an estimate at {speed.tflops:,.0f} TFLOP/s a GPU, without exchanges and copies")
    facts.add_row("checkpoints", describe_saving(options, numel, settings))
    console.print(facts)


def print_cells(console: Console, cells: list[Cell], best: Cell | None, target: int | None, speed: Speed) -> None:
    """The breakdown of every preset and number of ranks, in GiB of one GPU."""
    shown = f"rows of {target:,} tokens" if target else "the longest row of each line"
    console.print(f"GiB of one GPU at the fullest moment of a step, for {shown}:")
    has_recurrent = "recurrent" in _kinds_of([cell.breakdown for cell in cells])
    kinds = [kind for kind in DEVICE_KINDS if kind != "recurrent"]  # one more column would not fit a terminal
    names = [_SHORT_NAMES.get(kind, kind) for kind in kinds]
    look = {"box": box.SIMPLE, "padding": 0} if console.is_terminal else {"box": None, "padding": (0, 1, 0, 0)}
    table = Table(show_edge=False, **look)
    for name in ("", "preset", "P"):
        table.add_column(name, no_wrap=True)
    for name in (*names, "all", "cpu", "PFLOP", "sec", "longest"):
        table.add_column(name, justify="right", overflow="fold")
    for cell in cells:
        style = "bold green" if cell is best else None
        mark = "->" if cell is best else ""
        row = ["-"] * (len(names) + 4)
        if cell.breakdown is not None:
            amounts = [
                *(_shown_bytes(cell.breakdown, kind) for kind in kinds),
                cell.breakdown.device,
                cell.breakdown.cpu,
            ]
            row = [*(_format_gib(amount) for amount in amounts), *speed.cells(cell.settings)]
        table.add_row(mark, cell.preset.name, str(cell.size), *row, f"{cell.longest:,}", style=style)
    console.print(table)
    console.print(
        "P: GPUs that share a row · grads: gradients · optim: optimizer · hidden: hidden states · attn: attention"
        f"{' and recurrent layers' if has_recurrent else ''} · work: workspace\n"
        f"all: of one GPU · cpu: of one node · PFLOP and sec: of one {_unit(cells)} · longest: the longest that fits",
        style="dim",
    )
    if has_recurrent and (cell := best or cells[-1]).breakdown is not None:
        console.print(
            f"recurrent layers are {_format_gib(cell.breakdown.recurrent)} GiB of attn in '{cell.preset.name}' with "
            f"{cell.size} GPUs a row, with the states and last tokens that these exchange"
        )
    if best is not None:
        console.print(
            f"-> '{best.preset.name}' with {best.size} GPUs a row fits {best.longest:,} tokens; compared with the "
            f"preset before, it costs {best.preset.price}"
        )


def _unit(cells: list[Cell]) -> str:
    return "pair" if cells and cells[0].settings.whole_rows else "row"


def _shown_bytes(breakdown: MemoryBreakdown, kind: str) -> int:
    """Of a column; recurrent layers stand with attention."""
    return getattr(breakdown, kind) + (breakdown.recurrent if kind == "attention" else 0)


def _kinds_of(breakdowns: Sequence[MemoryBreakdown | None]) -> list[str]:
    """What is shown: without recurrent layers where the model has none."""
    return [kind for kind in DEVICE_KINDS if kind != "recurrent" or any(b and b.recurrent for b in breakdowns)]


def _format_gib(amount: int) -> str:
    gib = amount / GIB
    return f"{gib:,.1f}" if gib >= 0.05 else f"{gib:.2g}" if gib >= 0.0005 else "0"


def draw_plan(path: Path, planner: Planner, cells: list[Cell], shown: Cell, device_bytes: int) -> bool:
    """Bytes by kind over the length of a row, next to the longest row of every preset; `False` without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(13, 5), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    lengths = _lengths(max(shown.longest, 8 * shown.size))
    breakdowns = [planner.breakdown(shown.settings.of(tokens=length)) for length in lengths]
    labels = [format_tokens(length) for length in lengths]
    bottom = [0.0] * len(lengths)
    shown_kinds = _kinds_of(breakdowns)
    for kind, color in zip(DEVICE_KINDS, _COLORS):
        if kind not in shown_kinds:
            continue
        heights = [getattr(breakdown, kind) / GIB for breakdown in breakdowns]
        left.bar(labels, heights, bottom=bottom, color=color, label=_NAMES.get(kind, kind))
        bottom = [low + height for low, height in zip(bottom, heights)]
    left.axhline(device_bytes / GIB, color="black", linewidth=1, label="memory of one GPU")
    left.axhline(device_bytes * USABLE_SHARE / GIB, color="black", linestyle="--", label="planned with")
    left.set(
        title=f"'{shown.preset.name}', {shown.size} GPUs a row", xlabel="tokens of a row", ylabel="GiB of one GPU"
    )
    left.legend(frameon=False, fontsize=8)
    sizes = sorted({cell.size for cell in cells})
    width = 0.8 / len(sizes)
    for index, size in enumerate(sizes):
        longest = [max(cell.longest, 1) for cell in cells if cell.size == size]
        places = [place + (index - (len(sizes) - 1) / 2) * width for place in range(len(longest))]
        bars = right.bar(places, longest, width, label=f"{size} GPUs a row", color=_COLORS[index % len(_COLORS)])
        right.bar_label(bars, [format_tokens(length) for length in longest], fontsize=6, rotation=90, padding=2)
    right.set(title="Longest row that fits", ylabel="tokens", yscale="log", xticks=range(len(PRESETS)))
    right.set_xticklabels(list(PRESETS))
    right.margins(y=0.12)
    right.legend(frameon=False, fontsize=8)
    for panel in (left, right):
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
    return True


def _lengths(longest: int) -> list[int]:
    """Seven powers of two, the last of which is the first over `longest`."""
    last = longest.bit_length()
    return [2**power for power in range(max(last - 6, 3), last + 1)]


def format_number(value: float) -> str:
    """With two digits at least, and none behind the point where they say nothing."""
    return f"{value:.2g}" if value < 1 else f"{value:,.1f}" if value < 100 else f"{value:,.0f}"


def format_tokens(tokens: int) -> str:
    """Short, for a picture: `512`, `131K`, `1.2M`."""
    if tokens < 1000:
        return str(tokens)
    return f"{tokens / 1e3:.0f}K" if tokens < 10**6 else f"{tokens / 1e6:.1f}M"


def validate_outputs(picture: str | None, recipe: str | None) -> None:
    """Raise `ValueError` before anything is simulated if an output could not be written."""
    if picture is not None and Path(picture).suffix.lower() not in _PICTURES:
        raise ValueError(
            f"`--output` ({picture}) must be a picture, which may be written over: end it in .png or .svg."
        )
    for name, value in (("output", picture), ("write", recipe)):
        if value is not None and (Path(value).is_dir() or not Path(value).parent.is_dir()):
            raise ValueError(f"`--{name}` ({value}) must be a file in a folder that exists: make the folder first.")
    if recipe is not None and Path(recipe).exists():
        raise ValueError(f"`--write` ({recipe}) exists already and is not written over: choose another name.")
