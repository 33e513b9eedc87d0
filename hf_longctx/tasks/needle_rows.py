"""Rows with a number in them and a question for it, later: how far apart they fit, and how many are repeated."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import torch


DIGITS = 5
# Logits and their targets, a piece of a row at a time.
Arm = Callable[[torch.Tensor], Iterator[tuple[torch.Tensor, torch.Tensor]]]


def needle_row(
    tokenizer: Any, haystack: torch.Tensor, tokens: int, distance: int, seed: int
) -> tuple[torch.Tensor, int]:
    """A row with a number in it and a question for it `distance` tokens later.

    Args:
        tokenizer: a callable of transformers' interface.
        haystack (`torch.Tensor` of shape `(n,)`): tokens around the needle, `tokens` or more.
        tokens (`int`): of the row.
        distance (`int`): from the end of the needle to the end of the row, as [`needle_distances`] chooses it.
        seed (`int`): of the number.

    Returns:
        The row, `(1, tokens)`, and how many of its last tokens answer.

    Raises:
        ValueError: the row has no room for the needle, or the distance none for the question.
    """
    needle, answered, count = _parts(tokenizer, seed)
    between = distance - len(answered)
    before = tokens - len(needle) - distance
    if between < 0 or before < 1:
        raise ValueError(
            f"`distance` ({distance}) must be from {len(answered)}, the tokens of a question, to "
            f"{tokens - len(needle) - 1}, which leave room for the needle in {tokens} tokens: choose one of these."
        )
    parts = (haystack[:before], needle, haystack[before : before + between], answered)
    return torch.cat(parts)[None], count


def needle_distances(tokenizer: Any, window: int, chunk_tokens: int, tokens: int, count: int) -> list[int]:
    """Within the window, just beyond it, and as far back as a row goes, in tokens.

    Args:
        tokenizer: a callable of transformers' interface.
        window, chunk_tokens (`int`): of the model.
        tokens (`int`): of a row.
        count (`int`): needles for each distance; their seeds are 0 to `count - 1`.

    Raises:
        ValueError: the tokenizer cannot write numbers, or no needle beyond the window fits into a row.
    """
    parts = [_parts(tokenizer, seed) for seed in range(count)]
    needle = max(len(part[0]) for part in parts)
    question = max(len(part[1]) for part in parts)
    farthest, beyond = tokens - needle - 1, max(window + 1, question)
    if farthest < beyond:
        raise ValueError(
            f"`--row_tokens` ({tokens}) has no room for a needle of {needle} tokens that is asked for beyond the "
            f"window ({window}): make it {beyond + needle + 1} or more, or measure `--by position` alone."
        )
    wanted = (window // 2, min(2 * window, (window + tokens) // 2), tokens - chunk_tokens // 2)
    return sorted({min(max(distance, question), farthest) for distance in wanted})


def _parts(tokenizer: Any, seed: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Tokens of the needle, those of the question with its answer, and how many of the latter answer."""
    key = "".join(random.Random(seed).choice("0123456789") for _ in range(DIGITS))
    needle = _ids(tokenizer, f"\nThe pass key is {key}. Remember it.\n")
    question, whole = "\nWhat is the pass key? The pass key is", f"\nWhat is the pass key? The pass key is {key}"
    answered = _ids(tokenizer, whole)
    count = len(answered) - len(_ids(tokenizer, question))
    written = "".join(tokenizer.decode(answered[-count:].tolist()).split()) if count > 0 else ""
    if written != key:
        raise ValueError(
            f"the tokenizer does not keep the number of a needle: {key} comes back as {written!r}, so nothing could "
            "be recalled; measure `--by position` alone."
        )
    return needle, answered, count


def _ids(tokenizer: Any, text: str) -> torch.Tensor:
    return torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.long)


def needle_recall(
    arms: dict[str, Arm],
    tokenizer: Any,
    haystack: torch.Tensor,
    tokens: int,
    distances: list[int],
    count: int,
    progress: Callable[[str], None] = lambda what: None,
) -> dict[str, list[float]]:
    """Share of numbers that each arm repeats token by token, asked `distances` tokens later.

    `progress` is called with what is done next.
    """
    found: dict[str, list[float]] = {name: [] for name in arms}
    for distance in distances:
        rows = [needle_row(tokenizer, haystack.roll(-97 * seed), tokens, distance, seed) for seed in range(count)]
        for name, arm in arms.items():
            progress(f"{name}: numbers asked for {distance:,} tokens later")
            found[name].append(sum(repeats(arm, row, answer) for row, answer in rows) / count)
    return found


def repeats(arm: Arm, row: torch.Tensor, answer: int) -> bool:
    """Whether each of a row's last `answer` tokens is the likeliest."""
    right = torch.cat([logits.argmax(-1) == targets for logits, targets in arm(row)], 1)
    return bool(right[0, -answer:].all())
