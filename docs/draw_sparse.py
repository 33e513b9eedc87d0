"""Draw the picture of sparse attention: `python docs/draw_sparse.py` writes `docs/img/sparse_rows.png`.

It asks the package who holds which window and which entries a query sees, so it cannot disagree with the code.
"""

from __future__ import annotations

from pathlib import Path

import torch
from draw import DOCUMENTS, FOLDER, PADDING, RANKS
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle

from hf_longctx.attention.compressed import EntryTable, RowsOfDocuments
from hf_longctx.parallel.shard import cut_batch


LENGTHS, RATE, WINDOW, QUERY = (9, 13), 4, 4, 18


def draw_sparse_rows(path: Path) -> None:
    """A row of two documents on two ranks: windows, their entries, and what one query sees."""
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    batch = {"input_ids": torch.zeros_like(positions), "position_ids": positions}
    shard = cut_batch(batch, 2, 1)["sequence_shard"]
    rows = RowsOfDocuments.of_shard(shard, 1, torch.device("cpu"))
    table = EntryTable.of_rows(rows, RATE)
    place = QUERY - rows.start
    sees_entries = rows.sees_entries(slice(place, place + 1), table)[0, 0]
    sees_tokens = rows.sees_tokens(slice(place, place + 1), WINDOW)[0, 0]
    figure = Figure(figsize=(11, 4.2), dpi=150, layout="constrained")
    axes = figure.subplots()
    for token, document in enumerate(rows.documents[0].tolist()):
        color = PADDING if document < 0 else DOCUMENTS[document]
        axes.add_patch(Rectangle((token, 0), 1, 1, facecolor=color, edgecolor="white", lw=1.5))
        axes.text(token + 0.5, 0.5, str(int(rows.positions[0, token])), ha="center", va="center", color="white")
    for rank in range(2):
        start = rank * shard.local_len
        axes.add_patch(Rectangle((start, -0.5), shard.local_len, 0.3, facecolor=RANKS[2 + rank], edgecolor="white"))
        axes.text(start + shard.local_len / 2, -0.9, f"tokens of rank {rank}", ha="center", va="center", fontsize=10)
    for entry, end in enumerate(table.ends[0].tolist()):
        if end < 0:
            continue
        left, owner = end - RATE + 1, end // shard.local_len
        axes.add_patch(Rectangle((left + 0.1, 1.2), RATE - 0.2, 0.25, facecolor=RANKS[2 + owner], edgecolor="none"))
        axes.add_patch(Rectangle((left + 1.5, 2.2), 1, 0.7, facecolor=RANKS[2 + owner], edgecolor="white"))
        axes.text(left + 2, 3.1, f"entry of\nrank {owner}", ha="center", va="bottom", fontsize=8)
        if sees_entries[entry]:
            _arrow(axes, (QUERY + 0.5, 1.0), (left + 2, 2.2))
    for offset in sees_tokens.nonzero().flatten().tolist():
        key = QUERY - WINDOW + 1 + offset
        axes.add_patch(Rectangle((key + 0.06, 0.06), 0.88, 0.88, facecolor="none", edgecolor="#111111", lw=2))
    axes.set_xlim(-0.2, len(rows.documents[0]) + 0.2)
    axes.set_ylim(-1.3, 4.3)
    axes.axis("off")
    axes.set_title(
        f"Windows of {RATE} tokens begin with each document; the rank of a window's last token computes its entry.\n"
        f"The token at position {int(rows.positions[0, QUERY])} sees {WINDOW} tokens (framed) and the earlier "
        "entries of its own document, wherever they are.",
        fontsize=11,
    )
    figure.savefig(path)


def _arrow(axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=12, color="#111111", lw=1.2))


if __name__ == "__main__":
    draw_sparse_rows(FOLDER / "sparse_rows.png")
