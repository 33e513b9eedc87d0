"""Which source each row of a blend comes from, so that every prefix has its proportions to within one row.

What: the chairman assignment (R. Tijdeman, *The chairman assignment problem*, 1980). With `k` sources and
`d = 1 / (2k - 2)`, a source may give its next row once it is owed at least `d` of one, and of those that may, the one
goes first that would be owed more than `1 - d` soonest. Then no source is ever more than `1 - d` rows off, at any
prefix, for any weights, also where weights change on the way. Drawing at random is off by the root of the rows, and
sorting by the middle of each row's place, or taking the source that is owed most, by more than one row.

Here is what sources are owed; [`chairman`][hf_longctx.data.blend.chairman] runs the rule.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


MOST_SOURCES = 2**16
BEHIND = 2.0**39  # no blend has as many rows


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
        with np.errstate(divide="ignore", over="ignore"):
            # A source of a share that no blend has rows for is owed its first behind the last row, and no number
            # grows until it overflows; one of no share never is.
            self._steps = np.where(self.shares > 0, np.minimum(1 / self.shares, BEHIND**1.5), np.inf)
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

    def may(self, given: np.ndarray, sources: np.ndarray) -> np.ndarray:
        """After how many rows of the blend a source that has given so many may give the next one."""
        return self.when(given + self.slack, sources)

    def due(self, given: np.ndarray, sources: np.ndarray) -> np.ndarray:
        """After how many rows of the blend a source that has given so many must give the next one.

        Behind the last row of any blend it does not matter when, and keys that are larger would be out of reach.
        """
        return np.minimum(self.when(given + (1 - self.slack), sources), BEHIND)

    def guess(self, rows: np.ndarray, earlier: np.ndarray) -> np.ndarray:
        """What sources have probably given after so many rows: what they are owed; the rest, those whose row is due.

        A rare source that has its row for long, as `earlier` says, has it still.
        """
        owed = self.owed(rows)
        given = np.floor(owed)
        sources = np.broadcast_to(np.arange(self.num_sources), given.shape)
        due = self.due(given, sources)
        due[self.may(given, sources) > rows[:, None]] = np.inf
        due[earlier > given] = -np.inf
        rank = np.argsort(np.argsort(due, axis=1, kind="stable"), axis=1, kind="stable")
        return given + (rank < np.round(rows - given.sum(1))[:, None])
