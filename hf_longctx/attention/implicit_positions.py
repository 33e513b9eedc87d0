"""Decoders that number their tokens themselves, and the positions that they need instead.

BART and similar models count from 0 whatever they are given. On a share of a row, and across the documents of a packed
one, that is wrong, and `position_ids` never reach their position embedding. What they should look up follows from the
shard: the position in the row, or in the document. [`follow_positions`][hf_longctx.adapters.positions] passes it to
them; without it their attention refuses such rows.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..families import COUNTS_POSITIONS
from ..parallel.segments import has_documents, positions_of
from ..parallel.shard import SequenceShard


# The keyword that a decoder which follows the shard passes to its attention layers.
FOLLOWED = "positions_follow_shard"


def local_positions(shard: SequenceShard) -> torch.Tensor | None:
    """What a decoder on its own would number this rank's tokens, each document and row from 0.

    Returns:
        `torch.Tensor` of shape `(t,)` if rows are one document each, else `(B, t)`; 0 for the tokens that make rows
        divisible. `None` if counting from 0 is right.
    """
    segments = shard.segment_ids
    if segments is not None and packs_documents(shard):
        positions = positions_of(segments, shard.num_tokens, segments.device)
    elif shard.size > 1:
        positions = torch.arange(shard.num_tokens)
    else:
        return None
    padding = shard.size * shard.local_len - shard.num_tokens
    positions = torch.nn.functional.pad(positions, (0, padding))
    return positions[..., shard.rank * shard.local_len :][..., : shard.local_len]


def longest_document(shard: SequenceShard) -> int:
    """Tokens of the longest document of the whole rows; padding counts as one."""
    if shard.segment_ids is None or not packs_documents(shard):
        return shard.num_tokens
    return max(int(row.unique_consecutive(return_counts=True)[1].max()) for row in shard.segment_ids)


def validate_positions(module: torch.nn.Module, shard: SequenceShard, extras: Mapping[str, object]) -> None:
    """Refuse an attention layer whose decoder counted from 0 where it may not.

    Raises:
        NotImplementedError: it is one of those decoders, and got no positions.
    """
    kind = getattr(getattr(module, "config", None), "model_type", None)
    if kind not in COUNTS_POSITIONS or FOLLOWED in extras:
        return
    if shard.size > 1 or packs_documents(shard):
        raise NotImplementedError(
            f"a decoder of type `{kind}` numbers its tokens itself, from 0 on every rank and across documents: build "
            "one of our trainers, or call `hf_longctx.adapters.positions.follow_positions(model)` before the "
            "first batch of a loop of your own."
        )


def packs_documents(shard: SequenceShard) -> bool:
    """Whether a row holds several documents."""
    return has_documents(shard.segment_ids)
