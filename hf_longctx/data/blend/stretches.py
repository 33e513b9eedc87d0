"""The rule of the chairman over many stretches of rows side by side, with the result of one run from the first row.

How: the rule is sequential, and Python would take minutes for 1e8 rows. So many stretches of the same length run
side by side, one row of each at a time. Where one begins, the rows given before it are guessed and the rule is run for
some rows until the guess no longer matters. Whether it does is checked: a stretch that did not begin where the one
before it ended is run again from there. The result is that of one run from the first row, however good the guess.
Price: `k` numbers are looked at for each row.
"""

from __future__ import annotations

import numpy as np

from .proportions import Proportions


_REPAIRED = 256  # rows of a stretch that are run again before it is looked at
_FAR = 2.0**80


def run_stretches(
    proportions: Proportions, given: np.ndarray, starts: np.ndarray, length: int, guess: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """The sources of consecutive stretches.

    Args:
        given (`np.ndarray` of shape `(1, sources)`): rows that each source has given before the first one.
        starts (`np.ndarray` of shape `(stretches,)`): rows of the blend before each.
        length (`int`): rows of each.
        guess (`np.ndarray` of shape `(stretches, sources)`, *optional*): rows given before each, if that is known.

    Returns:
        `tuple`: sources, `(stretches, length)`; rows given before each stretch; rows given behind the last one; how
        many stretches were run again.
    """
    found = np.empty((length, len(starts)), dtype=np.uint16)
    ends = np.repeat(given, len(starts), axis=0)
    if guess is not None:
        ends[1:] = guess[1:]
    elif len(starts) > 1:
        early = np.maximum(starts[1:] - 8 * proportions.num_sources - 64, 0)
        ends[1:] = proportions.guess(early, given)
        _run(proportions, ends[1:], early, starts[1:] - early, None)
    begins = ends.copy()
    _run(proportions, ends, starts, np.full(len(starts), length), found)
    repaired = 0
    while len(wrong := 1 + np.flatnonzero((begins[1:] != ends[:-1]).any(1))):
        late = ends[wrong - 1]
        ends[wrong] += _repair(proportions, found, wrong, late - begins[wrong], late.copy(), starts[wrong])
        begins[wrong] = late
        repaired += len(wrong)
    return found.T, begins, ends[-1:].copy(), repaired


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


def _run(proportions: Proportions, given: np.ndarray, starts: np.ndarray, lengths: np.ndarray, found) -> None:
    """Give row after row, all stretches side by side.

    Args:
        given (`np.ndarray` of shape `(stretches, sources)`): rows given so far; changed in place.
        starts, lengths (`np.ndarray` of shape `(stretches,)`): where each begins, and how many rows it gets.
        found (`np.ndarray` of shape `(rows, stretches)`, *optional*): filled with the sources.
    """
    count, k = given.shape
    offset = np.asarray(starts, dtype=np.float64)
    sources = np.broadcast_to(np.arange(k), given.shape)
    # Counted from the start of the stretch, so that all compare with one number. A time that is far off makes a key
    # large: `max((may - now) * FAR, due)` is `due` for those that may give a row, and out of reach for all others.
    may = (proportions.may(given, sources) - offset[:, None]) * _FAR
    due = proportions.due(given, sources) - offset[:, None]
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
        flat_may[at] = (proportions.may(rows, chosen) - here) * _FAR
        flat_due[at] = proportions.due(rows, chosen) - here
