"""What the sparse layers of a model train their indexers for while a step runs, and how.

What: `KL(attention || softmax(scores))` of every query, over all keys (dense) or over those that are picked (sparse).
The layers of a model share one [`IndexerObjective`]. While it has weights, each layer computes the divergence of its
queries, a block at a time, and puts its gradient into the backward of its own output; nothing else of the model gets a
gradient from it, since the scores are computed from detached inputs.

Price: attention to the compared keys once more forward, and the indexer's scores twice.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.utils.checkpoint import checkpoint

from ...attention.call import AttentionCall
from ...attention.indexed import QUERY_BLOCK, RowMask, gather_tokens
from ...losses.indexer_kl import attention_target, indexer_divergence, inject_gradient
from ...parallel.segments import PAD_SEGMENT
from ...parallel.shard import SequenceShard


# Queries of a rank and layer for which attention to all keys is computed, to see how much of it the picks hold.
_SAMPLED_QUERIES = 8


class IndexerObjective:
    """The stage, the weight of a query, and what the layers of the last forward found.

    Attributes:
        is_dense (`bool`): layers attend to all keys, and their indexers are compared on all of them.
        weights (`dict[int, float]`): factor of a query's divergence, by the first position in a document that counts;
            empty while no step runs, when layers add nothing.
    """

    def __init__(self) -> None:
        self.is_dense = False
        self.weights: dict[int, float] = {}
        self._found: dict[int, torch.Tensor] = {}

    @property
    def is_active(self) -> bool:
        """Whether layers add the gradient of their indexers to this forward."""
        return bool(self.weights) and torch.is_grad_enabled()

    def added(self, call: AttentionCall, output: torch.Tensor, first: int, compare: Callable) -> torch.Tensor:
        """The output of a layer, with the gradient of its indexer in the backward.

        Args:
            call ([`AttentionCall`]): of the layer.
            output (`torch.Tensor`): of the layer.
            first (`int`): the first position in a document whose query counts.
            compare (`Callable`): from queries (`slice`) to their divergence and to four numbers for the log; see
                [`found`].
        """
        tokens, parts, found = call.query.shape[2], [], []
        for start in range(0, tokens, QUERY_BLOCK):
            part, facts = checkpoint(compare, slice(start, min(start + QUERY_BLOCK, tokens)), use_reentrant=False)
            parts.append(part)
            found.append(facts)
        self._found[id(call.module)] = torch.stack(found).sum(0)
        return inject_gradient(output, torch.stack(parts).sum(), self.weights[first])

    def take_found(self) -> torch.Tensor:
        """The numbers of this rank's layers together, of the forward since the last call; see [`found`]."""
        found, self._found = list(self._found.values()), {}
        return torch.stack(found).sum(0) if found else torch.zeros(4)


class TrainedRowMask(RowMask):
    """The mask of a layer whose token indexer is trained.

    Args:
        objective ([`IndexerObjective`]): of the model.

    Attributes:
        trains (`bool`): this forward adds the gradient of the indexer.
        scores (`Callable`, *optional*): from queries (`slice`) to scores `(B, queries, T)`, by the indexer; `None` for
            a layer that uses the picks of another one, whose attention is no target.
    """

    def __init__(self, *args, objective: IndexerObjective) -> None:
        super().__init__(*args)
        self.objective, self.is_dense, self.trains = objective, objective.is_dense, objective.is_active
        self.scores: Callable[[slice], torch.Tensor] | None = None

    def attend(self, call: AttentionCall, shard: SequenceShard) -> torch.Tensor:
        output = super().attend(call, shard)
        scores_of, picks = self.scores, call.extras.get("indices")
        if scores_of is None or not isinstance(picks, torch.Tensor):
            return output
        scaling = call.query.shape[-1] ** -0.5 if call.scaling is None else call.scaling

        def compare(queries: slice) -> tuple[torch.Tensor, torch.Tensor]:
            query, chosen = call.query[:, :, queries], picks[:, queries].long()
            seen = self.visibility.dense(queries, query.device)
            is_picked = self.visibility.picked(queries, chosen)
            scores = scores_of(queries)
            few = sampled(queries, call.query.shape[2], query.device)
            everything = attention_target(query[:, :, few], call.key, seen[:, few], scaling)
            held = torch.where(is_picked[:, few], everything.gather(2, chosen[:, few]), 0.0).sum()
            if self.is_dense:
                part = divergence(query, call.key, scores, seen, scaling)
            else:
                keys = gather_tokens(call.key, chosen[:, None])
                part = divergence(query, keys, scores.gather(2, chosen), is_picked, scaling)
            return part, found(part, seen, held, everything)

        return self.objective.added(call, output, 0, compare)


def divergence(query, keys, scores, seen, scaling: float) -> torch.Tensor:
    """Of the scores of some queries from their attention to the same keys, added up."""
    target = attention_target(query, keys, seen.expand_as(scores), scaling)
    return indexer_divergence(scores, target, seen)


def sampled(queries: slice, tokens: int, device: torch.device) -> torch.Tensor:
    """Which of some queries are among the few, spread over all `tokens`, of which attention to all keys is known."""
    step = max(tokens // _SAMPLED_QUERIES, 1)
    places = torch.arange(queries.start, queries.stop, device=device)
    return (places % step == step - 1).nonzero().flatten()


def found(part: torch.Tensor, seen: torch.Tensor, held: torch.Tensor, everything: torch.Tensor) -> torch.Tensor:
    """Four numbers for the log, each added up over queries.

    Returns:
        `torch.Tensor` of shape `(4,)`: the divergence; the queries that see a key; the attention to all keys that the
        picks of the sampled queries hold; the sampled queries that see a key.
    """
    numbers = part.detach(), seen.any(dim=-1).sum(), held, everything.sum()
    return torch.stack([number.to(part.dtype) for number in numbers])


def count_queries(segments: torch.Tensor | None, rows: int, num_tokens: int, first: int) -> int:
    """How many tokens of whole rows stand at position `first` of their document or after it.

    Args:
        segments (`torch.Tensor` of shape `(B, T)`, *optional*): the document of every token, -1 for padding.
        rows, num_tokens (`int`): `B` and `T`.
    """
    if segments is None:
        return rows * max(num_tokens - first, 0)
    count = 0
    for row in segments.cpu():
        documents, lengths = row.unique_consecutive(return_counts=True)
        count += int((lengths[documents != PAD_SEGMENT] - first).clamp(min=0).sum())
    return count
