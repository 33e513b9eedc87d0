"""The source of every row of a blend: the rule of [`proportions`][hf_longctx.data.blend.proportions], row by row.

How: [`stretches`][hf_longctx.data.blend.stretches] of rows run side by side, from guesses. What a guess cannot know is
which of many rare sources have had their row lately, and a wrong one stays wrong for as long as a rare source waits.
So where some sources have next to nothing of the blend, two cheap runs come first, of which only the guess is taken.
The others run alone, and a row that none of them may give is a gap. Then each gap goes to the rare source that is due
first, one after the other, which is what the rule does unless a rare source cannot wait for a gap.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator

import numpy as np

from .proportions import BEHIND, Proportions
from .stretches import run_stretches


_STRETCHES, _ROWS = 512, 4096  # side by side, and rows of each
_NUMBERS = 2**22  # of all sources of all stretches at most, so that memory does not grow with the sources
_RARE = 0.02  # what all rare sources together have of the rows
_WORTH = 64  # as many stretches run again cost as much as to foresee rare sources
_GAP_IS_DUE = 2 * BEHIND  # later than any source that may give a row, sooner than any that may not


def assign_sources(proportions: Proportions) -> Iterator[np.ndarray]:
    """The source of every row, in pieces of some million rows.

    Yields:
        `np.ndarray` of 16-bit integers.
    """
    total, position = int(proportions.ends[-1]), 0
    if proportions.num_sources == 1:
        for start in range(0, total, _STRETCHES * _ROWS):
            yield np.zeros(min(_STRETCHES * _ROWS, total - start), dtype=np.uint16)
        return
    given = np.zeros((1, proportions.num_sources))
    most = max(min(_STRETCHES, _NUMBERS // proportions.num_sources), 1)
    frequent, repaired = _Frequent(proportions), {False: 0, True: 0}
    while position < total:
        length = min(_ROWS, total - position)
        count = min(most, (total - position) // length)
        starts = position + length * np.arange(count)
        foresees = repaired[False] > repaired[True] + _WORTH
        guess = _foresee(frequent, given, starts, length) if foresees else None
        found, _, given, repaired[foresees] = run_stretches(proportions, given, starts, length, guess)
        yield found.reshape(-1)
        position += found.size


class _Frequent(Proportions):
    """All but the rare sources of a blend, and as the last one the gaps, in which none of them may give a row."""

    def __init__(self, whole: Proportions) -> None:
        order = np.argsort(whole.shares.max(0), kind="stable")
        count = int((np.cumsum(whole.shares.max(0)[order]) <= _RARE).sum())
        self.whole, self.rare, self.sources = whole, np.sort(order[:count]), np.sort(order[count:])
        self.gap, self.num_sources = len(self.sources), len(self.sources) + 1
        self._places = np.append(self.sources, 0)

    def may(self, given: np.ndarray, sources: np.ndarray) -> np.ndarray:
        return np.where(sources == self.gap, -1.0, self.whole.may(given, self._places[sources]))

    def due(self, given: np.ndarray, sources: np.ndarray) -> np.ndarray:
        return np.where(sources == self.gap, _GAP_IS_DUE, self.whole.due(given, self._places[sources]))

    def with_gaps(self, given: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Rows given of each, of those of all sources after so many of the blend."""
        kept = given[:, self.sources]
        return np.concatenate([kept, rows[:, None] - kept.sum(1, keepdims=True)], axis=1)

    def guess(self, rows: np.ndarray, earlier: np.ndarray) -> np.ndarray:
        mine = np.zeros((1, self.whole.num_sources))
        mine[:, self.sources] = earlier[:, :-1]
        return self.with_gaps(self.whole.guess(rows, mine), rows)


def _foresee(frequent: _Frequent, given: np.ndarray, starts: np.ndarray, length: int) -> np.ndarray:
    """Rows that each source has probably given before each stretch."""
    found, begins, _, _ = run_stretches(frequent, frequent.with_gaps(given, starts[:1]), starts, length)
    guess = np.empty((len(starts), given.shape[1]))
    guess[:, frequent.sources] = begins[:, :-1]
    gaps = starts[0] + 1 + np.flatnonzero(found.reshape(-1) == frequent.gap)
    guess[:, frequent.rare] = _fill(frequent, given[0, frequent.rare], gaps, starts, starts[-1] + length)
    return guess


def _fill(frequent: _Frequent, given: np.ndarray, gaps: np.ndarray, starts: np.ndarray, stop: int) -> np.ndarray:
    """Rows that the rare sources have given before each stretch, if they have all gaps and nothing else."""
    whole, rare = frequent.whole, frequent.rare
    counts = np.maximum(whole.owed(np.array([stop]))[0, rare] - given, 0).astype(np.int64) + 2
    owner = np.repeat(np.arange(len(rare)), counts)
    first = np.cumsum(counts) - counts
    rows = given[owner] + np.arange(len(owner)) - first[owner]
    may, due = whole.may(rows, rare[owner]).tolist(), whole.due(rows, rare[owner]).tolist()
    places, lasts = first.tolist(), (first + counts - 1).tolist()
    waiting = [(may[place], source) for source, place in enumerate(places)]
    heapq.heapify(waiting)
    ready: list[tuple[float, int]] = []
    taken = []  # the source of each gap
    for row in gaps.tolist():
        while waiting and waiting[0][0] <= row:
            source = heapq.heappop(waiting)[1]
            heapq.heappush(ready, (due[places[source]], source))
        if not ready:
            taken.append(-1)
            continue
        source = heapq.heappop(ready)[1]
        taken.append(source)
        if places[source] < lasts[source]:
            places[source] += 1
            heapq.heappush(waiting, (may[places[source]], source))
    behind = np.searchsorted(starts, gaps, side="left")  # the first stretch that begins behind the gap
    filled = np.zeros((len(starts) + 1, len(rare)))
    has = np.array(taken, dtype=np.int64) >= 0
    np.add.at(filled, (behind[has], np.array(taken, dtype=np.int64)[has]), 1)
    return given + np.cumsum(filled, axis=0)[:-1]
