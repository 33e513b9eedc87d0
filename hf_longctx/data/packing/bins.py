"""Where each piece goes: three ways to fill bins, from sizes to bin numbers.

How: pieces of equal size are placed together, so the work grows with the distinct sizes a bin gets rather than with
the pieces. The bins are those of placing one piece after another.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterable
from itertools import repeat

import numpy as np


def place_in_order(sizes: np.ndarray, max_tokens: int) -> np.ndarray:
    """Bin of every piece in the given order, each bin closed at the first piece that does not fit."""
    ends = np.cumsum(sizes).tolist()
    firsts, used = [0], 0
    while (first := bisect_right(ends, used + max_tokens, lo=firsts[-1])) < len(ends):
        firsts.append(first)
        used = ends[first - 1]
    return np.repeat(np.arange(len(firsts)), np.diff([*firsts, len(ends)]))


def place_best_fit(sizes: np.ndarray, max_tokens: int) -> np.ndarray:
    """Bin of every piece, for sizes in descending order: each goes into the bin with the least room that is enough.

    A bin that takes a piece and still has room for its like is the best fit for the next, so it is filled at once,
    and bins with equal room are alike.
    """
    bins_by_room: dict[int, list[int]] = {}
    rooms: list[int] = []  # the keys, sorted
    num_bins = 0
    bins: list[int] = []
    taken: list[int] = []
    for size, count in _runs(sizes):
        while count:
            at = bisect_left(rooms, size)
            room = rooms[at] if at < len(rooms) else max_tokens
            fit = room // size
            wanted = -(-count // fit)
            if at < len(rooms):
                waiting = bins_by_room[room]
                chosen = waiting[-wanted:]
                del waiting[-wanted:]
                if not waiting:
                    del bins_by_room[room], rooms[at]
            else:
                chosen = list(range(num_bins, num_bins + wanted))
                num_bins += wanted
            placed = min(count, fit * len(chosen))
            last = placed - fit * (len(chosen) - 1)
            bins += chosen
            taken.extend(repeat(fit, len(chosen) - 1))
            taken.append(last)
            count -= placed
            for left, which in ((room - fit * size, chosen[:-1]), (room - last * size, chosen[-1:])):
                if left and which:
                    if left not in bins_by_room:
                        bins_by_room[left] = []
                        insort(rooms, left)
                    bins_by_room[left] += which
    return np.repeat(bins, taken)


def place_first_fit(sizes: np.ndarray, max_tokens: int) -> np.ndarray:
    """Bin of every piece, for sizes in descending order: each goes into the first bin with room.

    That bin is found by walking down a tree of the most room.
    """
    # Any two bins together hold more than one budget, or the later one's pieces would stand in the earlier.
    most_bins = 2 * int(sizes.sum()) // max_tokens + 2
    width = 1 << (min(most_bins, len(sizes)) - 1).bit_length()
    most_room = [max_tokens] * (2 * width)  # node `i` has the children `2i` and `2i + 1`; leaves are bins
    bins, taken = [], []
    for size, count in _runs(sizes):
        while count:
            node = 1
            while node < width:
                node *= 2
                if most_room[node] < size:
                    node += 1
            placed = min(count, most_room[node] // size)
            bins.append(node - width)
            taken.append(placed)
            count -= placed
            most_room[node] -= placed * size
            while node > 1:
                left, right = most_room[node], most_room[node ^ 1]
                node //= 2
                room = left if left > right else right
                if most_room[node] == room:
                    break
                most_room[node] = room
    return np.repeat(bins, taken)


def _runs(sizes: np.ndarray) -> Iterable[tuple[int, int]]:
    """Each distinct size with its count, for sizes in descending order."""
    changes = np.flatnonzero(np.diff(sizes)) + 1
    firsts = np.concatenate(([0], changes))
    return zip(sizes[firsts].tolist(), np.diff(np.append(firsts, len(sizes))).tolist())
