"""Which source each row of a blend comes from, so that every prefix has its proportions to within one row.

What: the chairman assignment (R. Tijdeman, *The chairman assignment problem*, 1980). With `k` sources and
`d = 1 / (2k - 2)`, a source may give its next row once it is owed at least `d` of one, and of those that may, the one
goes first that would be owed more than `1 - d` soonest. Then no source is ever more than `1 - d` rows off, at any
prefix, for any weights, also where weights change on the way. Drawing at random is off by the root of the rows, and
sorting by the middle of each row's place, or taking the source that is owed most, by more than one row.

How: the rule is sequential, and Python would take minutes for 1e8 rows. So many stretches of the same length run
side by side, one row of each at a time. Where one begins, the rows given before it are guessed and the rule is run for
some rows until the guess no longer matters. Whether it does is checked: a stretch that did not begin where the one
before it ended is run again from there. The result is that of one run from the first row, however good the guess.
Price: `k` numbers are looked at for each row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np


MOST_SOURCES = 2**16
_STRETCHES, _ROWS = 512, 4096  # side by side, and rows of each
_REPAIRED = 256  # rows of a stretch that are run again before it is looked at
_FAR = 2.0**60


class Proportions:
    """The rows that each source is owed, as a function of the rows of the blend.

    Args:
        weights (`np.ndarray` of shape `(blends, sources)`): of each blend; 0 for a source that it leaves out.
        num_rows (`Sequence[int]`): rows of each blend, one after the other.
    """

    def __init__(self, weights: np.ndarray, num_rows: Sequence[int]) -> None:
        self.shares = weights / weights.sum(1, keepdims=True)
        self.ends = np.cumsum(num_rows)
        self.begins = self.ends - np.asarray(num_rows)
        owed = np.cumsum(self.shares * np.asarray(num_rows)[:, None], axis=0)
        self._owed = np.concatenate([np.zeros((1, weights.shape[1])), owed])
        with np.errstate(divide="ignore"):
            self._steps = 1 / self.shares
        self.num_sources = weights.shape[1]
        self.slack = 1 / max(2 * self.num_sources - 2, 1)

    def owed(self, rows: np.ndarray) -> np.ndarray:
        """Rows that each source is owed after so many of the blend: `(n, sources)`."""
        blend = np.searchsorted(self.ends[:-1], rows, side="left")
        return self._owed[blend] + (rows - self.begins[blend])[:, None] * self.shares[blend]

    def when(self, owed: np.ndarray, sources: np.ndarray) -> np.ndarray:
        """After how many rows of the blend a source is owed so many; the inverse of [`owed`], infinite if never."""
        if len(self.ends) == 1:
            return owed * self._steps[0][sources]
        found = np.full(np.shape(owed), np.inf)
        last = len(self.ends) - 1
        for blend in range(last, -1, -1):
            before, steps = self._owed[blend][sources], self._steps[blend][sources]
            inside = (owed > before) & np.isfinite(steps)
            inside &= (owed <= self._owed[blend + 1][sources]) | (blend == last)
            found[inside] = self.begins[blend] + (owed[inside] - before[inside]) * steps[inside]
        return found


def assign_sources(proportions: Proportions) -> Iterator[np.ndarray]:
    """The source of every row, in pieces of some million rows.

    Yields:
        `np.ndarray` of 16-bit integers.
    """
    total, position = int(proportions.ends[-1]), 0
    given = np.zeros((1, proportions.num_sources))
    while position < total:
        length = min(_ROWS, total - position)
        count = min(_STRETCHES, (total - position) // length)
        starts = position + length * np.arange(count)
        sources, given = _run_stretches(proportions, given, starts, length)
        yield sources
        position += len(sources)


def _run_stretches(proportions: Proportions, given: np.ndarray, starts: np.ndarray, length: int):
    """The sources of consecutive stretches, and the rows that each source has given behind the last one."""
    found = np.empty((length, len(starts)), dtype=np.uint16)
    if proportions.num_sources == 1:
        found[:] = 0
        return found.reshape(-1), given + found.size
    ends = np.repeat(given, len(starts), axis=0)
    if len(starts) > 1:
        early = np.maximum(starts[1:] - 8 * proportions.num_sources - 64, 0)
        ends[1:] = _guess(proportions, early, given)
        _run(proportions, ends[1:], early, starts[1:] - early, None)
    begins = ends.copy()
    _run(proportions, ends, starts, np.full(len(starts), length), found)
    while len(wrong := 1 + np.flatnonzero((begins[1:] != ends[:-1]).any(1))):
        late = ends[wrong - 1]
        ends[wrong] += _repair(proportions, found, wrong, late - begins[wrong], late.copy(), starts[wrong])
        begins[wrong] = late
    return found.T.reshape(-1), ends[-1:].copy()


def _repair(proportions: Proportions, found: np.ndarray, wrong: np.ndarray, off: np.ndarray, given, starts):
    """Run stretches again from the right beginning, until they are where they were before.

    Args:
        found (`np.ndarray` of shape `(rows, stretches)`): changed in place.
        wrong (`np.ndarray`): the stretches.
        off, given (`np.ndarray` of shape `(len(wrong), sources)`): rows given at their beginning: how many more than
            was guessed, and how many.

    Returns:
        `np.ndarray`: how many more rows are given at their end.
    """
    open_ = np.arange(len(wrong))
    for begin in range(0, len(found), _REPAIRED):
        part = slice(begin, min(begin + _REPAIRED, len(found)))
        rows = np.empty((part.stop - begin, len(open_)), dtype=np.uint16)
        state = given[open_]
        _run(proportions, state, starts[open_] + begin, np.full(len(open_), len(rows)), rows)
        given[open_] = state
        lane = np.broadcast_to(open_, rows.shape)
        np.add.at(off, (lane, rows), 1)
        np.subtract.at(off, (lane, found[part, wrong[open_]]), 1)
        found[part, wrong[open_]] = rows
        open_ = open_[off[open_].any(1)]
        if not len(open_):
            break
    return off


def _guess(proportions: Proportions, rows: np.ndarray, earlier: np.ndarray) -> np.ndarray:
    """What sources have probably given after so many rows: what they are owed; the rest, those whose row is due.

    A rare source that has its row for long, as `earlier` says, has it still.
    """
    owed = proportions.owed(rows)
    given = np.floor(owed)
    sources = np.broadcast_to(np.arange(proportions.num_sources), given.shape)
    due = proportions.when(given + 1 - proportions.slack, sources)
    due[proportions.when(given + proportions.slack, sources) > rows[:, None]] = np.inf
    due[earlier > given] = -np.inf
    rank = np.argsort(np.argsort(due, axis=1, kind="stable"), axis=1, kind="stable")
    return given + (rank < np.round(rows - given.sum(1))[:, None])


def _run(proportions: Proportions, given: np.ndarray, starts: np.ndarray, lengths: np.ndarray, found) -> None:
    """Give row after row, all stretches side by side.

    Args:
        given (`np.ndarray` of shape `(stretches, sources)`): rows given so far; changed in place.
        starts, lengths (`np.ndarray` of shape `(stretches,)`): where each begins, and how many rows it gets.
        found (`np.ndarray` of shape `(rows, stretches)`, *optional*): filled with the sources.
    """
    count, k = given.shape
    slack, offset = proportions.slack, np.asarray(starts, dtype=np.float64)
    sources = np.broadcast_to(np.arange(k), given.shape)
    # Counted from the start of the stretch, so that all compare with one number. A time that is far off makes a key
    # large: `max((may - now) * FAR, due)` is `due` for those that may give a row, and out of reach for all others.
    may = (proportions.when(given + slack, sources) - offset[:, None]) * _FAR
    due = proportions.when(given + 1 - slack, sources) - offset[:, None]
    flat_given, flat_may, flat_due = given.reshape(-1), may.reshape(-1), due.reshape(-1)
    keys, first = np.empty_like(may), np.arange(count) * k
    shortest = int(lengths.min())
    for now in range(1, int(lengths.max()) + 1):
        np.subtract(may, now * _FAR, out=keys)
        np.maximum(keys, due, out=keys)
        chosen = keys.argmin(1)
        if found is not None:
            found[now - 1] = chosen
        at, here = first + chosen, offset
        if now > shortest:  # the others have all their rows
            runs = lengths >= now
            at, chosen, here = at[runs], chosen[runs], offset[runs]
        rows = flat_given[at] + 1
        flat_given[at] = rows
        flat_may[at] = (proportions.when(rows + slack, chosen) - here) * _FAR
        flat_due[at] = proportions.when(rows + (1 - slack), chosen) - here
