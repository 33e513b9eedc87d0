"""Which rank is slower than its peers, window after window; arithmetic only."""

from __future__ import annotations

from collections.abc import Hashable, Sequence


class SlowRanks:
    """Counts windows in which a rank was above the median of its peers.

    Args:
        windows (`int`): so many in a row name a rank.
        tolerance (`float`): share of the median that is no reason.
        peers (`Sequence`): one entry a rank; ranks with equal entries have equal work.
    """

    def __init__(self, windows: int, tolerance: float, peers: Sequence[Hashable]) -> None:
        self.windows, self.tolerance, self.peers = windows, tolerance, list(peers)
        self.counts = [0] * len(self.peers)
        self.slowest = 1.0  # of the last window, as a multiple of its peers' median

    @property
    def without_peers(self) -> list[int]:
        """Ranks that no other has work like: nothing can be said of them."""
        return [rank for rank, kind in enumerate(self.peers) if self.peers.count(kind) == 1]

    def add(self, seconds: Sequence[float]) -> list[tuple[int, float, float]]:
        """Take a window: seconds of every rank.

        Returns:
            `list` of rank, its seconds and its peers' median, for each that has just been above for the last of so
            many windows.
        """
        named, self.slowest = [], 1.0
        for rank, own in enumerate(seconds):
            peers = sorted(other for other, kind in zip(seconds, self.peers) if kind == self.peers[rank])
            median = peers[(len(peers) - 1) // 2]  # of two, the faster one
            if median <= 0:
                continue
            self.slowest = max(self.slowest, own / median)
            is_slow = own > median * (1 + self.tolerance)
            self.counts[rank] = self.counts[rank] + 1 if is_slow else 0
            if self.counts[rank] == self.windows:
                named.append((rank, own, median))
        return named
