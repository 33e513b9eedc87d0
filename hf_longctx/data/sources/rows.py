"""Infinite iterators over one source: pass after pass, each in its own order.

A row that may not join a batch (it is in it already, or with `deduplicate` shares a text with it) is deferred and
comes first in the source's next batch, so none is lost. Rows are read here only where texts or lengths decide.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from .shuffled import ShuffledRange


LABEL_COLUMNS = ("label", "labels", "score", "scores")
NAME_COLUMN = "dataset_name"
_READ_AHEAD, _NUMBERS_AHEAD = 256, 1024
_MOST_DEFERRED = 1024  # or 16 times what was taken


class Candidate(NamedTuple):
    """A row that could join a batch: its number or the row itself, what no other row of the batch may have, and the
    lengths of its texts where they are needed."""

    source: str
    row: Any
    keys: tuple[Hashable, ...]
    lengths: tuple[int, ...] = ()


class SourceRows:
    """Infinite iterator over one source; rows deferred from earlier batches come first.

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
        """The batch is full: rows that were not looked at wait behind the deferred ones."""
        self.late.extend(self._waiting)
        self._waiting = deque()

    def take(self, seen: set[Hashable]) -> Candidate | None:
        """The next row that shares no key with `seen`, which then has its keys; `None` if a whole pass has none.

        Raises:
            ValueError: too many rows were deferred.
        """
        looked_at = 0
        while self.rows is None or looked_at < self.rows:
            looked_at += not self._waiting
            candidate = self._waiting.popleft() if self._waiting else self._next()
            if seen.isdisjoint(candidate.keys):
                seen.update(candidate.keys)
                self._taken += 1
                return candidate
            self.deferred(candidate)
        return None

    def take_many(self, count: int, seen: set[Hashable]) -> list[Candidate]:
        """The next `count` rows, or fewer where [`take`] has none."""
        rows: list[Candidate] = []
        while len(rows) < count and (candidate := self.take(seen)) is not None:
            rows.append(candidate)
        return rows

    def deferred(self, candidate: Candidate) -> None:
        """Keep a row for the next batch of this source."""
        self.late.append(candidate)
        if len(self.late) > max(_MOST_DEFERRED, 16 * self._taken):
            raise ValueError(
                f"source `{self.name}` has deferred {len(self.late)} rows whose texts were in the batch already: too "
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
        read (`Callable`, *optional*): numbers to rows; unset, rows are identified by their numbers alone.
        seed (`int`): of the run.
    """

    rows: int

    def __init__(self, name, rows, describe, *, total: int, read: Callable | None, seed: int) -> None:
        super().__init__(name, rows, describe)
        self._used = ShuffledRange(total, seed, name, "used") if rows < total else None
        self._fetch, self._key, self._position = read, (seed, name), 0
        self._order: tuple[int, ShuffledRange | None] = (-1, None)

    def _more(self) -> list:
        at, start = divmod(self._position, self.rows)
        ordered, order = self._order
        if order is None or ordered != at:
            order = ShuffledRange(self.rows, *self._key, at)
            self._order = (at, order)
        ahead = _NUMBERS_AHEAD if self._fetch is None else _READ_AHEAD
        numbers = order.at(np.arange(start, min(start + ahead, self.rows)))
        if self._used is not None:
            numbers = self._used.at(numbers)
        self._position += len(numbers)
        numbers = numbers.tolist()
        return list(zip(numbers, [None] * len(numbers) if self._fetch is None else self._fetch(numbers)))

    def take_many(self, count: int, seen: set[Hashable]) -> list[Candidate]:
        """As above; rows of one pass that are identified by their numbers need no comparing."""
        rows: list[Candidate] = []
        while self._fetch is None and not self._waiting and len(rows) < count:
            if not self._read:
                if rows and self._position % self.rows == 0:
                    break  # another pass begins
                self._read.extend(self.describe(self._more()))
            rows += [self._read.popleft() for _ in range(min(count - len(rows), len(self._read)))]
        if len(rows) < count:
            seen.update(key for row in rows for key in row.keys)
            rows += super().take_many(count - len(rows), seen)
        return rows

    @property
    def is_plain(self) -> bool:
        """Whether rows are identified by their numbers alone."""
        return self._fetch is None

    def skip(self, counts: Sequence[int] | np.ndarray) -> None:
        """Go where batches of `counts` rows leave a new source, without drawing them one by one.

        Only for rows that are identified by their numbers: rows are then deferred only by a batch that crosses the
        border of two passes, and the next batches take them first. It is enough to draw from the last such batch on,
        and nothing if as many rows as it can have deferred were taken since.
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
            self.take_many(count, seen)
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
