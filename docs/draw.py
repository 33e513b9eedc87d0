"""Draw the pictures of these pages: `python docs/draw.py` writes `docs/img/*.png`. Needs matplotlib.

The pictures of heads, of the packed row and of the gradient law ask the package itself, so they cannot disagree
with the code.
"""

from __future__ import annotations

from pathlib import Path

import torch
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle

from hf_longctx import PackingCollator
from hf_longctx.parallel.heads import HeadSplit, split_heads
from hf_longctx.parallel.shard import cut_batch


FOLDER = Path(__file__).parent / "img"
RANKS = ("#3b6ea5", "#c8641b", "#2f8a5b", "#94467a")
BOTH = "#6b6b6b"
DOCUMENTS = (*RANKS, "#8c7a2b")
PADDING = "#dddddd"


def draw_exchange(path: Path) -> None:
    """Tokens x heads on every rank, before and after the exchange, for 2 and 4 ranks."""
    tokens, heads = 8, 8
    figure = Figure(figsize=(10, 8.8), dpi=150, layout="constrained")
    panels = figure.subplots(2, 2)
    for row, size in zip(panels, (2, 4)):
        for axes, after in zip(row, (False, True)):
            for token in range(tokens):
                for head in range(heads):
                    owner = head * size // heads if after else token * size // tokens
                    axes.add_patch(Rectangle((token, head), 1, 1, facecolor=RANKS[owner], edgecolor="white", lw=1.5))
            for rank in range(size):
                middle = (rank + 0.5) * tokens / size
                where = (tokens / 2, middle) if after else (middle, heads / 2)
                box = {"facecolor": RANKS[rank], "edgecolor": "none", "pad": 2}
                axes.text(
                    *where,
                    f"rank {rank}",
                    color="white",
                    ha="center",
                    va="center",
                    fontsize=12,
                    weight="bold",
                    bbox=box,
                )
            held = (f"{tokens} tokens, {heads // size} heads", f"{tokens // size} tokens, {heads} heads")[not after]
            title = "after: all tokens of my heads" if after else "before: my tokens of all heads"
            axes.set_title(f"P = {size}, {title}\neach rank holds {held}", fontsize=11)
            _style(axes, tokens, heads)
            if not after:
                arrow = {"arrowstyle": "-|>", "color": "#444444", "lw": 1.5, "mutation_scale": 16}
                axes.annotate("", (1.44, 0.5), (1.12, 0.5), xycoords="axes fraction", arrowprops=arrow)
                axes.text(1.28, 0.53, "all-to-all", transform=axes.transAxes, ha="center", va="bottom", fontsize=11)
    figure.suptitle("One all-to-all trades tokens for heads; a second one trades the output back", fontsize=13)
    figure.savefig(path)


def _style(axes, tokens: int, heads: int) -> None:
    axes.set(xlim=(0, tokens), ylim=(heads, 0), xlabel="token of the row", ylabel="head", aspect="equal")
    axes.set_xticks([i + 0.5 for i in range(tokens)], range(tokens))
    axes.set_yticks([i + 0.5 for i in range(heads)], range(heads))
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)


