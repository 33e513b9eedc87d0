"""Draw the pictures of hybrids.md: `python docs/draw_hybrids.py` writes into `docs/img`. Needs matplotlib.

Both ask the package where documents begin on a rank, so they cannot disagree with the code.
"""

from __future__ import annotations

from pathlib import Path

import torch
from draw import DOCUMENTS, FOLDER, PADDING, RANKS, _cell
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle

from hf_longctx.adapters.recurrent.pieces import SharePieces, pieces_of
from hf_longctx.parallel.shard import cut_batch


KERNEL, LENGTHS, SIZE = 4, (8, 5, 8), 3
ARROW = {"arrowstyle": "-|>", "color": "#444444", "mutation_scale": 14}


def _pieces() -> list[SharePieces]:
    """Of every rank, of one row of documents."""
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    row = {"input_ids": torch.zeros_like(positions), "position_ids": positions}
    shards = [cut_batch(row, SIZE, rank)["sequence_shard"] for rank in range(SIZE)]
    return [pieces_of(shard, 1, torch.device("cpu")) for shard in shards]


def draw_halo(path: Path) -> None:
    """What a convolution of 4 taps reads before each of three ranks' tokens, in a row of three documents."""
    figure = Figure(figsize=(12, 4.9), dpi=150, layout="constrained")
    axes = figure.subplots()
    reach = KERNEL - 1
    for rank, pieces in enumerate(_pieces()):
        tokens, start = pieces.shard.local_len, pieces.shard.rank * pieces.shard.local_len
        documents, row = pieces.documents[0].tolist(), 2.2 * rank
        for index in range(max(start - reach, 0), start):
            same = documents[index] == documents[start]
            _cell(axes, index, row, DOCUMENTS[documents[index]] if same else PADDING, str(index) if same else "0")
            axes.add_patch(Rectangle((index, row), 1, 1, fill=False, hatch="///", edgecolor="white", lw=0))
            axes.add_patch(FancyArrowPatch((index + 0.5, row - 1.15), (index + 0.5, row - 0.05), **ARROW))
        for index in range(start, start + tokens):
            _cell(axes, index, row, DOCUMENTS[documents[index]], str(index))
            begins = index > start and documents[index] != documents[index - 1]
            if begins:
                axes.plot([index, index], [row - 0.12, row + 1.12], color="black", lw=2.5)
        axes.text(-0.4, row + 0.5, f"rank {rank}", ha="right", va="center", fontsize=12, color=RANKS[rank])
    note = (
        "hatched: the halo, gathered from the ranks before; 0 where it is of another document\n"
        "black bar: a document begins, its first tokens are computed again with zeros before them"
    )
    axes.text(0, 2.2 * SIZE - 0.7, note, va="top", fontsize=11, linespacing=1.5)
    axes.set(xlim=(-2.5, sum(LENGTHS) + 0.2), ylim=(2.2 * SIZE + 0.6, -0.3), aspect="equal")
    axes.set_axis_off()
    axes.set_title(f"A causal convolution of {KERNEL} taps reads {reach} tokens before each one", fontsize=13)
    figure.savefig(path)


def draw_state(path: Path) -> None:
    """What each rank computes of a recurrence by itself, and how the states become those of whole rows."""
    figure = Figure(figsize=(12, 5.2), dpi=150, layout="constrained")
    axes = figure.subplots()
    text = {"ha": "center", "va": "center", "fontsize": 11}
    for rank, pieces in enumerate(_pieces()):
        left = rank * 4.4
        inside = pieces.passes_through[0] or (rank == 0 and len(pieces.lengths[0]) == 1)
        axes.add_patch(Rectangle((left, 0), 3.4, 1.1, facecolor=RANKS[rank], edgecolor="none"))
        axes.text(left + 1.7, 0.55, f"rank {rank}: one call\nfrom state $[\\,0 \\mid I\\,]$", color="white", **text)
        transition = f"$M_{rank}$" if inside else f"$M_{rank} = 0$: a document begins here"
        results = f"outputs of my tokens alone\nmy last state $U_{rank}$\n{transition}"
        axes.text(left + 1.7, 1.85, results, linespacing=1.6, **text)
        axes.add_patch(FancyArrowPatch((left + 1.7, 2.55), (left + 1.7, 3.1), **ARROW))
        handed_on = f"$S_{rank} = U_{rank - 1} + M_{rank - 1}\\,S_{rank - 1}$"
        incoming = "nothing comes in: $S_0 = 0$" if rank == 0 else handed_on
        axes.text(left + 1.7, 4.25, incoming, weight="bold", **text)
        axes.text(left + 1.7, 4.85, "" if rank == 0 else "+ what my tokens read of it", **text)
    width = (SIZE - 1) * 4.4 + 3.4
    axes.add_patch(Rectangle((0, 3.15), width, 0.7, facecolor="#eeeeee", edgecolor="none"))
    axes.text(
        width / 2, 3.5, "one all-gather of $(U, M)$: as many numbers for a million tokens as for a thousand", **text
    )
    axes.set(xlim=(-0.2, width + 0.2), ylim=(5.2, -0.2))
    axes.set_axis_off()
    axes.set_title("A recurrence is affine in the state that comes in", fontsize=13)
    figure.savefig(path)


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    draw_halo(FOLDER / "halo.png")
    draw_state(FOLDER / "affine_state.png")
