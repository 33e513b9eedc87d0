"""What learning while reading gives: loss by position, and recall of a needle, in four arms.

The arms are full attention (the base model), a window alone (no inner steps), TTT, and TTT without meta-learning
(inner steps in a model that was never trained for them). Recall beyond the window is what TTT does not give: it is
measured beside full attention, and is to be expected near chance.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ..ttt.fast_model import TTTForCausalLM
from ..ttt.inner import token_losses


FULL, WINDOW, TTT, UNTRAINED = "full attention", "window only", "TTT", "TTT without meta-learning"
MEASURES = ("position", "needle")
DIGITS = 5
# Logits and their targets, a piece of a row at a time.
Arm = Callable[[torch.Tensor], Iterator[tuple[torch.Tensor, torch.Tensor]]]


def make_arms(model: TTTForCausalLM, base: Any = None) -> dict[str, Arm]:
    """The arms by name; the two of the base model only where there is one."""
    arms: dict[str, Arm] = {
        WINDOW: lambda ids: model.read_logits(ids, learn=False),
        TTT: lambda ids: model.read_logits(ids),
    }
    if base is not None:
        arms = {FULL: _full_logits(base), **arms, UNTRAINED: _untrained(base, model)}
    return arms


def _full_logits(base: Any) -> Arm:
    @torch.no_grad()
    def run(ids: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        yield base(ids, use_cache=False).logits[:, :-1], ids[:, 1:]

    return run


def _untrained(base: Any, model: TTTForCausalLM) -> Arm:
    fresh = TTTForCausalLM.from_base(copy.deepcopy(base), model.settings).to(base.device).eval()
    return lambda ids: fresh.read_logits(ids)


def losses_by_position(arms: dict[str, Arm], rows: list[torch.Tensor], part_tokens: int) -> dict[str, list[float]]:
    """Mean loss of each arm in each part of `part_tokens` tokens, over rows of one length."""
    found: dict[str, list[float]] = {}
    for name, arm in arms.items():
        each = [torch.cat([token_losses(*pair) for pair in arm(row)], 1)[0].double() for row in rows]
        parts = [part.mean() for part in torch.stack(each).mean(0).split(part_tokens)]
        found[name] = [float(part) for part in parts]
    return found


def needle_row(
    tokenizer: Any, haystack: torch.Tensor, tokens: int, distance: int, seed: int
) -> tuple[torch.Tensor, int]:
    """A row with a number in it and a question for it `distance` tokens later; how many of its last tokens answer."""
    key = "".join(random.Random(seed).choice("0123456789") for _ in range(DIGITS))
    needle = _ids(tokenizer, f"\nThe pass key is {key}. Remember it.\n")
    question, whole = "\nWhat is the pass key? The pass key is", f"\nWhat is the pass key? The pass key is {key}"
    asked, answered = _ids(tokenizer, question), _ids(tokenizer, whole)
    count = len(answered) - len(asked)
    between = max(distance - len(answered), 0)
    before = max(tokens - len(needle) - between - len(answered), 1)
    parts = (haystack[:before], needle, haystack[before : before + between], answered)
    return torch.cat(parts)[None], count


def _ids(tokenizer: Any, text: str) -> torch.Tensor:
    return torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])


def needle_recall(
    arms: dict[str, Arm], tokenizer: Any, haystack: torch.Tensor, tokens: int, distances: list[int], count: int
) -> dict[str, list[float]]:
    """Share of numbers that each arm repeats token by token, asked `distances` tokens later."""
    found: dict[str, list[float]] = {name: [] for name in arms}
    for distance in distances:
        rows = [needle_row(tokenizer, haystack.roll(-97 * seed), tokens, distance, seed) for seed in range(count)]
        for name, arm in arms.items():
            found[name].append(sum(_repeats(arm, row, answer) for row, answer in rows) / count)
    return found


def _repeats(arm: Arm, row: torch.Tensor, answer: int) -> bool:
    right = torch.cat([logits.argmax(-1) == targets for logits, targets in arm(row)], 1)
    return bool(right[0, -answer:].all())