def draw_heads(path: Path) -> None:
    """9 query heads that read 3 key/value heads, on 2 ranks: an uneven split and one shared key/value head."""
    split = split_heads(9, 3, 2)
    figure = Figure(figsize=(11, 4.3), dpi=150, layout="constrained")
    axes = figure.subplots()
    for head in range(split.num_query_heads):
        owner = next(rank for rank, (start, stop) in enumerate(split.query) if start <= head < stop)
        _box(axes, head, 3.0, f"q{head}", RANKS[owner])
    group = split.num_query_heads // split.num_key_value_heads
    for shared in range(split.num_key_value_heads):
        readers = [rank for rank, (start, stop) in enumerate(split.key_value) if start <= shared < stop]
        middle = shared * group + (group - 1) / 2
        _box(axes, middle, 0.6, f"kv{shared}", RANKS[readers[0]] if len(readers) == 1 else BOTH)
        for head in range(shared * group, (shared + 1) * group):
            arrow = FancyArrowPatch((middle, 1.4), (head, 3.0), arrowstyle="-", color="#999999", lw=1.2)
            axes.add_patch(arrow)
        if len(readers) > 1:
            note = "sent to both ranks; their gradients for it are summed"
            axes.text(middle, 0.35, note, ha="center", va="top", fontsize=11)
    for rank in range(2):
        start, stop = split.query[rank]
        label = _owner_label(split, rank)
        axes.plot([start - 0.4, stop - 0.6], [4.05, 4.05], color=RANKS[rank], lw=3, solid_capstyle="butt")
        axes.text((start + stop - 1) / 2, 4.2, label, ha="center", va="bottom", fontsize=12, color=RANKS[rank])
    axes.text(-0.7, 3.4, "query\nheads", ha="right", va="center", fontsize=11)
    axes.text(-0.7, 1.0, "key/value\nheads", ha="right", va="center", fontsize=11)
    axes.set(xlim=(-1.7, 8.7), ylim=(-0.1, 4.6))
    axes.set_axis_off()
    figure.suptitle("9 query heads and 3 key/value heads on 2 ranks", fontsize=13)
    figure.savefig(path)


