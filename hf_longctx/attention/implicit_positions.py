"""Layers that number their tokens themselves or read a row's length, and the numbers that they need instead.

BART and similar models count from 0 whatever they are given. On a share of a row, and across the documents of a packed
one, that is wrong, and `position_ids` never reach their position embedding. What they should look up follows from the
shard: the position in the row, or in the document. [`follow_positions`][hf_longctx.adapters.positions] passes it to
them; without it their attention refuses such rows. Rotary embeddings whose frequencies depend on the length of the row
(`dynamic`, `longrope`), and scales by position, are the same kind; [`follow_lengths`][hf_longctx.adapters.row_lengths]
is for them.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..families import COUNTS_POSITIONS, ROW_COUNT_FIELD, length_rope, scales_by_count
from ..parallel.segments import DOCUMENT_BOUND_KEYS, document_lengths, has_documents, positions_of
from ..parallel.shard import SequenceShard


# The keyword that a decoder which follows the shard passes to its attention layers.
FOLLOWED = "positions_follow_shard"
# ... that a model whose rotary embedding, or a layer whose scales, follow the lengths of the shard passes.
LENGTHS_FOLLOWED, SCALES_FOLLOWED = "lengths_follow_shard", "scales_follow_shard"
# ... or one that scales by masked tokens, and has none.
COUNTS_FOLLOWED = "counts_follow_shard"


def local_positions(shard: SequenceShard) -> torch.Tensor | None:
    """What a decoder on its own would number this rank's tokens, each document and row from 0.

    Returns:
        `torch.Tensor` of shape `(t,)` if rows are one document each, else `(B, t)`; 0 for the tokens that make rows
        divisible. `None` if counting from 0 is right.
    """
    segments = shard.segment_ids
    if segments is not None and packs_documents(shard):
        return local_share(shard, positions_of(segments, shard.num_tokens, segments.device))
    return local_share(shard, torch.arange(shard.num_tokens)) if shard.size > 1 else None


def local_lengths(shard: SequenceShard) -> torch.Tensor | None:
    """The length that each of this rank's tokens would see in one process that holds its document and no other.

    Returns:
        `torch.Tensor` of shape `(B, t)` for rows of several documents, 0 for the tokens that make rows divisible;
        otherwise `None`, and all see `shard.num_positions`.
    """
    if not packs_documents(shard):
        return None
    lengths = shard.document_lengths
    return local_share(shard, document_lengths(shard.segment_ids) if lengths is None else lengths)


def local_share(shard: SequenceShard, whole: torch.Tensor) -> torch.Tensor:
    """This rank's share of numbers of whole rows."""
    whole = torch.nn.functional.pad(whole, (0, shard.size * shard.local_len - shard.num_tokens))
    return whole[..., shard.rank * shard.local_len :][..., : shard.local_len]


def longest_document(shard: SequenceShard) -> int:
    """Tokens of the longest document of the whole rows; padding counts as one."""
    if shard.segment_ids is None or not packs_documents(shard):
        return shard.num_tokens
    return max(int(row.unique_consecutive(return_counts=True)[1].max()) for row in shard.segment_ids)


def validate_positions(module: torch.nn.Module, shard: SequenceShard, extras: Mapping[str, object]) -> None:
    """Refuse an attention layer whose model counted its tokens where it may not.

    Raises:
        NotImplementedError: it is one of those models, and no adapter has told it what to count.
    """
    if shard.size == 1 and not packs_documents(shard):
        return
    config = getattr(module, "config", None)
    kind = getattr(config, "model_type", None)
    if kind in COUNTS_POSITIONS and FOLLOWED not in extras:
        raise NotImplementedError(
            f"a decoder of type `{kind}` numbers its tokens itself, from 0 on every rank and across documents: build "
            "one of our trainers, or call `hf_longctx.adapters.positions.follow_positions(model)` before the "
            "first batch of a loop of your own."
        )
    rope = length_rope(config)
    if rope is not None and LENGTHS_FOLLOWED not in extras and _reach(shard, extras) > rope[1]:
        raise NotImplementedError(
            f"the rotary embedding of `{kind}` ({rope[0]!r}) takes other frequencies for rows past {rope[1]:,} "
            "tokens, and a rank sees its share of a row and a packed document its neighbours: call "
            "`hf_longctx.adapt(model, mesh)` before the first batch of a loop of your own, or build one of our "
            "trainers."
        )
    if getattr(config, ROW_COUNT_FIELD, False) and COUNTS_FOLLOWED not in extras:
        raise NotImplementedError(
            f"`{ROW_COUNT_FIELD}` (True) scales the embeddings of `{kind}` by how many tokens of the row are masked, "
            "of which a rank sees its share and a packed document its neighbours': call `hf_longctx.adapt(model, "
            "mesh)` before the first batch of a loop of your own, which lets rows without masked tokens pass."
        )
    if scales_by_count(module) and SCALES_FOLLOWED not in extras and shard.num_tokens >= module.floor_scale:
        raise NotImplementedError(
            f"an attention layer of `{kind}` scales its queries by a position that it counts itself, and rows have "
            f"{shard.num_tokens:,} tokens, from `floor_scale` ({module.floor_scale:,}) on not all scaled alike: call "
            "`hf_longctx.adapt(model, mesh)` before the first batch of a loop of your own, or build one of our "
            "trainers."
        )


def _reach(shard: SequenceShard, extras: Mapping[str, object]) -> int:
    """One more than the largest position of the whole rows."""
    positions = extras.get("position_ids")
    if shard.num_positions is not None:
        return shard.num_positions
    if isinstance(positions, torch.Tensor):
        return int(positions.max()) + 1
    has_bounds = any(extras.get(name) is not None for name in DOCUMENT_BOUND_KEYS)
    return shard.num_tokens if has_bounds else longest_document(shard)


def packs_documents(shard: SequenceShard) -> bool:
    """Whether a row holds several documents."""
    return has_documents(shard.segment_ids)
