"""Takes the marks of a blend off its rows before a collator sees them, and puts them on its batch, token by token."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from .blended_rows import SOURCE_MARKS


class MarkedCollator:
    """Any collator whose batch gets the marks of its rows.

    Args:
        collator (`Callable`): makes one row of a batch of each row, padded where `attention_mask` is 0, or one row of
            all, without padding.

    Raises on a call:
        ValueError: the batch has other tokens than its rows.
    """

    def __init__(self, collator: Callable[[list], dict[str, Any]]) -> None:
        self.collator = collator

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        if not all(isinstance(row, Mapping) and SOURCE_MARKS in row for row in rows):
            return self.collator(list(rows))
        marks = [np.asarray(row[SOURCE_MARKS]) for row in rows]
        batch = self.collator([{key: row[key] for key in row if key != SOURCE_MARKS} for row in rows])
        batch[SOURCE_MARKS] = _place(marks, batch, self.collator)
        return batch


def _place(marks: list[np.ndarray], batch: Mapping[str, Any], collator: object) -> torch.Tensor:
    lengths, tokens = torch.tensor([len(each) for each in marks]), batch["input_ids"]
    placed = torch.zeros(tokens.shape[:2], dtype=torch.int64)
    mask = batch.get("attention_mask")
    is_real = torch.ones_like(placed, dtype=torch.bool) if mask is None else mask.bool()
    is_right = len(placed) == len(marks) and is_real.shape == placed.shape and bool((is_real.sum(1) == lengths).all())
    if not is_right and not (len(placed) == 1 and is_real.shape == placed.shape and is_real.sum() == lengths.sum()):
        name = getattr(collator, "__name__", type(collator).__name__)
        raise ValueError(
            f"`{name}` made a batch of shape {tuple(placed.shape)} from rows of {lengths.tolist()[:8]} tokens, so a "
            "`BlendReport` cannot tell which source a token is of: pad with an `attention_mask`, cut rows before they "
            "are blended, or use `PackingCollator`."
        )
    placed[is_real] = torch.from_numpy(np.concatenate(marks))
    return placed
