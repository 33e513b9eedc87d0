"""Texts as one flat row without padding, with everything that the model must know about each token."""

from __future__ import annotations

import torch
from transformers import DataCollatorWithFlattening


class FlatCollator(DataCollatorWithFlattening):
    """transformers' flattening of tokenized texts, plus what it drops: token types and character offsets.

    Called with one dict a text, it returns `input_ids` and `position_ids` of shape `(1, T)`, `seq_idx`, and the bounds
    of FlashAttention's convention. `token_type_ids` `(1, T)` are kept where a text has a second part, and
    `offset_mapping` `(T, 2)` where the tokenizer was asked for it.

    Raises on a call:
        ValueError: a text has no token, so that there is nothing to pool.
    """

    def __init__(self) -> None:
        super().__init__(return_seq_idx=True, return_flash_attn_kwargs=True, return_position_ids=True)

    def __call__(self, features, return_tensors=None, separator_id=None):
        empty = [index for index, text in enumerate(features) if len(text["input_ids"]) == 0]
        if empty:
            raise ValueError(
                f"text {empty[0]} of a batch of {len(features)} has no token, and {len(empty) - 1} more: an embedding "
                "needs at least one; remove empty texts from the data."
            )
        batch = super().__call__(features, return_tensors, separator_id)
        types = [kind for text in features for kind in text.get("token_type_ids", ())]
        if any(types):
            batch["token_type_ids"] = torch.tensor([types])
        if "offset_mapping" in features[0]:
            batch["offset_mapping"] = torch.tensor([pair for text in features for pair in text["offset_mapping"]])
        return batch
