"""Draw the picture of preference pairs: `python docs/draw_preference.py` writes `docs/img/whole_rows.png`.

The shares are cut by the package, so the picture cannot disagree with the code.
"""

from __future__ import annotations

from pathlib import Path

import torch
from draw import DOCUMENTS, FOLDER, PADDING, RANKS
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle

from hf_longctx.parallel.shard import cut_batch


PROMPT, CHOSEN, REJECTED = 4, 7, 3


def draw_whole_rows(path: Path) -> None:
    """A pair on two ranks: whole rows, their shares, and the numbers that come back."""
    longest = PROMPT + CHOSEN
    mask = torch.ones(2, longest, dtype=torch.long)
    mask[1, PROMPT + REJECTED :] = 0
    shards = [cut_batch({"input_ids": mask, "attention_mask": mask}, 2, rank)["sequence_shard"] for rank in range(2)]
    figure = Figure(figsize=(11, 5.2), dpi=150, layout="constrained")
    axes = figure.subplots()
    width = shards[0].local_len
    for row, name in enumerate(("chosen", "rejected")):
        top = 8.2 - row * 0.8
        axes.text(-0.3, top + 0.3, name, ha="right", va="center", fontsize=10)
        for token in range(longest):
            real = bool(mask[row, token])
            color = PADDING if not real else DOCUMENTS[0] if token < PROMPT else DOCUMENTS[1]
            axes.add_patch(Rectangle((token, top), 1, 0.6, facecolor=color, edgecolor="white", lw=1.5))
            if token >= PROMPT and real:
                axes.add_patch(Rectangle((token - 1, 2.0 - row * 0.8), 1, 0.6, facecolor=DOCUMENTS[1], edgecolor="w"))
            elif token:
                axes.add_patch(Rectangle((token - 1, 2.0 - row * 0.8), 1, 0.6, facecolor=PADDING, edgecolor="w"))
    for shard in shards:
        start = shard.rank * width
        left = start + shard.rank * 1.2
        axes.add_patch(Rectangle((left, 4.0), width, 1.6, facecolor=RANKS[2 + shard.rank], edgecolor="white"))
        words = f"rank {shard.rank}: the model on tokens {start} to {start + shard.num_local_tokens - 1} of both rows"
        axes.text(left + width / 2, 4.8, words.replace(" on ", "\non "), ha="center", va="center", color="white")
        for bottom, top in ((5.7, 7.3), (2.7, 3.9)):
            arrow = FancyArrowPatch((left + width / 2, top), (left + width / 2, bottom), arrowstyle="-|>")
            axes.add_patch(arrow)
            arrow.set(mutation_scale=14, color="#333333")
    axes.text(longest + 2.8, 8.1, "whole rows on every rank:\nTRL's batch, as it is", va="center", fontsize=10)
    axes.text(longest + 2.8, 4.8, "ranks exchange heads\nin every layer", va="center", fontsize=10)
    axes.text(longest + 2.8, 1.9, "one number a token, gathered:\nTRL's loss, on every rank", va="center", fontsize=10)
    axes.set_xlim(-1.6, longest + 7.6)
    axes.set_ylim(0.9, 9.1)
    axes.axis("off")
    axes.set_title("Whole rows outside of the model, shares inside.", loc="left")
    figure.savefig(path)


if __name__ == "__main__":
    draw_whole_rows(FOLDER / "whole_rows.png")
