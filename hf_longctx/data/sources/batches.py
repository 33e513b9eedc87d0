"""The batches of all ranks: taken from the sources by the plan, then assigned to ranks.

Every rank makes the whole batch and keeps its part, because which rows are deferred depends on the rows of all ranks.
Texts are cheap next to a training step, and they are read here only where texts or lengths decide.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass

from ..packing.lengths import packing_cost
from .assignment import RankBudgets, assign_evenly
from .plan import SourcePlan
from .rows import Candidate, IndexedRows, SourceRows


@dataclass(frozen=True)
class GlobalBatch:
    """The rows of all ranks."""

    shares: list[list[Candidate]]
    swapped: bool


class GlobalBatches:
    """Infinite iterator over the batches of all ranks.

    Args:
        plan ([`SourcePlan`]): which sources make which batch.
        sources (`Mapping[str, SourceRows]`): new ones; they are used up.
        ranks (`int`): data-parallel ranks.
        batch_size (`int`): rows of every rank.
        tokens_per_rank (`int`, *optional*): fill every rank up to so many tokens instead.
        balanced (`bool`): whether ranks get rows of like cost.
        linear_tokens (`float`): see [`packing_cost`].
    """

    def __init__(
        self,
        plan: SourcePlan,
        sources: Mapping[str, SourceRows],
        *,
        ranks: int,
        batch_size: int,
        tokens_per_rank: int | None = None,
        balanced: bool = False,
        linear_tokens: float = 12 * 1024,
    ) -> None:
        self.plan, self.sources, self.ranks, self.batch_size = plan, sources, ranks, batch_size
        self.tokens_per_rank, self.balanced, self.linear_tokens = tokens_per_rank, balanced, linear_tokens
        self.draws = 0

    @property
    def share_size(self) -> int:
        """Rows of one share of a batch."""
        return self.batch_size * self.ranks // self.plan.sources_per_batch

    def skip(self, draws: int) -> None:
        """Go on after `draws` batches of a new run: at once where nothing is read here, else by drawing them."""
        assert self.draws == 0
        plain = {name: rows for name, rows in self.sources.items() if isinstance(rows, IndexedRows) and rows.is_plain}
        if len(plain) < len(self.sources):
            for _ in range(draws):
                next(self)
            return
        for name, shares in self.plan.shares_before(draws).items():
            plain[name].skip(shares * self.share_size)
        self.draws = draws

    def __iter__(self) -> Iterator[GlobalBatch]:
        return self

    def __next__(self) -> GlobalBatch:
        draw = self.plan.draw(self.draws)
        for name in draw.shares:
            self.sources[name].begin()
        limit = self.tokens_per_rank
        shares = self._take_rows(draw.shares) if limit is None else self._take_tokens(draw.shares, limit)
        for name in draw.shares:
            self.sources[name].end()
        self.draws += 1
        return GlobalBatch(shares, draw.swapped)

    def _take_rows(self, shares: dict[str, int]) -> list[list[Candidate]]:
        rows: list[Candidate] = []
        seen: set[Hashable] = set()
        for name, parts in shares.items():
            wanted = parts * self.share_size
            taken = self.sources[name].take_many(wanted, seen)
            if len(taken) < wanted:
                raise ValueError(
                    f"source `{name}` cannot fill {wanted} rows of global batch {self.draws}: whatever is left of it "
                    "shares a text with them; lower the batch size, filter the source, or set `deduplicate` to "
                    "`False`."
                )
            rows += taken
        if not self.balanced or self.ranks == 1:
            return [rows[rank :: self.ranks] for rank in range(self.ranks)]
        costs = [packing_cost(row.lengths, self.linear_tokens) for row in rows]
        return [[rows[place] for place in share] for share in assign_evenly(costs, self.ranks)]

    def _take_tokens(self, shares: dict[str, int], limit: int) -> list[list[Candidate]]:
        rows: list[Candidate] = []
        seen: set[Hashable] = set()
        budgets = RankBudgets(self.ranks, limit)
        names = [name for name, parts in shares.items() for _ in range(parts)]
        while True:
            source = self.sources[names[len(rows) % len(names)]]
            candidate = source.take(seen)
            if candidate is None:
                break
            tokens = sum(candidate.lengths)
            if tokens > limit:
                raise ValueError(
                    f"a row of source `{source.name}` has {tokens} tokens, over `tokens_per_rank` "
                    f"({self.tokens_per_rank}): raise it, or cut or leave out such rows. {_shown(candidate.row)}"
                )
            if not budgets.add(tokens):
                source.deferred(candidate)
                break
            rows.append(candidate)
        if not budgets.all_have_rows:
            raise ValueError(
                f"source `{source.name}` has only {len(rows)} rows that share no text for the {self.ranks} ranks of "
                f"global batch {self.draws}: filter the source, or set `deduplicate` to `False`."
            )
        return [[rows[place] for place in share] for share in budgets.shares]


def _shown(row: object) -> str:
    return f"It is row {row}." if isinstance(row, int) else f"It begins with {str(row)[:60]!r}."
