"""What a query of a compressed layer sees, on its way to attention, and how its indexer is compared with attention."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from ...attention.call import AttentionCall, KeySelection
from ...attention.compressed import WindowAndEntries
from ...attention.explain import note_selection
from ...attention.indexed import gather_tokens
from ...attention.side_inputs import validate_side_inputs
from ...losses.indexer_kl import attention_target
from ...parallel.shard import SequenceShard
from .indexer_objective import IndexerObjective, divergence, found, sampled


class CompressedMask(KeySelection):
    """The mask of a call, once the compressor has run.

    Attributes:
        facts ([`WindowAndEntries`]): who sees what.
        objective ([`IndexerObjective`], *optional*): what the indexer is trained for.
        scores (`Callable`, *optional*): from queries (`slice`) to the scores that its indexer gives all entries.
        picks (`torch.Tensor` of shape `(B, t, k)`, *optional*): what the indexer picked; -1 is none.
    """

    facts: WindowAndEntries
    objective: IndexerObjective | None = None
    scores: Callable[[slice], torch.Tensor] | None = None
    picks: torch.Tensor | None = None

    def attend(self, call: AttentionCall, shard: SequenceShard) -> torch.Tensor:
        """See [`KeySelection.attend`]."""
        validate_side_inputs(call, type(call.module).__name__)
        shard.readers.add(id(call.module))
        facts, rule = self.facts, f"causal, window of {self.facts.window:,} tokens"
        if facts.table.ends.shape[1]:
            many = "all" if facts.picks is None else f"{facts.picks.shape[-1]:,} picked"
            rule += f" and {many} entries of {facts.table.width:,} tokens each"
        note_selection(shard, rule, _numbers_gathered(call.module, facts) / (shard.size * shard.local_len))
        output = facts.attend(call)
        if self.objective is None or self.scores is None or self.picks is None:
            return output
        compare = partial(self._compare, call, self.objective, self.scores, self.picks)
        return self.objective.added(call, output, facts.table.width - 1, compare)

    def _compare(self, call, objective: IndexerObjective, scores_of: Callable, picks, queries: slice):
        """See [`IndexerObjective.added`]."""
        rows, table = self.facts.rows, self.facts.table
        query, entries = call.query[:, :, queries], call.key[:, :, call.key.shape[2] - table.ends.shape[1] :]
        scaling = call.query.shape[-1] ** -0.5 if call.scaling is None else call.scaling
        seen, chosen = rows.sees_entries(queries, table), picks[:, queries]
        few = sampled(queries, call.query.shape[2], query.device)
        everything = attention_target(query[:, :, few], entries, seen[:, few], scaling)
        held = torch.where(chosen[:, few] >= 0, everything.gather(2, chosen[:, few].clamp(min=0)), 0.0).sum()
        scores = scores_of(queries)
        if objective.is_dense:
            part = divergence(query, entries, scores, seen, scaling)
        else:
            index = chosen.clamp(min=0)
            keys = gather_tokens(entries, index[:, None])
            part = divergence(query, keys, scores.gather(2, index), chosen >= 0, scaling)
        return part, found(part, seen, held, everything)


def _numbers_gathered(module: torch.nn.Module, facts: WindowAndEntries) -> int:
    """What all ranks together send each other for a row: last tokens, and entries."""
    shard, entries = facts.rows.shard, facts.table.ends.shape[1]
    tails = lambda reach, width: shard.size * min(reach, shard.local_len) * width
    numbers = tails(facts.window - 1, module.head_dim)
    compressor = module.compressor
    for part in () if compressor is None else (compressor, getattr(compressor, "indexer", None)):
        if part is not None:
            numbers += tails(reach_of(part), 2 * part.kv_proj.out_features) + entries * part.head_dim
    return numbers


def reach_of(module: torch.nn.Module) -> int:
    """How many tokens before a window's last one its entry is made of."""
    overlaps = module.kv_proj.out_features == 2 * module.head_dim
    return (2 if overlaps else 1) * module.compress_rate - 1
