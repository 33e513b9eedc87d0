"""Attention to keys that an indexer has picked, one set of them a query.

What: sparse layers score all earlier tokens with a small indexer and attend to the `k` best. transformers runs them
under a dense `T x T` mask. Here a block of queries gathers the keys that it picked and nothing else is computed; the
block is computed again in the backward, so memory grows with the tokens and not with their square.

How: [`RowVisibility`] says which tokens of whole rows a query may see: those before it in its own document. A key that
was picked and that it may not see stays unseen, and `-1` is no key.

Price: each query block holds `queries x k` keys and values for a moment, of some heads or all.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from ..parallel.segments import PAD_SEGMENT
from ..parallel.shard import SequenceShard
from .call import AttentionCall, KeySelection
from .drawn_dropout import draw_seed, drop_weights
from .explain import note_selection
from .side_inputs import validate_side_inputs


# Queries whose keys are gathered at a time.
QUERY_BLOCK = 128
# Numbers that one of the tensors of a block may hold: 256 MiB in float32.
NUMBERS_AT_ONCE = 2**26
# How layers call the keys that they picked.
PICKS = ("indices", "block_indices")


@dataclass(frozen=True, eq=False)
class RowVisibility:
    """Which tokens of whole rows the tokens of one rank may see: those before them, in the same document.

    Args:
        num_tokens (`int`): `T`.
        start (`int`): which token of the row is the first of this rank.
        segments (`torch.Tensor` of shape `(B, T)`, *optional*): the document of every token, -1 for padding.
    """

    num_tokens: int
    start: int
    segments: torch.Tensor | None

    @classmethod
    def of_shard(cls, shard: SequenceShard, device: torch.device) -> RowVisibility:
        """What the rows of a shard let this rank's tokens see."""
        segments = None if shard.segment_ids is None else shard.segment_ids.to(device)
        return cls(shard.num_tokens, shard.rank * shard.local_len, segments)

    def dense(self, queries: slice, device: torch.device) -> torch.Tensor:
        """Boolean of shape `(B, queries, T)`, or `(1, queries, T)` if rows are alike."""
        keys = torch.arange(self.num_tokens, device=device)
        return self.picked(queries, keys.expand(1, queries.stop - queries.start, -1))

    def picked(self, queries: slice, indices: torch.Tensor) -> torch.Tensor:
        """Which of the keys that queries picked they may see.

        Args:
            queries (`slice`): of this rank's tokens.
            indices (`torch.Tensor` of shape `(B, ..., queries, k)`): of tokens of the whole row; -1 is none.

        Returns:
            boolean of the shape of `indices`, with all `B` rows where they differ.
        """
        places = torch.arange(queries.start, queries.stop, device=indices.device) + self.start
        # Those past the end only make rows divisible.
        seen = (indices >= 0) & (indices <= places[:, None]) & (places < self.num_tokens)[:, None]
        if self.segments is None:
            return seen
        chosen = indices.clamp(min=0).long().expand(len(self.segments), *indices.shape[1:])
        theirs = self.segments.gather(1, chosen.flatten(1)).view_as(chosen)
        mine = self.segments[:, places.clamp(max=self.num_tokens - 1)]
        mine = mine.view(len(mine), *[1] * (indices.dim() - 3), -1, 1)
        return seen & (theirs == mine) & (mine != PAD_SEGMENT)


class RowMask(KeySelection):
    """Stands for the mask of a sparse layer on its way to the indexer and to attention.

    Args:
        visibility ([`RowVisibility`]): what it says.
        shard ([`SequenceShard`]): of the rows.

    Attributes:
        is_dense (`bool`): attend to all visible tokens, whatever is picked.
        numbers (`int`): how many were gathered for each token.
        picks (`torch.Tensor` of shape `(B, t, k)`, *optional*): those of a layer that does not pass them to attention.
    """

    is_dense = False
    numbers = 0
    picks: torch.Tensor | None = None

    def __init__(self, visibility: RowVisibility, shard: SequenceShard) -> None:
        self.visibility, self.shard = visibility, shard

    def __getitem__(self, _: object) -> RowMask:
        """Itself: layers drop the dimension of heads for their indexer."""
        return self

    def attend(self, call: AttentionCall, shard: SequenceShard) -> torch.Tensor:
        """See [`KeySelection.attend`]. Raises `NotImplementedError` for other inputs that are not computed here."""
        extras: dict[str, Any] = dict(call.extras)
        picks = [extras.pop(name) for name in PICKS if extras.get(name) is not None]
        validate_side_inputs(replace(call, extras=extras), type(call.module).__name__)
        shard.readers.add(id(call.module))
        chosen = None if self.is_dense else picks[0] if self.picks is None else self.picks
        rule = "causal" if chosen is None else f"causal, {chosen.shape[-1]:,} picked tokens a query"
        note_selection(shard, rule, self.numbers)
        return attend_indexed(call, chosen, self.visibility)


