"""One integer a text, equal for equal texts, from the token ids that a batch already has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from .flat_rows import plain_ids


# The constants of SplitMix64, as the signed integers that torch knows.
_GOLDEN, _FIRST, _SECOND = 0x9E3779B97F4A7C15 - 2**64, 0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64


def text_hashes(features: Mapping[str, Any]) -> torch.Tensor:
    """A 64-bit hash of every text: the sum over its tokens of a random number for token and place.

    Args:
        features (`Mapping[str, Any]`):
            One column as sentence-transformers hands it to a loss: `input_ids (n, T)` with `attention_mask`, or
            `input_ids` of all texts in a row with their bounds in `cu_seq_lens_q`. An entry `text_hashes` is returned
            as it is.

    Returns:
        `torch.Tensor` of shape `(n,)`, int64: the same in both forms and whichever side is padded. Different texts
        have the same with a probability of `2**-64`.

    Raises:
        ValueError: token ids do not tell what a text is.
    """
    if "text_hashes" in features:
        return features["text_hashes"]
    ids, bounds = plain_ids(features.get("input_ids")), features.get("cu_seq_lens_q")
    # A model leaves its embeddings behind in the batch, which is no input.
    inputs = [key for key, x in features.items() if isinstance(x, torch.Tensor) and x.is_floating_point()]
    inputs = [key for key in inputs if not key.endswith(("embedding", "embeddings"))]
    if ids is None or inputs:
        has = f"`{inputs[0]}`" if inputs else "no `input_ids`"
        raise ValueError(
            f"`mask_duplicates` tells texts by their token ids, but this batch has {has}: set "
            "`mask_duplicates=False`, or add a column `text_hashes` with one integer a row."
        )
    if bounds is None:
        mask = features.get("attention_mask")
        mask = torch.ones_like(ids) if mask is None else mask.ne(0).long()
        return _mix(ids.long() + (mask.cumsum(1) << 32)).mul_(mask).sum(1)
    ids, bounds = ids.reshape(-1).long(), bounds.long()
    if len(ids) != bounds[-1]:
        raise ValueError(
            f"`mask_duplicates` needs all tokens of a text, but `cu_seq_lens_q` ends at {int(bounds[-1])} and "
            f"`input_ids` has {len(ids)} tokens: set `mask_duplicates=False`, or add a column `text_hashes` with one "
            "integer a row."
        )
    text = torch.repeat_interleave(torch.arange(len(bounds) - 1, device=ids.device), bounds.diff())
    place = torch.arange(1, len(ids) + 1, device=ids.device) - bounds[text]
    return ids.new_zeros(len(bounds) - 1).index_add_(0, text, _mix(ids + (place << 32)))


def _mix(x: torch.Tensor) -> torch.Tensor:
    """SplitMix64: one to one, every bit of the result depends on every bit of `x`."""
    x = x + _GOLDEN
    for shift, factor in ((30, _FIRST), (27, _SECOND)):
        x = (x ^ _shift(x, shift)) * factor
    return x ^ _shift(x, 31)


def _shift(x: torch.Tensor, bits: int) -> torch.Tensor:
    """To the right, filled with zeros."""
    return (x >> bits) & (2 ** (64 - bits) - 1)
