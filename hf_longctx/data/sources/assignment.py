"""Assign the rows of a global batch to ranks, so that none waits long for another. Numbers only.

`assign_evenly` gives every rank the same number of rows at nearly the same cost. `RankBudgets` fills all ranks to a
number of tokens each, so they get unequal numbers of rows. Both depend on their arguments only: every rank assigns
the whole batch and keeps its own part.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence


def assign_evenly(costs: Sequence[float], ranks: int) -> list[list[int]]:
    """Assign rows to ranks: equal numbers of rows, nearly equal cost.

    The most expensive row first, each to the rank with the least cost that still takes rows.

    Args:
        costs (`Sequence[float]`): of every row; `ranks` divides their number.
        ranks (`int`): data-parallel ranks.

    Returns:
        `list[list[int]]`: numbers of the rows of every rank, in their order in the batch.
    """
    assert len(costs) % ranks == 0, (len(costs), ranks)
    most = len(costs) // ranks
    shares: list[list[int]] = [[] for _ in range(ranks)]
    loads = [(0.0, rank) for rank in range(ranks)]
    for row in sorted(range(len(costs)), key=lambda row: -costs[row]):
        load, rank = heapq.heappop(loads)
        shares[rank].append(row)
        if len(shares[rank]) < most:
            heapq.heappush(loads, (load + costs[row], rank))
    return [sorted(share) for share in shares]


class RankBudgets:
    """Ranks that each take rows until `tokens_per_rank` tokens are full.

    Args:
        ranks (`int`): data-parallel ranks.
        tokens_per_rank (`int`): the budget of each, in tokens.
    """

    def __init__(self, ranks: int, tokens_per_rank: int) -> None:
        self.tokens_per_rank = tokens_per_rank
        self.shares: list[list[int]] = [[] for _ in range(ranks)]
        self._rows, self._loads = 0, [(0, rank) for rank in range(ranks)]

    def add(self, tokens: int) -> bool:
        """Give the next row to the rank with the fewest tokens; `False` if it does not fit there, so nowhere."""
        load, rank = self._loads[0]
        if load + tokens > self.tokens_per_rank:
            return False
        heapq.heapreplace(self._loads, (load + tokens, rank))
        self.shares[rank].append(self._rows)
        self._rows += 1
        return True

    @property
    def all_have_rows(self) -> bool:
        return all(self.shares)