def attend_indexed(
    call: AttentionCall, indices: torch.Tensor | None, visibility: RowVisibility, block: int = QUERY_BLOCK
) -> torch.Tensor:
    """Attention of my tokens to the keys that they picked.

    Args:
        call ([`AttentionCall`]): `t` queries of my tokens and `T` keys of the whole rows, all heads; `s_aux`, a logit
            a head without a value, is computed, and dropout.
        indices (`torch.Tensor` of shape `(B, t, k)`, or `(B, K, t, k)`): the picked tokens of the whole row, for all
            heads or for each key/value head; -1 is none. `None`: all that a query may see.
        visibility ([`RowVisibility`]): which of them a query may see.
        block (`int`, *optional*, defaults to 128): queries at a time.

    Returns:
        `torch.Tensor` of shape `(B, t, N, H_v)`; zero for queries that see nothing.

    Communication: none. Gradient: of query, key, value and sinks; picking has none.
    Memory: the keys and values that one block of queries picked, for as many heads as [`NUMBERS_AT_ONCE`] allows (one
        at least), forward and backward.
    """
    tokens = call.query.shape[2]
    seed = draw_seed() if call.dropout else 0
    if indices is not None and indices.dim() == 3:
        indices = indices[:, None]
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (call.query, call.key, call.value))
    outputs = []
    # Cut once: in the backward, a slice for every block would be as large as the row each time.
    for index, query in enumerate(call.query.unflatten(1, (call.key.shape[1], -1)).split(block, dim=3)):
        queries = slice(index * block, index * block + query.shape[3])
        parts = []
        for groups in _key_heads_at_once(call, indices, queries):
            heads = _of_key_heads(call, query, groups)
            inputs = *heads, indices, visibility, queries, groups, seed, call.dropout
            if needs_grad and tokens > block:
                parts.append(checkpoint(_attend_block, *inputs, use_reentrant=False, preserve_rng_state=False))
            else:
                parts.append(_attend_block(*inputs))
        outputs.append(torch.cat(parts, dim=2))
    return torch.cat(outputs, dim=1)


def queries_at_once(numbers: int) -> int:
    """How many queries are computed at a time if each takes so many numbers."""
    return max(1, min(QUERY_BLOCK, NUMBERS_AT_ONCE // max(numbers, 1)))


def _key_heads_at_once(call: AttentionCall, indices: torch.Tensor | None, queries: slice) -> Iterator[slice]:
    rows, heads, keys, size = call.key.shape
    if indices is None:
        numbers = rows * (queries.stop - queries.start) * keys * call.query.shape[1] // heads
    else:
        numbers = rows * (queries.stop - queries.start) * indices.shape[-1] * (size + call.value.shape[-1])
    count = max(1, NUMBERS_AT_ONCE // max(numbers, 1))
    for start in range(0, heads, count):
        yield slice(start, min(start + count, heads))


def _of_key_heads(call: AttentionCall, query: torch.Tensor, groups: slice) -> tuple:
    """Queries, keys, values and sinks of some key/value heads, and the scale."""
    scaling = call.query.shape[-1] ** -0.5 if call.scaling is None else call.scaling
    sinks = call.per_head.get("s_aux")
    sinks = None if sinks is None else sinks.view(call.key.shape[1], -1)[groups]
    return query[:, groups], call.key[:, groups], call.value[:, groups], sinks, scaling


def _attend_block(query, key, value, sinks, scaling, indices, visibility, queries, groups, seed, dropout):
    """Some heads of a block of queries; everything that is as large as their keys is made in here."""
    if indices is None:
        seen, which, picks = visibility.dense(queries, query.device)[:, None], "gk", None
    else:
        picks = indices[:, groups if indices.shape[1] > 1 else slice(None), queries]
        seen, which = visibility.picked(queries, picks), "gqk"
        key, value = gather_tokens(key, picks), gather_tokens(value, picks)
    scores = torch.einsum(f"bgnqh,b{which}h->bgnqk", query, key) * scaling
    seen = seen[:, :, None]
    # Softmax in float32 or more, then back, as transformers rounds it.
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
    if sinks is not None:
        extra = sinks.to(scores.dtype)[None, :, :, None, None].expand(len(scores), -1, -1, scores.shape[3], 1)
        scores = torch.cat([scores, extra], dim=-1)
    weights = scores.softmax(dim=-1)[..., : seen.shape[-1]]
    weights = torch.where(seen, weights, 0.0).to(query.dtype)
    if dropout:
        weights = _dropped(weights, picks, visibility, queries, groups, seed, dropout)
    output = torch.einsum(f"bgnqk,b{which}h->bgnqh", weights, value)
    return output.flatten(1, 2).transpose(1, 2).contiguous()


def _dropped(weights, picks, visibility, queries, groups, seed: int, dropout: float) -> torch.Tensor:
    device = weights.device
    rows, _, heads, _, keys = weights.shape
    row = torch.arange(rows, device=device)[:, None, None, None, None]
    group = torch.arange(groups.start, groups.stop, device=device)
    head = group[:, None] * heads + torch.arange(heads, device=device)
    place = visibility.start + torch.arange(queries.start, queries.stop, device=device)
    key = torch.arange(keys, device=device) if picks is None else picks[:, :, None]
    return drop_weights(weights, dropout, seed, row, head[:, :, None, None], place[:, None], key)


def gather_tokens(tensor: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """The picked tokens of `(B, K, T, H)`, as `(B, K, queries, k, H)`."""
    rows, groups, _, size = tensor.shape
    flat = indices.clamp(min=0).long().flatten(2)[..., None].expand(-1, groups, -1, size)
    return tensor.gather(2, flat).view(rows, groups, *indices.shape[2:], size)
