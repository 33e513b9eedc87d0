"""A mask that the model made itself, where all it says is which of my tokens are padding.

Some encoders (LayoutLM, MarkupLM) turn the batch's padding mask into numbers of their own, `(B, 1, 1, t)`. On a share
that knows local tokens only, but nothing that the shard does not know for the whole row, so it can be left to the
shard. Any other mask is refused by [`validated`][hf_longctx.attention.packed.validated].
"""

from __future__ import annotations

import torch

from ..parallel.segments import PAD_SEGMENT
from ..parallel.shard import SequenceShard


# transformers writes it as the lowest number of a precision; half of float16's is far below any score.
_FORBIDDEN = -1e4


def without_padding_mask(
    mask: object, is_causal: bool | None, shard: SequenceShard, rows: int
) -> tuple[object, bool | None]:
    """`(None, False)` for a mask that only repeats this share's padding, else both as they are.

    A kernel that gets a mask is not causal as well, so neither is the rule that replaces the mask.
    Communication: none. Price: comparing `B x t` numbers a layer.
    """
    if not isinstance(mask, torch.Tensor) or mask.shape[1:] != (1, 1, shard.local_len):
        return mask, is_causal
    hidden = ~mask if mask.dtype == torch.bool else mask <= _FORBIDDEN
    says_more = mask.dtype != torch.bool and bool(((mask != 0) & ~hidden).any())
    same = not says_more and torch.equal(hidden[:, 0, 0].expand(rows, -1), padding_of_share(shard, rows, mask.device))
    return (None, False) if same else (mask, is_causal)


def padding_of_share(shard: SequenceShard, rows: int, device: torch.device) -> torch.Tensor:
    """Which of my tokens are padding, boolean `(B, t)`; the pad segment added for divisibility is."""
    padding = torch.ones(rows, shard.local_len * shard.size, dtype=torch.bool, device=device)
    segments = shard.segment_ids
    padding[:, : shard.num_tokens] = False if segments is None else segments.to(device) == PAD_SEGMENT
    return padding[:, shard.rank * shard.local_len :][:, : shard.local_len]
