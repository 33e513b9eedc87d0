"""Which scores a contrastive loss is made of, and which of them are no negatives because their texts are the same.

Columns are numbered as a batch has them: 0 the queries, 1 their positives, from 2 on hard negatives. Pair `i` is row
`i` of all columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch


QUERY, POSITIVE = 0, 1


class Interaction(NamedTuple):
    """Scores of the rows of one column with the candidates of another.

    Logits are `(scale + others) * s` between different pairs and `(scale + own) * s` within one pair; `own=None`
    leaves the scores within a pair out. `others` and `own` above 0 are hardness, through which no gradient flows.
    """

    row: int
    column: int
    others: float
    own: float | None


@dataclass(frozen=True, kw_only=True)
class ContrastiveRule:
    """What `MultipleNegativesRankingLoss` of sentence-transformers calls by the same names; see there."""

    directions: tuple[str, ...] = ("query_to_doc",)
    partition_mode: str = "joint"
    hardness_mode: str | None = None
    hardness_strength: float = 0.0

    @property
    def needs_queries(self) -> bool:
        """Whether queries are candidates, and so must be known to all ranks."""
        return bool({"query_to_query", "doc_to_query"} & set(self.directions))

    def softmaxes(self, num_columns: int) -> list[list[Interaction]]:
        """The interactions that share a softmax, one list for each softmax of a row."""
        strength = self.hardness_strength
        others_of = {None: 0.0, "in_batch_negatives": strength, "hard_negatives": 0.0, "all_negatives": strength}
        own_of = {None: 0.0, "in_batch_negatives": 0.0, "hard_negatives": strength, "all_negatives": strength}
        others, own = others_of[self.hardness_mode], own_of[self.hardness_mode]
        documents = range(POSITIVE, num_columns)
        known = {
            "query_to_doc": [Interaction(QUERY, k, others, own if k > POSITIVE else 0.0) for k in documents],
            "query_to_query": [Interaction(QUERY, QUERY, 0.0, None)],
            "doc_to_query": [Interaction(POSITIVE, QUERY, 0.0, 0.0)],
            "doc_to_doc": [Interaction(POSITIVE, k, 0.0, None) for k in documents],
        }
        chosen = [known[direction] for direction in dict.fromkeys(self.directions)]
        return {"per_direction": chosen, "joint": [sum(chosen, [])]}[self.partition_mode]


class Duplicates:
    """Candidates that are no negatives, found by their texts.

    Two pairs are the same if their queries are the same text or their positives are. A query or a positive of a pair
    that is the same as pair `i` is no negative of pair `i`, in any direction. A hard negative that is the same text as
    the positive of pair `i` is none either, its own included. The positive of a pair always stays.

    Args:
        hashes (`torch.Tensor` of shape `(C, N)`): one integer a text, for all columns and the pairs of all ranks.

    Memory: `O(C N)`. A tile is compared only where both its rows and its candidates hold a text that occurs twice.
    """

    def __init__(self, hashes: torch.Tensor) -> None:
        self.hashes = hashes
        query, positive, *negatives = hashes
        twice = _occurs_again(query) | _occurs_again(positive)
        self._rows = [twice, twice, *(torch.isin(positive, negative) for negative in negatives)]
        self._candidates = [twice, twice, *(torch.isin(negative, positive) for negative in negatives)]
        self._rows, self._candidates = ([_count_before(flags) for flags in x] for x in (self._rows, self._candidates))

    def mask(self, column: int, rows: slice, candidates: slice) -> torch.Tensor | None:
        """`(rows, candidates)`, true where a candidate of `column` is no negative; `None` if there is none."""
        for counts, part in ((self._rows, rows), (self._candidates, candidates)):
            if counts[column][part.start] == counts[column][part.stop]:
                return None

        def same(row_column: int, candidate_column: int) -> torch.Tensor:
            return self.hashes[row_column, rows, None] == self.hashes[candidate_column, candidates]

        if column > POSITIVE:
            return same(POSITIVE, column)
        return same(QUERY, QUERY).logical_or_(same(POSITIVE, POSITIVE))


def _occurs_again(hashes: torch.Tensor) -> torch.Tensor:
    _, places, counts = hashes.unique(return_inverse=True, return_counts=True)
    return (counts > 1)[places]


def _count_before(flags: torch.Tensor) -> list[int]:
    return [0, *flags.cumsum(0).tolist()]
