"""Which micro-batches make which optimizer step while the global batch grows: a function of the step's number alone.

So a resumed run needs no state, and every rank computes the same. Arithmetic of integers; no torch.
Price: one list entry a step of the ramp.
"""

from __future__ import annotations

from bisect import bisect_left

from ..config.ramp import RampConfig


class RampPlan:
    """The micro-batches of every step of a run.

    Args:
        ramp ([`RampConfig`]): that is on, and whose `start` and `increment` are multiples of `micro_rows`.
        micro_rows (`int`): rows that all groups draw at once.
        full (`int`): micro-batches of a step once the ramp is over.
        epoch (`int`, *optional*): micro-batches of an epoch, whose last step takes what is left. `None`: no end.
    """

    def __init__(self, ramp: RampConfig, micro_rows: int, full: int, epoch: int | None) -> None:
        self.ramp, self.micro_rows, self.full, self.epoch = ramp, micro_rows, full, epoch
        self._ends = [0]  # micro-batches after each step, until the ramp is over and an epoch begins
        while not self._is_over(self._ends[-1]):
            self._ends.append(self._ends[-1] + self._size_at(self._ends[-1]))

    def _is_over(self, batches: int) -> bool:
        assert self.ramp.rows is not None
        return batches * self.micro_rows >= self.ramp.rows and not (self.epoch and batches % self.epoch)

    def _size_at(self, batches: int) -> int:
        start, increment, rows = self.ramp.start, self.ramp.increment, self.ramp.rows
        assert start is not None and increment is not None and rows is not None
        stages = (self.full * self.micro_rows - start) // increment
        stage = min(batches * self.micro_rows * stages // rows, stages)
        size = (start + stage * increment) // self.micro_rows
        return min(size, self.epoch - batches % self.epoch) if self.epoch else size

    def batches_after(self, step: int) -> int:
        """Micro-batches of the first `step` steps, of every group."""
        if step < len(self._ends):
            return self._ends[step]
        step -= len(self._ends) - 1
        if self.epoch is None:
            return self._ends[-1] + step * self.full
        epochs, step = divmod(step, -(-self.epoch // self.full))
        return self._ends[-1] + epochs * self.epoch + step * self.full

    def size_after(self, step: int) -> int:
        """Micro-batches of the step after the first `step`."""
        return self.batches_after(step + 1) - self.batches_after(step)

    def steps_for(self, batches: int) -> int:
        """Steps that take at least so many micro-batches."""
        if batches <= self._ends[-1]:
            return bisect_left(self._ends, batches)
        rest = batches - self._ends[-1]
        if self.epoch is None:
            return len(self._ends) - 1 - (-rest // self.full)
        epochs, rest = divmod(rest, self.epoch)
        return len(self._ends) - 1 + epochs * -(-self.epoch // self.full) - (-rest // self.full)

    def full_steps(self, step: int) -> float:
        """How many whole global batches the first `step` steps took."""
        batches = self.batches_after(step)
        return batches // self.full if batches % self.full == 0 else batches / self.full

    def epochs_after(self, step: int) -> tuple[int, int]:
        """Whole epochs before the step after the first `step`, and micro-batches of the one it is in."""
        batches = self.batches_after(step)
        return (0, batches) if self.epoch is None else divmod(batches, self.epoch)
