"""What learning while reading gives: loss by position in four arms, and what the arms are.

The arms are full attention (the base model), a window alone (no inner steps), TTT, and TTT without meta-learning
(inner steps in a model that was never trained for them). Recall beyond the window is what TTT does not give: it is
measured beside full attention (`needle_rows.py`), and is to be expected near chance.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ..ttt.fast_model import TTTForCausalLM
from ..ttt.inner import token_losses
from .needle_rows import Arm


FULL, WINDOW, TTT, UNTRAINED = "full attention", "window only", "TTT", "TTT without meta-learning"
MEASURES = ("position", "needle")
MOST_LINES = 16  # of a table by position


def make_arms(model: TTTForCausalLM, base: Any = None) -> dict[str, Arm]:
    """The arms by name; the two of the base model only where there is one."""
    arms: dict[str, Arm] = {
        WINDOW: lambda ids: model.read_logits(ids, learn=False),
        TTT: lambda ids: model.read_logits(ids),
    }
    if base is not None:
        arms = {FULL: _full_logits(base), **arms, UNTRAINED: _untrained(base, model)}
    return arms


def explain_arms(model: TTTForCausalLM, base_name: str | None, base: Any = None) -> dict[str, str]:
    """What each arm of [`make_arms`] is, for a reader of the numbers."""
    settings = model.settings
    step = f"a step after every {settings.chunk_tokens:,} tokens"
    if not settings.inner_learning_rate:
        step += ", of size 0 (`inner_learning_rate`)"
    arms = {WINDOW: f"this model reads with its window of {settings.window:,} tokens, and takes no steps"}
    arms[TTT] = f"this model takes {step}"
    if base is None:
        return arms
    own = getattr(base.config.get_text_config(), "sliding_window", None)
    sees = "attends to the whole row" if own is None else f"has a window of its own, {own:,} tokens"
    arms = {FULL: f"the base model, {base_name}, which {sees}", **arms}
    arms[UNTRAINED] = "the same steps from the base model, with fast weights that nobody trained"
    return arms


def _full_logits(base: Any) -> Arm:
    @torch.no_grad()
    def run(ids: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        yield base(ids, use_cache=False).logits[:, :-1], ids[:, 1:]

    return run


def _untrained(base: Any, model: TTTForCausalLM) -> Arm:
    """Its fast weights are random, and the same in every run."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        fresh = TTTForCausalLM.from_base(copy.deepcopy(base), model.settings).to(base.device).eval()
    return lambda ids: fresh.read_logits(ids)


def losses_by_position(
    arms: dict[str, Arm],
    rows: list[torch.Tensor],
    part_tokens: int,
    progress: Callable[[str], None] = lambda what: None,
) -> dict[str, list[float]]:
    """Mean loss of each arm in each part of `part_tokens` tokens, over rows of one length, `(1, T)` each.

    `progress` is called with what is done next.
    """
    found: dict[str, list[float]] = {}
    for name, arm in arms.items():
        each = []
        for number, row in enumerate(rows, start=1):
            progress(f"{name}: row {number} of {len(rows)}")
            each.append(torch.cat([token_losses(*pair) for pair in arm(row)], 1)[0].double())
        parts = [part.mean() for part in torch.stack(each).mean(0).split(part_tokens)]
        found[name] = [float(part) for part in parts]
    return found


def position_table(found: dict[str, list[float]], part_tokens: int, row_tokens: int) -> Any:
    """Losses by position as a table of at most 80 columns: a line a part, or several parts where there are many.

    Args:
        found (`dict`): of [`losses_by_position`].
        part_tokens, row_tokens (`int`): tokens of a part, and of a row, whose last one has no next token.
    """
    counts = [min(part_tokens, row_tokens - 1 - begin) for begin in range(0, row_tokens - 1, part_tokens)]
    group = -(-len(counts) // MOST_LINES)
    table = arms_table("tokens read", found)
    for begin in range(0, len(counts), group):
        first = begin * part_tokens + 1
        label = f"{first:,} to {first - 1 + sum(counts[begin : begin + group]):,}"
        table.add_row(label, *_means(found, counts, begin, begin + group))
    table.add_section()
    table.add_row("all", *_means(found, counts, 0, len(counts)))
    return table


def _means(found: dict[str, list[float]], counts: list[int], begin: int, end: int) -> list[str]:
    """Means over tokens of parts `begin` to `end`, an arm each."""
    sums = (sum(loss * n for loss, n in zip(losses[begin:end], counts[begin:end])) for losses in found.values())
    return [f"{total / sum(counts[begin:end]):.3f}" for total in sums]


def arms_table(first: str, names: Any) -> Any:
    """An empty table with a column an arm, whose numbers stand below each other."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE, pad_edge=False)
    table.add_column(first, justify="right", no_wrap=True)
    for name in names:
        table.add_column(name, justify="right", max_width=14)
    return table
