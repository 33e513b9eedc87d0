"""Attention to a window of tokens and to compressed entries of the tokens before it, in one softmax.

What: DeepSeek-V4's layers attend to the last tokens and to entries that each stand for a window of `m` tokens: to all
of them (heavily compressed) or to those that an indexer picked (compressed sparse). transformers runs both under a
dense `T x (T + T/m)` bias. Here a block of queries meets the tokens of its window and its entries, and is computed
again in the backward.

How: [`EntryTable`] says where the windows of whole rows end. A window belongs to one document and is counted from its
first token; the rank of its last token computes its entry; every rank then holds all of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.utils.checkpoint import checkpoint

from ..parallel.segments import PAD_SEGMENT
from ..parallel.shard import SequenceShard
from .call import AttentionCall
from .drawn_dropout import draw_seed, drop_weights
from .indexed import QUERY_BLOCK


@dataclass(frozen=True, eq=False)
class EntryTable:
    """The compressed entries of whole rows, in the order in which ranks hold them.

    Args:
        ends (`torch.Tensor` of shape `(B, P * n)`): which token of the row is the last of each window; -1 for the
            entries that make ranks alike. `n` is the same on every rank.
        documents (`torch.Tensor` of shape `(B, P * n)`): the document of each.
        positions (`torch.Tensor` of shape `(B, P * n)`): where its last token stands in its document.
        mine (`slice`): the entries of this rank.
        width (`int`): tokens of a window.
    """

    ends: torch.Tensor
    documents: torch.Tensor
    positions: torch.Tensor
    mine: slice
    width: int

    @classmethod
    def of_rows(cls, rows: RowsOfDocuments, width: int) -> EntryTable:
        """The entries of windows of `width` tokens; computed alike on every rank, from the documents alone."""
        derived = rows.shard.derived
        if ("entries", width) not in derived:
            derived["entries", width] = cls._read(rows, width)
        return derived["entries", width]

    @classmethod
    def none(cls, rows: RowsOfDocuments) -> EntryTable:
        """No entries: of layers that see their window alone."""
        nothing = rows.documents[:, :0]
        return cls(nothing, nothing, nothing, slice(0, 0), 1)

    @classmethod
    def _read(cls, rows: RowsOfDocuments, width: int) -> EntryTable:
        shard, documents = rows.shard, rows.documents
        is_last = ((rows.positions + 1) % width == 0) & (documents != PAD_SEGMENT)
        by_rank = is_last.unflatten(1, (shard.size, shard.local_len))
        most = max(int(by_rank.sum(-1).max()), 1)  # one at least, so that every parameter takes part in the backward
        order = (~by_rank).to(torch.int8).sort(dim=-1, stable=True).indices[..., :most]
        most = order.shape[-1]
        found = by_rank.gather(2, order)
        first = torch.arange(shard.size, device=order.device)[:, None] * shard.local_len
        ends = torch.where(found, order + first, -1).flatten(1)
        pick = lambda facts: facts.gather(1, ends.clamp(min=0))
        mine = slice(shard.rank * most, (shard.rank + 1) * most)
        return cls(ends, pick(documents), pick(rows.positions), mine, width)


@dataclass(frozen=True, eq=False)
class RowsOfDocuments:
    """The document of every token of whole rows, and where it stands in it.

    Args:
        shard ([`SequenceShard`]): of the rows.
        documents, positions (`torch.Tensor` of shape `(B, P * t)`): -1 is padding.
    """

    shard: SequenceShard
    documents: torch.Tensor
    positions: torch.Tensor

    @classmethod
    def of_shard(cls, shard: SequenceShard, rows: int, device: torch.device) -> RowsOfDocuments:
        """Read from a shard, once per batch."""
        if "documents" not in shard.derived:
            shard.derived["documents"] = cls._read(shard, rows, device)
        return shard.derived["documents"]

    @classmethod
    def _read(cls, shard: SequenceShard, rows: int, device: torch.device) -> RowsOfDocuments:
        fill = shard.size * shard.local_len - shard.num_tokens
        given = shard.segment_ids
        known = torch.zeros(rows, shard.num_tokens, dtype=torch.int32) if given is None else given.int()
        documents = torch.nn.functional.pad(known.to(device), (0, fill), value=PAD_SEGMENT)
        index = torch.arange(documents.shape[1], device=device)
        begins = torch.nn.functional.pad(documents.diff(dim=1) != 0, (1, 0), value=True)
        return cls(shard, documents, index - torch.where(begins, index, 0).cummax(dim=1).values)

    @property
    def start(self) -> int:
        """Which token of the row is the first of this rank."""
        return self.shard.rank * self.shard.local_len

    def sees_entries(self, queries: slice, table: EntryTable) -> torch.Tensor:
        """Which entries my queries may see, boolean of shape `(B, queries, entries)`: windows that end before them."""
        places = torch.arange(queries.start, queries.stop, device=self.documents.device) + self.start
        ends, mine = table.ends[:, None], self.documents[:, places, None]
        return (ends >= 0) & (ends <= places[:, None]) & (table.documents[:, None] == mine)

    def sees_tokens(self, queries: slice, window: int) -> torch.Tensor:
        """Which of the `window - 1` tokens before the first query and of the queries each query sees.

        Returns:
            boolean of shape `(B, queries, window - 1 + queries)`.
        """
        device = self.documents.device
        places = torch.arange(queries.start, queries.stop, device=device) + self.start
        keys = torch.arange(queries.start - window + 1, queries.stop, device=device) + self.start
        distance = places[:, None] - keys
        theirs, mine = self.documents[:, keys.clamp(min=0)][:, None], self.documents[:, places, None]
        return (distance >= 0) & (distance < window) & (keys >= 0) & (theirs == mine)


@dataclass(frozen=True, eq=False)
class WindowAndEntries:
    """Stands for the mask of a layer whose keys are `window - 1 + t` tokens and then the entries of all ranks.

    Args:
        rows ([`RowsOfDocuments`]): of the batch.
        table ([`EntryTable`]): of the entries.
        window (`int`): tokens that a query sees, itself among them.
        picks (`torch.Tensor` of shape `(B, t, k)`, *optional*): the entries that each query picked, -1 for none;
            `None` if it sees all that end before it.
    """

    rows: RowsOfDocuments
    table: EntryTable
    window: int
    picks: torch.Tensor | None

    def attend(self, call: AttentionCall) -> torch.Tensor:
        """Attention of my tokens.

        Args:
            call ([`AttentionCall`]): `t` queries of all heads, one key head with these keys, which are the values too;
                `s_aux`, a logit a head without a value.

        Returns:
            `torch.Tensor` of shape `(B, t, N, H)`.

        Communication: none. Memory: one block of queries against its window and entries.
        """
        tokens, outputs = call.query.shape[2], []
        seed = draw_seed() if call.dropout else 0
        before, sinks = self.window - 1, call.per_head.get("s_aux")
        keys, entries = call.key[:, 0].split([before + tokens, call.key.shape[2] - before - tokens], dim=1)
        # Cut once: in the backward, a slice for every block would be as large as the row each time.
        queries_of_blocks, keys_of_blocks = call.query.split(QUERY_BLOCK, dim=2), keys.split(QUERY_BLOCK, dim=1)
        more = -(-before // QUERY_BLOCK) + 1
        for index, query in enumerate(queries_of_blocks):
            queries = slice(index * QUERY_BLOCK, index * QUERY_BLOCK + query.shape[2])
            near = keys_of_blocks[index : index + more]
            inputs = self, call, query, near, entries, sinks, queries, seed
            if torch.is_grad_enabled() and tokens > QUERY_BLOCK:
                outputs.append(checkpoint(_attend_block, *inputs, use_reentrant=False, preserve_rng_state=False))
            else:
                outputs.append(_attend_block(*inputs))
        return torch.cat(outputs, dim=1)


def _attend_block(facts: WindowAndEntries, call, query, near, entries, sinks, queries, seed: int) -> torch.Tensor:
    """One block of queries; everything that is as large as their keys is made in here."""
    rows, tokens = len(query), query.shape[2]
    near = torch.cat(near, dim=1)[:, : facts.window - 1 + tokens]
    seen = facts.rows.sees_tokens(queries, facts.window)
    picks = None if facts.picks is None else facts.picks[:, queries]
    visible = facts.rows.sees_entries(queries, facts.table) if picks is None else picks >= 0
    scores = [torch.einsum("bnqh,bkh->bnqk", query, near)]
    if picks is None:
        scores.append(torch.einsum("bnqh,bkh->bnqk", query, entries))
    else:
        flat = picks.clamp(min=0).flatten(1)[..., None].expand(-1, -1, entries.shape[-1])
        entries = entries.gather(1, flat).view(rows, tokens, -1, entries.shape[-1])
        scores.append(torch.einsum("bnqh,bqkh->bnqk", query, entries))
    scaling = query.shape[-1] ** -0.5 if call.scaling is None else call.scaling
    scores = torch.cat(scores, dim=-1) * scaling
    mask = torch.cat([seen.expand(rows, -1, -1), visible.expand(rows, -1, -1)], dim=-1)[:, None]
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(scores.dtype).view(1, -1, 1, 1).expand(rows, -1, tokens, 1)], dim=-1)
    weights = torch.where(mask, scores.softmax(dim=-1)[..., : mask.shape[-1]], 0.0).to(query.dtype)
    if call.dropout:
        weights = _dropped(weights, facts, picks, queries, seed, call.dropout)
    first, second = weights.split([near.shape[1], mask.shape[-1] - near.shape[1]], dim=-1)
    output = torch.einsum("bnqk,bkh->bqnh", first, near)
    rest = "bnqk,bkh->bqnh" if picks is None else "bnqk,bqkh->bqnh"
    return output + torch.einsum(rest, second, entries)


def _dropped(weights, facts: WindowAndEntries, picks, queries, seed: int, dropout: float) -> torch.Tensor:
    rows, heads, tokens, _ = weights.shape
    row, head, place = (torch.arange(size, device=weights.device) for size in (rows, heads, tokens))
    place = place + facts.rows.start + queries.start
    near = torch.arange(1 - facts.window, tokens, device=weights.device) + facts.rows.start + queries.start
    ends = facts.table.ends[:, None].expand(rows, tokens, -1)
    ends = ends if picks is None else ends.gather(2, picks.clamp(min=0))
    # An entry is known by its last token, however ranks order them; numbers of tokens are below 2**32.
    keys = torch.cat([near.expand(rows, tokens, -1), ends + 2**32], dim=-1)[:, None]
    return drop_weights(weights, dropout, seed, row[:, None, None, None], head[:, None, None], place[:, None], keys)