def draw_packed_row(path: Path) -> None:
    """Five documents: padded to a batch, packed in a row with the collator's keys, and which tokens see which."""
    lengths = (4, 8, 3, 6, 2)
    documents = [{"input_ids": list(range(10, 10 + length))} for length in lengths]
    batch = PackingCollator()(documents)
    owners, tokens = batch["seq_idx"][0].tolist(), sum(lengths)
    figure = Figure(figsize=(12, 5), dpi=150, layout="constrained")
    grid = figure.add_gridspec(2, 2, width_ratios=(1.75, 1), height_ratios=(1, 0.8))
    padded, packed, seen = (figure.add_subplot(grid[place]) for place in ((0, 0), (1, 0), (slice(0, 2), 1)))
    for row, length in enumerate(lengths):
        for token in range(max(lengths)):
            _cell(padded, token, row, DOCUMENTS[row] if token < length else PADDING, str(token) * (token < length))
    waste = 1 - tokens / (max(lengths) * len(lengths))
    padded.set_title(f"a padded batch: {waste:.0%} of what is computed is padding", fontsize=11, loc="left")
    _frame(padded, tokens, len(lengths))
    for row, key in enumerate(("seq_idx", "position_ids", "labels")):
        for token, value in enumerate(batch[key][0].tolist()):
            hidden = key == "labels" and value == -100
            _cell(packed, token, row, PADDING if hidden else DOCUMENTS[owners[token]], "-" if hidden else str(value))
        packed.text(-0.3, row + 0.5, key, ha="right", va="center", fontsize=10)
    for bound in batch["cu_seq_lens_q"].tolist():
        packed.plot([bound, bound], [0, 3.2], color="black", lw=1)
        packed.text(bound, 3.3, str(bound), ha="center", va="top", fontsize=10)
    packed.text(-0.3, 3.5, "cu_seq_lens_q", ha="right", va="center", fontsize=10)
    packed.set_title("the same documents packed; a first label (-) is not trained", fontsize=11, loc="left")
    _frame(packed, tokens, 4)
    for query in range(tokens):
        for key in range(tokens):
            same = owners[query] == owners[key] and key <= query
            _cell(seen, key, query, DOCUMENTS[owners[query]] if same else "#f4f4f4", "")
    computed = sum(length * (length + 1) // 2 for length in lengths)
    share = computed / (tokens * (tokens + 1) // 2)
    seen.set_title(f"who sees whom: {share:.0%} of one long causal row", fontsize=11)
    _frame(seen, tokens, tokens)
    figure.savefig(path)


def draw_gradient_law(path: Path) -> None:
    """Two rows on two groups of two ranks: what each rank computes, and how much each token then counts."""
    ids = torch.arange(16).view(2, 8)
    labels = ids.clone()
    labels[0, 6:] = labels[1, :4] = -100  # an answer that ends early, a prompt that is long
    rows = [{"input_ids": ids[row : row + 1], "labels": labels[row : row + 1]} for row in range(2)]
    shares = [cut_batch(row, 2, rank) for row in rows for rank in range(2)]
    trained = [(share["shift_labels"][0] != -100).tolist() for share in shares]
    counts, size = [sum(tokens) for tokens in trained], len(shares)
    total = sum(counts)
    figure = Figure(figsize=(12, 6.4), dpi=150, layout="constrained")
    grid = figure.add_gridspec(2, 2, height_ratios=(1.15, 1))
    steps, law, means = (figure.add_subplot(grid[place]) for place in ((0, slice(0, 2)), (1, 0), (1, 1)))
    text = {"ha": "center", "fontsize": 11}
    for rank, tokens in enumerate(trained):
        left = rank * 5.6
        for place, is_trained in enumerate(tokens):
            _cell(steps, left + place, 0, RANKS[rank] if is_trained else PADDING, "" if is_trained else "-")
        where = f"group {rank // 2}, rank {rank}"
        steps.text(left + 2, -0.2, where, va="bottom", color=RANKS[rank], weight="bold", **text)
        losses = "1 loss" if counts[rank] == 1 else f"the sum of {counts[rank]} losses"
        label = f"$S_{rank}$: {losses}\nbackward from $W\\,S_{rank}/N = {size}\\,S_{rank}/{total}$"
        steps.text(left + 2, 1.2, label, va="top", linespacing=1.6, **text)
        arrow = FancyArrowPatch((left + 2, 2.5), (left + 2, 3.4), arrowstyle="-|>", color="#444444", mutation_scale=14)
        steps.add_patch(arrow)
    sums = "+".join(f"S_{rank}" for rank in range(size))
    mean = f"DDP or FSDP takes the mean over {size} ranks: the gradient of $({sums})/{total}$, the loss of one process"
    steps.text(10.4, 3.7, mean, va="top", ha="center", fontsize=12)
    steps.set(xlim=(-0.6, 21.4), ylim=(4.5, -1))
    steps.set_axis_off()
    steps.set_title(f"{total} trained tokens in the step (grey: not trained)", fontsize=13, loc="left")
    owners = [rank for rank, count in enumerate(counts) for _ in range(count)]
    bars = (
        (law, [1 / total] * total, "the law: every trained token weighs the same"),
        (means, [1 / (size * counts[rank]) for rank in owners], "a mean of the ranks' means: few tokens weigh more"),
    )
    for axes, weights, title in bars:
        axes.bar(range(total), weights, color=[RANKS[rank] for rank in owners])
        axes.axhline(1 / total, color="#444444", lw=1, ls="--")
        axes.set_title(title, fontsize=11, loc="left")
        axes.set(ylim=(0, 1.15 / (size * min(counts))), xlabel="trained token", ylabel="weight in the gradient")
        axes.set_xticks([])
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def _cell(axes, x: float, y: float, color: str, text: str) -> None:
    axes.add_patch(Rectangle((x, y), 1, 1, facecolor=color, edgecolor="white", lw=1))
    axes.text(
        x + 0.5, y + 0.5, text, ha="center", va="center", fontsize=9, color="#555" if color == PADDING else "white"
    )


def _frame(axes, width: int, height: int) -> None:
    axes.set(xlim=(0, width), ylim=(height, 0), aspect="equal")
    axes.set_axis_off()


def _owner_label(split: HeadSplit, rank: int) -> str:
    start, stop = split.key_value[rank]
    names = ", ".join(f"kv{head}" for head in range(start, stop))
    return f"rank {rank}: {split.query_count(rank)} query heads, reads {names}"


def _box(axes, x: float, y: float, text: str, color: str) -> None:
    axes.add_patch(Rectangle((x - 0.4, y), 0.8, 0.8, facecolor=color, edgecolor="none"))
    axes.text(x, y + 0.4, text, ha="center", va="center", color="white", fontsize=13, weight="bold")


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    draw_exchange(FOLDER / "exchange.png")
    draw_heads(FOLDER / "heads.png")
    draw_packed_row(FOLDER / "packed_row.png")
    draw_gradient_law(FOLDER / "gradient_law.png")
