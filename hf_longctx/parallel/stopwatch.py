"""How long communication between ranks takes, measured around each collective and read by the caller.

A [`SequenceShard`] may carry a stopwatch. Without one nothing is measured, at no cost.
Price: two events on a GPU's stream for each collective, or two clock reads on a CPU.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence

import torch


class Stopwatch:
    """Adds up the time of blocks of work.

    Args:
        clock (`Callable`, *optional*): seconds, in place of the device's events or of a CPU's clock.
        also (`Sequence[Stopwatch]`, *optional*): they measure the same blocks.
        is_on (`bool`, *optional*, defaults to `True`): whether this one measures.
    """

    def __init__(
        self, *, clock: Callable[[], float] | None = None, also: Sequence[Stopwatch] = (), is_on: bool = True
    ) -> None:
        self.is_on = is_on
        self._clock, self._also = clock, also
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextlib.contextmanager
    def measure(self, device: torch.device) -> Iterator[None]:
        """Time a block on `device`, with the wait for other ranks, and without making the CPU wait."""
        with contextlib.ExitStack() as stack:
            for other in self._also:
                stack.enter_context(other.measure(device))
            if self.is_on:
                stack.enter_context(self._measure(device))
            yield

    @contextlib.contextmanager
    def _measure(self, device: torch.device) -> Iterator[None]:
        if device.type != "cuda" or self._clock is not None:
            clock = self._clock or time.perf_counter
            start = clock()
            yield
            self._seconds += clock() - start
            return
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        yield
        end.record()
        self._events.append((start, end))

    def take(self) -> float:
        """Seconds since the last call. The CPU waits for the device to reach the last block."""
        if self._events:
            self._events[-1][1].synchronize()
        seconds = self._seconds + sum(start.elapsed_time(end) for start, end in self._events) / 1000
        self._seconds, self._events = 0.0, []
        return seconds
