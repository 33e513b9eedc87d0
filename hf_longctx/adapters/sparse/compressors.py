"""Compressors on rows that ranks share, and on packed documents: entries of whole rows, and what an indexer picks.

How: a compressor projects its tokens, gets the `2 m - 1` (`m - 1` where windows do not overlap) projected tokens
before them, computes the entries whose last token is on this rank and gathers those of all ranks.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

from ...attention.compressed import EntryTable, RowsOfDocuments, WindowAndEntries
from ...attention.indexed import QUERY_BLOCK
from ...parallel.gathered import gather_shares, tokens_before
from ..instance_forward import InstancePatch, named_arguments
from .compressed_mask import CompressedMask, reach_of
from .sparse_rows import FIRST_POSITIONS


COMPRESSOR = "compressor"


def compresses(module: torch.nn.Module | None) -> bool:
    """Whether `module` makes entries of windows of tokens: a compressor, or an indexer that has one of its own."""
    return all(hasattr(module, name) for name in ("compress_rate", "gate_proj", "position_bias", "rotary_emb"))


class CompressorPatch(InstancePatch):
    """Entries of whole rows, computed where the last tokens of their windows are."""

    name = COMPRESSOR

    def __init__(self) -> None:
        self.rows: RowsOfDocuments | None = None
        self.mask: CompressedMask | None = None
        self.window = 0

    def call(self, module: torch.nn.Module, own: Callable, *args, **kwargs):
        rows, given = self.rows, named_arguments(module, args, kwargs)
        if rows is None or self.mask is None:
            return own(*args, **kwargs)
        table = EntryTable.of_rows(rows, module.compress_rate)
        entries = _entries(module, rows, table, given["hidden_states"])
        picks = None if getattr(module, "indexer", None) is None else _picks(module.indexer, rows, table, given)
        objective, self.mask.picks = self.mask.objective, picks
        if picks is not None and objective is not None:
            if objective.is_active:
                self.mask.scores = _trained_scores(module.indexer, rows, table, given)
            picks = None if objective.is_dense else picks
        self.mask.facts = WindowAndEntries(rows, table, self.window, picks)
        return entries[:, None], None


def _entries(
    module: torch.nn.Module, rows: RowsOfDocuments, table: EntryTable, hidden_states: torch.Tensor
) -> torch.Tensor:
    """The entries of all ranks, `(B, P * n, H)`, rotated to where their windows begin.

    Gradient: of the hidden states whose windows they are, on whichever rank.
    """
    width, size, shard = module.compress_rate, module.head_dim, rows.shard
    projected = torch.cat([module.kv_proj(hidden_states), module.gate_proj(hidden_states)], dim=-1)
    overlaps, reach = projected.shape[-1] == 4 * size, reach_of(module)
    values, gates = tokens_before(projected, reach, shard).chunk(2, dim=-1)
    ends = table.ends[:, table.mine]
    last = (ends - rows.start + reach).clamp(min=0)
    slots = last[..., None] - width + 1 + torch.arange(width, device=last.device)
    row = torch.arange(len(ends), device=last.device)[:, None, None]
    pick = lambda tensor, index: tensor[row, index.clamp(min=0)]
    bias = module.position_bias
    if not overlaps:
        window, gate = pick(values, slots), pick(gates, slots) + bias
    else:
        # An entry is made of its own window and of the other half of what the window before was projected to.
        has_before = (table.positions[:, table.mine] >= 2 * width - 1)[..., None, None]
        earlier = slots - width
        window = torch.cat([pick(values, earlier)[..., :size] * has_before, pick(values, slots)[..., size:]], dim=2)
        before = torch.where(has_before, pick(gates, earlier)[..., :size] + bias[:, :size], float("-inf"))
        gate = torch.cat([before, pick(gates, slots)[..., size:] + bias[:, size:]], dim=2)
    kind = torch.promote_types(gate.dtype, torch.float32)
    compressed = module.kv_norm((window * gate.softmax(dim=2, dtype=kind).to(window.dtype)).sum(dim=2))
    first = shard.derived[FIRST_POSITIONS].gather(1, (ends - rows.start).clamp(min=0))
    begins = (table.positions[:, table.mine] - width + 1).clamp(min=0) + first
    cos, sin = module.rotary_emb(compressed, position_ids=begins, layer_type=module.rope_layer_type)
    compressed = _rotate(module)(compressed.unsqueeze(1), cos, sin).squeeze(1)
    if shard.size == 1:
        return compressed
    return gather_shares(compressed, shard.group, shard.stopwatch).transpose(0, 1).flatten(1, 2)


@torch.no_grad()
def _picks(indexer: torch.nn.Module, rows: RowsOfDocuments, table: EntryTable, given: dict[str, Any]) -> torch.Tensor:
    """The entries that each of my queries picks, `(B, t, k)`; -1 for none."""
    score, tokens = _scores(indexer, rows, table, given), given["hidden_states"].shape[1]
    count, picks = min(indexer.index_topk, table.ends.shape[1]), []
    for start in range(0, tokens, QUERY_BLOCK):
        queries = slice(start, min(start + QUERY_BLOCK, tokens))
        seen = rows.sees_entries(queries, table)
        best = score(queries).masked_fill(~seen, float("-inf")).topk(count, dim=-1).indices
        picks.append(torch.where(seen.gather(2, best), best, -1))
    return torch.cat(picks, dim=1)


def _scores(
    indexer: torch.nn.Module, rows: RowsOfDocuments, table: EntryTable, given: dict[str, Any]
) -> Callable[[slice], torch.Tensor]:
    """From queries (`slice`) to the scores that an indexer gives all entries, `(B, queries, P * n)`."""
    hidden_states, residual = given["hidden_states"], given["q_residual"]
    keys = _entries(indexer, rows, table, hidden_states)
    cos, sin = indexer.rotary_emb(
        hidden_states, position_ids=given["position_ids"], layer_type=indexer.rope_layer_type
    )

    def score(queries: slice) -> torch.Tensor:
        query = indexer.q_b_proj(residual[:, queries]).unflatten(-1, (-1, indexer.head_dim)).transpose(1, 2)
        query = _rotate(indexer)(query, cos[:, queries], sin[:, queries]).transpose(1, 2)
        return indexer.scorer(query, keys, hidden_states[:, queries])

    return score


def _trained_scores(indexer, rows: RowsOfDocuments, table: EntryTable, given: dict[str, Any]) -> Callable:
    """The same with a gradient to the indexer's parameters, and to nothing else."""
    detached = {name: given[name].detach() for name in ("hidden_states", "q_residual", "position_ids")}
    return _scores(indexer, rows, table, detached)


def _rotate(module: torch.nn.Module) -> Callable:
    """The rotary function of the module's own file."""
    return inspect.unwrap(type(module).forward).__globals__["apply_rotary_pos_emb"]
