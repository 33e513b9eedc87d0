"""The rows of every source in order, and the global batches that are made of them.

What: a source is read pass after pass, each in an order of its own; `GlobalBatches` takes from the sources what the
plan says and deals it to the ranks. A row that may not join the batch (it is in it already, or with `deduplicate`
shares a text with it) is put off and comes first in the source's next batch, so none is lost. Why whole batches on
every rank: what is put off depends on the rows of all ranks, and texts are cheap beside a training step. Price: rows
are read here only where texts or lengths decide; then every rank reads those of all ranks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from .dealing import RankBudgets, deal_evenly
from .packing import packing_cost
from .shuffled import ShuffledRange
from .sources import SourcePlan


LABEL_COLUMNS = ("label", "labels", "score", "scores")
NAME_COLUMN = "dataset_name"
_READ_AHEAD = 256
_MOST_PUT_OFF = 1024  # or 16 times what was taken


@dataclass(frozen=True, slots=True)
class Candidate:
    """A row that could join a batch: its number or the row itself, what no other row of the batch may have, and the
    lengths of its texts where somebody asked."""

    source: str
    row: object
    keys: frozenset[Hashable]
    lengths: tuple[int, ...] = ()


@dataclass(frozen=True)
class GlobalBatch:
    """The rows of all ranks."""

    shares: list[list[Candidate]]
    swapped: bool


class SourceRows:
    """The rows of one source, for ever: pass after pass, what was put off first.

    Args:
        name (`str`): of the source.
        rows (`int`, *optional*): rows of one pass; `None` for a stream.
        describe (`Callable`): a list of `(number, row)` to candidates; `row` is `None` where `read` is.
    """

    def __init__(self, name: str, rows: int | None, describe: Callable[[list], list[Candidate]]) -> None:
        self.name, self.rows, self.describe = name, rows, describe
        self.late: list[Candidate] = []
        self._waiting: deque[Candidate] = deque()
        self._read: deque[Candidate] = deque()
        self._taken = 0

    def begin(self) -> None:
        """A new global batch begins."""
        self._waiting, self.late = deque(self.late), []
        self._taken = 0

    def end(self) -> None:
        """The batch is full: what was not looked at waits behind what was put off."""
        self.late.extend(self._waiting)
        self._waiting = deque()

    def take(self, seen: set[Hashable]) -> Candidate | None:
        """The next row that shares no key with `seen`, which then has its keys; `None` if a whole pass has none.

        Raises:
            ValueError: too many rows were put off.
        """
        looked_at = 0
        while self.rows is None or looked_at < self.rows:
            looked_at += not self._waiting
            candidate = self._waiting.popleft() if self._waiting else self._next()
            if seen.isdisjoint(candidate.keys):
                seen |= candidate.keys
                self._taken += 1
                return candidate
            self.put_off(candidate)
        return None

    def put_off(self, candidate: Candidate) -> None:
        """Keep a row for the next batch of this source."""
        self.late.append(candidate)
        if len(self.late) > max(_MOST_PUT_OFF, 16 * self._taken):
            raise ValueError(
                f"source `{self.name}` has put off {len(self.late)} rows whose texts were in the batch already: too "
                "many of its rows share a text; lower the batch size, filter the source, or set `deduplicate` to "
                "`False`."
            )

    def _next(self) -> Candidate:
        if not self._read:
            self._read.extend(self.describe(self._more()))
        return self._read.popleft()

    def _more(self) -> list:
        raise NotImplementedError


class IndexedRows(SourceRows):
    """Rows with numbers, in a new random order each pass, computed where it is read.

    Args:
        total (`int`): rows of the data set; of more than `rows`, a fixed random choice is ever used.
        read (`Callable`, *optional*): numbers to rows; unset, rows are told apart by their numbers alone.
        seed (`int`): of the run.
    """

    def __init__(self, name, rows, describe, *, total: int, read: Callable | None, seed: int) -> None:
        super().__init__(name, rows, describe)
        self._used = ShuffledRange(total, seed, name, "used") if rows < total else None
        self._fetch, self._key, self._position, self._order = read, (seed, name), 0, (-1, None)

    def _more(self) -> list:
        at, start = divmod(self._position, self.rows)
        if self._order[0] != at:
            self._order = (at, ShuffledRange(self.rows, *self._key, at))
        numbers = self._order[1].at(np.arange(start, min(start + _READ_AHEAD, self.rows)))
        if self._used is not None:
            numbers = self._used.at(numbers)
        self._position += len(numbers)
        numbers = numbers.tolist()
        return list(zip(numbers, [None] * len(numbers) if self._fetch is None else self._fetch(numbers)))

    def skip(self, counts: Sequence[int]) -> None:
        """Go where batches of `counts` rows leave a new source, without drawing them one by one.

        Only for rows that are told apart by their numbers: then rows are put off only by a batch that crosses the
        border of two passes, and the next ones take them first. It is enough to draw from the last such batch on,
        and nothing if as many rows as it can have put off were taken since.
        """
        counts = np.asarray(counts, dtype=np.int64)
        if not len(counts):
            return
        ends, redrawn = np.cumsum(counts), counts
        if self.rows >= 2 * counts.max():
            crossing = np.flatnonzero((ends - 1) // self.rows != (ends - counts) // self.rows)
            settled = not len(crossing) or ends[-1] - ends[crossing[-1]] >= counts.max()
            redrawn = counts[:0] if settled else counts[crossing[-1] :]
        before = int(ends[-1] - redrawn.sum())
        self._position = before
        for count in redrawn.tolist():
            seen: set[Hashable] = set()
            self.begin()
            for _ in range(count):
                self.take(seen)
            self.end()


class StreamedRows(SourceRows):
    """Rows of a stream, begun again where it ends.

    Args:
        stream (`Iterable[dict]`): yields the same rows on every rank; `set_epoch` is called before each pass.
        cap (`int`, *optional*): only the first so many rows are ever used.
    """

    def __init__(self, name, describe, *, stream: Iterable[dict], cap: int | None = None) -> None:
        super().__init__(name, None, describe)
        self._rows = self._passes(stream, cap)

    def _passes(self, stream, cap: int | None) -> Iterator[tuple[int, dict]]:
        passes = 0
        while True:
            if hasattr(stream, "set_epoch"):
                stream.set_epoch(passes)
            number = -1
            for number, row in enumerate(islice(iter(stream), cap)):
                yield number, row
            if number < 0:
                raise ValueError(
                    f"the stream of source `{self.name}` ended without a row: leave it out, or check what it was "
                    "filtered by."
                )
            passes += 1

    def _more(self) -> list:
        return [next(self._rows)]


class GlobalBatches:
    """The batches of all ranks, one after the other, for ever.

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
        plain = all(isinstance(rows, IndexedRows) and rows._fetch is None for rows in self.sources.values())
        if not plain:
            for _ in range(draws):
                next(self)
            return
        for name, shares in self.plan.shares_before(draws).items():
            self.sources[name].skip(shares * self.share_size)
        self.draws = draws

    def __iter__(self) -> Iterator[GlobalBatch]:
        return self

    def __next__(self) -> GlobalBatch:
        draw = self.plan.draw(self.draws)
        for name in draw.shares:
            self.sources[name].begin()
        fill = self._take_rows if self.tokens_per_rank is None else self._take_tokens
        shares = fill(draw.shares)
        for name in draw.shares:
            self.sources[name].end()
        self.draws += 1
        return GlobalBatch(shares, draw.swapped)

    def _take_rows(self, shares: dict[str, int]) -> list[list[Candidate]]:
        rows, seen = [], set()
        for name, parts in shares.items():
            for _ in range(parts * self.share_size):
                candidate = self.sources[name].take(seen)
                if candidate is None:
                    raise ValueError(
                        f"source `{name}` cannot fill {parts * self.share_size} rows of global batch {self.draws}: "
                        "whatever is left of it shares a text with them; lower the batch size, filter the source, or "
                        "set `deduplicate` to `False`."
                    )
                rows.append(candidate)
        if not self.balanced or self.ranks == 1:
            return [rows[rank :: self.ranks] for rank in range(self.ranks)]
        costs = [packing_cost(row.lengths, self.linear_tokens) for row in rows]
        return [[rows[place] for place in share] for share in deal_evenly(costs, self.ranks)]

    def _take_tokens(self, shares: dict[str, int]) -> list[list[Candidate]]:
        rows, seen, budgets = [], set(), RankBudgets(self.ranks, self.tokens_per_rank)
        names = [name for name, parts in shares.items() for _ in range(parts)]
        while True:
            source = self.sources[names[len(rows) % len(names)]]
            candidate = source.take(seen)
            if candidate is None:
                break
            tokens = sum(candidate.lengths)
            if tokens > self.tokens_per_rank:
                raise ValueError(
                    f"a row of source `{source.name}` has {tokens} tokens, over `tokens_per_rank` "
                    f"({self.tokens_per_rank}): raise it, or cut or leave out such rows. {_shown(candidate.row)}"
                )
            if not budgets.add(tokens):
                source.put_off(candidate)
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
