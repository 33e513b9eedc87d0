"""The rows of one source, pass after pass, each pass in an order of its own that belongs to (seed, source, pass).

How: the number at a place of a pass is computed where it is wanted, so a pass of a billion rows costs no list of them.
Sources of few rows, of which many passes are wanted at a time, are sorted by random numbers. For others the place is
mixed: multiplied by odd numbers and folded, within the next power of two, until it falls inside (twice in the mean).
Why not [`ShuffledRange`][hf_longctx.data.sources.shuffled]: its rounds cost ten times as much, and a blend asks for
every row of every pass.
"""

from __future__ import annotations

import numpy as np

from ..sources.shuffled import number_of


SORTED = 2048  # rows of a source up to which passes are sorted
_ROUNDS = 5


class Passes:
    """The rows of a source in the order in which a blend reads them.

    Args:
        size (`int`): rows of the source.
        seed (`int`): of the blend.
        name (`str`): of the source.
    """

    def __init__(self, size: int, seed: int, name: str) -> None:
        self.size, self._key = size, ("blend", seed, name)
        self._number = np.uint64(number_of(*self._key) % 2**64)

    def rows(self, begin: int, count: int) -> np.ndarray:
        """The rows read from the `begin`-th on, counted over all passes."""
        if self.size <= SORTED:
            return self._sorted(begin, count)
        pieces, end = [], begin + count
        while begin < end:
            number, place = divmod(begin, self.size)
            taken = min(end - begin, self.size - place)
            pieces.append(self._mixed(number, np.arange(place, place + taken)))
            begin += taken
        return np.concatenate(pieces) if pieces else np.zeros(0, dtype=np.int64)

    def _sorted(self, begin: int, count: int) -> np.ndarray:
        first, last = begin // self.size, -(-(begin + count) // self.size)
        keys = _scrambled(self._number + np.arange(first, last, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))
        with np.errstate(over="ignore"):
            places = np.arange(self.size, dtype=np.uint64) * np.uint64(0xD1B54A32D192ED03)
            orders = np.argsort(_scrambled(keys[:, None] + places), axis=1, kind="stable")
        start = begin - first * self.size
        return orders.reshape(-1)[start : start + count]

    def _mixed(self, number: int, places: np.ndarray) -> np.ndarray:
        bits = (self.size - 1).bit_length()
        kind = np.uint32 if bits <= 32 else np.uint64
        drawn = np.random.default_rng(number_of(*self._key, number)).integers(2**bits, size=(_ROUNDS, 2), dtype=kind)
        found = _mix(places.astype(kind), drawn, bits)
        outside = np.flatnonzero(found >= self.size)
        while len(outside):
            again = _mix(found[outside], drawn, bits)
            found[outside] = again
            outside = outside[again >= self.size]
        return found


def _mix(numbers: np.ndarray, drawn: np.ndarray, bits: int) -> np.ndarray:
    """A permutation of the numbers of `bits` bits."""
    kind = numbers.dtype.type
    mask, half = kind(2**bits - 1), kind((bits + 1) // 2)
    numbers = numbers.copy()
    for factor, added in drawn:
        numbers += added
        numbers *= factor | kind(1)
        numbers &= mask
        numbers ^= numbers >> half
    return numbers


def _scrambled(numbers: np.ndarray) -> np.ndarray:
    """The finalizer of SplitMix64."""
    with np.errstate(over="ignore"):
        numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))
